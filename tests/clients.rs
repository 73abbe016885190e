//! Real clients, unmodified, against the server on one and two ranks: `xorl-client`, and `tinker` as it is and as it
//! last spoke JSON. Every public method works or is refused with a text, in both worlds alike; adapters that clients
//! train alone, interleaved and together end as PEFT alone ends.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

mod common;

use common::{client_python, is_mpich, python, serving::Serving};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The name in the README of xorl-client, which finds the tokenizer by it: below the folder where clients start.
const BASE_MODEL: &str = "Qwen/Qwen3-4B-Instruct-2507";
/// Of one computation in two ways, and of two programs.
const SAME: f64 = 1e-5;
const PEFT: f64 = 1e-4;

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients")
}

/// A client, and how many adapters it trains.
struct Client {
    name: &'static str,
    family: &'static str,
    python: PathBuf,
    adapters: usize,
}

fn clients() -> [Client; 3] {
    let own = std::env::var_os("XORL_CLIENT_PYTHON").map_or_else(python, PathBuf::from);
    let tinker = client_python("XORL_TINKER_PYTHON", ".venv-tinker");
    let json = client_python("XORL_TINKER_JSON_PYTHON", ".venv-tinker-json");
    [
        Client { name: "xorl", family: "xorl", python: own, adapters: 8 },
        Client { name: "tinker", family: "tinker", python: tinker, adapters: 3 },
        Client { name: "tinker_json", family: "tinker", python: json, adapters: 2 },
    ]
}

/// Settings of a server of fp32, whose adapters PEFT can have: it has no fused projections.
fn write_config(path: &Path, model: &Path, output: &Path) {
    let config = json!({
        "model_path": model, "base_model_name": BASE_MODEL, "output_dir": output,
        "lora_rank": 8, "lora_alpha": 16, "enable_mixed_precision": false,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    });
    fs::write(path, config.to_string()).unwrap();
}

/// What each client reports of a server in `world`.
fn reports(world: usize, folder: &Path, packages: &str) -> BTreeMap<&'static str, PathBuf> {
    let own = folder.join(format!("world_{world}"));
    fs::create_dir(&own).unwrap();
    let config = own.join("server.yaml");
    write_config(&config, &folder.join(BASE_MODEL), &own.join("out"));
    let server = Serving::start(world, &config, &[]);
    let url = format!("http://{}", server.address);
    let running: Vec<_> = clients()
        .into_iter()
        .map(|client| {
            let report = own.join(format!("{}_{world}.json", client.name));
            let mut command = Command::new(&client.python);
            command
                .arg(scripts().join("drive.py"))
                .args([client.family, &url])
                .arg(own.join("out"))
                .args([BASE_MODEL, &client.adapters.to_string()])
                .arg(&report)
                .current_dir(folder)
                .env("BORROWED_PACKAGES", packages)
                .env("HF_HUB_OFFLINE", "1")
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            (client.name, command.spawn().unwrap(), report)
        })
        .collect();
    // All are waited for before any is judged: a failure leaves none behind.
    let ended: Vec<_> = running
        .into_iter()
        .map(|(name, child, report)| (name, child.wait_with_output().unwrap(), report))
        .collect();
    for (name, output, _) in &ended {
        let said = [&output.stdout[..], &output.stderr].map(String::from_utf8_lossy).concat();
        assert!(output.status.success(), "{name} on {world} ranks: {said}\n{}", server.said());
    }
    let (status, said) = server.end(libc::SIGUSR1);
    assert!(status.code() == Some(75) || is_mpich(), "{status} {said}");
    ended.into_iter().map(|(name, _, report)| (name, report)).collect()
}

/// The table of methods in a report: state and text of each.
fn table(report: &Path) -> BTreeMap<String, (String, Value)> {
    let told: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    let rows = told["methods"].as_array().unwrap().iter();
    rows.map(|row| {
        let text = |field: &str| row[field].as_str().unwrap().to_owned();
        (text("method"), (text("state"), row["error"].clone()))
    })
    .collect()
}

fn oracle(arguments: &[&Path]) -> String {
    let mut command = Command::new(python());
    command.arg(scripts().join("peft_alone.py")).args(arguments).env("HF_HUB_OFFLINE", "1");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn mpi_python_real_clients_get_what_each_method_promises_and_adapters_as_peft_alone() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join(BASE_MODEL);
    let tokenizer = scripts().with_file_name("data").join("chat/byte_level");
    let packages = oracle(&[Path::new("model"), &model, &tokenizer]);

    let [one, two] = [1, 2].map(|world| reports(world, folder.path(), &packages));
    for (name, report) in &one {
        let (alone, over_two) = (table(report), table(&two[name]));
        assert_eq!(alone, over_two, "{name}");
        let of_state = |state: &str| alone.values().filter(|(found, _)| found == state).count();
        let (working, refused) = (of_state("works"), of_state("refused"));
        println!("{name}: {working} methods work, {refused} are refused");
        assert_eq!(working + refused, alone.len(), "{name}: {alone:?}");
        assert!(working > 40, "{name}: {alone:?}");
        for (method, (_, error)) in alone.iter().filter(|(_, (state, _))| state == "refused") {
            println!("  {method}: {}", error.as_str().unwrap());
        }
    }

    let reports: Vec<&Path> = one.values().chain(two.values()).map(PathBuf::as_path).collect();
    let compared = oracle(&[&[Path::new("compare"), &model], &reports[..]].concat());
    let rows: BTreeMap<String, Value> = serde_json::from_str(compared.lines().last().unwrap()).unwrap();
    println!("{rows:#?}");
    assert_eq!(rows.len(), 2 * (3 + 3 + 2));
    for (case, row) in &rows {
        let number = |field: &str| row[field].as_f64().unwrap();
        assert!(number("alone") <= SAME, "{case}: {} from the same adapter trained alone", number("alone"));
        assert!(number("peft") <= PEFT, "{case}: {} from PEFT", number("peft"));
        assert!(number("moved") > 0.01, "{case}: an adapter moved by {} alone", number("moved"));
    }
}
