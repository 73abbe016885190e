//! The crates of the program keep the rules of `deny.toml`: licences, banned crates, sources. cargo-deny, which takes
//! minutes to build, reads the same file in `ci/long.sh advisories`.

use serde_json::Value;
use std::{collections::BTreeSet, path::Path, process::Command};

/// Lines of `[section]` of deny.toml, without comments.
fn section(name: &str) -> Vec<String> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deny.toml")).unwrap();
    let lines = text.lines().map(|line| line.split(" #").next().unwrap_or_default().trim().to_owned());
    let lines: Vec<String> = lines.filter(|line| !line.starts_with('#')).collect();
    let own = lines.iter().skip_while(|line| **line != format!("[{name}]")).skip(1);
    own.take_while(|line| !line.starts_with('[') || line.contains(']') && line.contains('='))
        .cloned()
        .collect()
}

/// The first texts in quotes on the lines of the list `key`.
fn list(section: &[String], key: &str) -> BTreeSet<String> {
    let start = section.iter().position(|line| line.starts_with(&format!("{key} = ["))).unwrap();
    let rest = &section[start..];
    let end = rest.iter().position(|line| line.ends_with(']')).unwrap();
    let quoted = rest[..=end].iter().filter_map(|line| Some(line.split('"').nth(1)?.to_owned()));
    quoted.collect()
}

/// True if a licence expression of crates.io can be met by `allowed` ones alone.
fn is_allowed(expression: &str, allowed: &BTreeSet<String>) -> bool {
    // No crate nests further than `(a OR b) AND c`; `/` is an older OR.
    let all =
        expression.replace(['(', ')'], "").replace(" AND ", "&").replace(" / ", "/").replace(" OR ", "/");
    let mut parts = all.split('&');
    parts.all(|part| part.split('/').any(|one| allowed.contains(one.trim())))
}

#[test]
fn crates_have_known_licences_and_sources_and_none_is_banned() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "{}", packages.len());

    let licences = list(&section("licenses"), "allow");
    let banned = list(&section("bans"), "deny");
    let sources = section("sources");
    let registries: BTreeSet<String> =
        list(&sources, "allow-registry").iter().map(|address| format!("registry+{address}")).collect();
    assert!(licences.contains("MIT") && banned.contains("openssl-sys") && registries.len() == 1);
    let mut faults = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap();
        let licence = package["license"].as_str().unwrap_or("none");
        if !is_allowed(licence, &licences) {
            faults.push(format!("{name}: licence {licence}"));
        }
        if banned.contains(name) {
            faults.push(format!("{name} is banned"));
        }
        match package["source"].as_str() {
            None if name == "xorl-dist" => {}
            Some(source) if registries.contains(source) => {}
            source => faults.push(format!("{name}: source {source:?}")),
        }
        let wild = package["dependencies"].as_array().unwrap().iter().filter(|needed| needed["req"] == "*");
        if name == "xorl-dist" {
            faults.extend(wild.map(|needed| format!("{}: any version", needed["name"])));
        }
    }
    assert!(faults.is_empty(), "deny.toml: {faults:#?}");
}

#[test]
fn licence_expressions_are_read() {
    let allowed = BTreeSet::from(["MIT".to_owned(), "ISC".to_owned()]);
    for fits in ["MIT", "GPL-3.0 OR MIT", "GPL-3.0/MIT", "MIT AND ISC", "(GPL-3.0 OR MIT) AND ISC"] {
        assert!(is_allowed(fits, &allowed), "{fits}");
    }
    for refused in ["none", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND GPL-3.0", "GPL-3.0 / LGPL-2.1"] {
        assert!(!is_allowed(refused, &allowed), "{refused}");
    }
}
