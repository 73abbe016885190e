//! One flipped bit in any file of a step: verify and a resume refuse and name the file, auto falls back; and what
//! `verify` says of whole and damaged steps.

use super::story::json;
use crate::common::{
    failed, succeeded,
    tiny::{TinyRun, copy_tree, tamper},
    xorl,
};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};
use xorl_dist::checkpoint::{contents, publish, steps};

const SETTINGS: [&str; 6] =
    ["--train.max_steps", "3", "--train.save_steps", "1", "--lora.save_lora_only", "false"];

/// The files below `folder`, by their path in it.
fn files(folder: &Path) -> Vec<String> {
    let names = crate::common::tiny::tree(folder).into_keys();
    names.map(|path| path.strip_prefix(folder).unwrap().display().to_string()).collect()
}

/// Flips bit `at` of a file, counted from its beginning.
fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at / 8] ^= 1 << (at % 8);
    // Not over the bytes of a file that other steps link.
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

/// `verify` of `path`: its exit code and its lines.
fn said(path: &Path, more: &[&str]) -> (Option<i32>, Vec<String>) {
    let output = xorl(1, &[&["verify", &path.display().to_string()], more].concat());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code(), text.lines().map(str::to_owned).collect())
}

#[test]
fn a_flipped_bit_in_any_file_of_a_step_is_found_and_auto_falls_back() {
    let run = TinyRun::new();
    succeeded(&run.run(1, "out", &SETTINGS));
    let (folder, step) = (run.run_dir("out"), run.step("out", 3));
    let files = files(&step);
    assert!(files.len() >= 7, "{files:?}");
    for file in &files {
        let path = step.join(file);
        let whole = fs::read(&path).unwrap();
        let bits = whole.len() * 8;
        for at in [0, 3, bits / 4 + 1, bits / 2 + 2, bits * 3 / 4 + 5, bits - 1] {
            flip(&path, at);
            let error = publish::verify(&step).expect_err(file).to_string();
            // A flipped manifest speaks of a file that is not as it says, and names itself too.
            assert!(error.contains(file.as_str()), "bit {at} of {file}: {error}");
            let (newest, skipped) = steps::newest_whole(&folder);
            assert_eq!(newest, Some(run.step("out", 2)), "bit {at} of {file}");
            assert!(skipped.len() == 1 && skipped[0].to_string().contains(file.as_str()), "{skipped:?}");
            fs::write(&path, &whole).unwrap();
        }
    }
    publish::verify(&step).unwrap();
    for file in ["manifest.json", "training_state/trainer_state.json", "adapter_model.safetensors"] {
        copy_tree(&run.at("out"), &run.at("hurt"));
        let step = run.step("hurt", 3);
        flip(&step.join(file), 8 * 40 + 1);
        let (code, lines) = said(&step, &[]);
        assert!(code == Some(2) && lines.len() == 1, "{lines:?}");
        assert!(lines[0].contains(": damaged: ") && lines[0].contains(file), "{lines:?}");
        let named = step.display().to_string();
        let more = [&SETTINGS[..], &["--train.load_checkpoint_path", &named]].concat();
        let line = failed(&run.run(1, "hurt", &more), 2);
        assert!(line.contains("is not a whole step") && line.contains(file), "{line}");
        let resumed =
            run.run(1, "hurt", &[&SETTINGS[..], &["--train.load_checkpoint_path", "auto"]].concat());
        succeeded(&resumed);
        let told = String::from_utf8_lossy(&resumed.stderr).into_owned();
        let skipped =
            told.lines().find(|line| line.contains("skipped: ")).unwrap_or_else(|| panic!("{told}"));
        assert!(skipped.contains("step_3") && skipped.contains(file), "{skipped}");
        assert!(told.contains("on from") && told.contains("step_2"), "{told}");
        publish::verify(&step).unwrap();
        fs::remove_dir_all(run.at("hurt")).unwrap();
    }
}

/// A copy of the newest step with `change` done to one of its files, and a manifest made anew: its bytes are as they
/// were published. The reason that `contents` gives.
fn inside(run: &TinyRun, file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> String {
    let copy = run.at("copy/step_3");
    let _ = fs::remove_dir_all(&copy);
    copy_tree(&run.step("out", 3), &copy);
    let bytes = fs::read(copy.join(file)).unwrap();
    tamper(&copy, file, &change(bytes), true);
    publish::verify(&copy).unwrap();
    contents::check(&copy).expect_err(file).to_string()
}

/// `text` in place of `from` in a text file.
fn with(from: &str, text: &str) -> impl FnOnce(Vec<u8>) -> Vec<u8> {
    let (from, text) = (from.to_owned(), text.to_owned());
    move |bytes| {
        let whole = String::from_utf8(bytes).unwrap();
        assert!(whole.contains(&from), "{from} in {whole}");
        whole.replacen(&from, &text, 1).into_bytes()
    }
}

#[test]
fn verify_names_each_step_and_what_is_wrong_with_it() {
    let run = TinyRun::new();
    succeeded(&run.run(1, "out", &SETTINGS));
    let (code, lines) = said(&run.step("out", 2), &[]);
    assert!(code == Some(0) && lines.len() == 1 && lines[0].contains("step_2: whole, "), "{lines:?}");
    let (code, lines) = said(&run.run_dir("out"), &[]);
    assert_eq!(code, Some(0), "{lines:?}");
    let starts =
        ["step_1: whole, ", "step_2: whole, ", "step_3: whole, ", "load_checkpoint_path: auto takes step_3"];
    assert!(lines.iter().zip(starts).all(|(line, start)| line.starts_with(start)), "{lines:?}");
    let listed = json(&run.step("out", 3).join("manifest.json")).as_object().unwrap().len();
    assert!(lines[2].contains(&format!("{listed} files, ")), "{lines:?}");

    // Bytes as they were published, which cannot be.
    let state = "training_state/trainer_state.json";
    let pieces = "training_state/optimizer-0-of-1.safetensors";
    let weights = "adapter_model.safetensors";
    let nan = |mut bytes: Vec<u8>| {
        let end = bytes.len();
        bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        bytes
    };
    let other = |mut bytes: Vec<u8>| {
        let end = bytes.len();
        bytes[end - 1] ^= 1;
        bytes
    };
    for (file, reason, words) in [
        (weights, inside(&run, weights, nan), "has NaN or infinity"),
        (weights, inside(&run, weights, other), "has other values than adapter_model.safetensors"),
        (pieces, inside(&run, pieces, |_| Vec::new()), "bytes, and the files with them have 0"),
        (pieces, inside(&run, pieces, |bytes| vec![255; bytes.len()]), "optimizer-0-of-1.safetensors: "),
        ("config", inside(&run, "adapter_config.json", with("\"r\": 4", "\"r\": 5")), "says rank 5"),
        (state, inside(&run, state, with("\"step\": 3", "\"step\": 4")), "the state of step 4"),
        (state, inside(&run, state, with("\"first\": 0", "\"first\": 16")), "share elements of region"),
        (state, inside(&run, state, with("\"piece\": ", "\"piece\": 99999999")), "the files with them have"),
    ] {
        assert!(reason.contains(words), "{file}: {words} in {reason}");
    }

    // The output directory, with a step damaged, one with a file too many, and none.
    fs::write(run.step("out", 1).join("notes.txt"), "mine").unwrap();
    flip(&run.step("out", 3).join(weights), 99);
    fs::create_dir(run.run_dir("out").join("step_4")).unwrap();
    copy_tree(&run.step("out", 2), &run.step("out", 5));
    let (code, lines) = said(&run.at("out"), &[]);
    assert_eq!(code, Some(2));
    for (line, start) in lines.iter().zip([
        "weights/run/step_1: damaged: notes.txt is in it, which manifest.json does not list",
        "weights/run/step_2: whole, ",
        "weights/run/step_3: damaged: adapter_model.safetensors is not the file that was published (SHA-256 differs",
        "weights/run/step_4: damaged: manifest.json: No such file",
        "weights/run/step_5: damaged: ",
        "weights/run: load_checkpoint_path: auto takes step_2",
    ]) {
        assert!(line.starts_with(start), "{start} in {lines:?}");
    }
    assert!(lines[4].ends_with("it is the state of step 2"), "{lines:?}");
    assert_eq!(lines.len(), 6, "{lines:?}");
    let (code, lines) = said(&run.at("out"), &["--json"]);
    let told: Value = serde_json::from_str(&lines.concat()).unwrap();
    assert_eq!((code, told["auto"]["weights/run"].as_str()), (Some(2), Some("step_2")), "{told}");
    let whole: Vec<&Value> = told["steps"].as_array().unwrap().iter().map(|step| &step["whole"]).collect();
    assert_eq!(whole, [false, true, false, false, false]);
    for (path, words) in
        [(run.at("nowhere"), "no such folder"), (PathBuf::from("tests/common"), "no step: expected")]
    {
        let line = failed(&xorl(1, &["verify", &path.display().to_string()]), 2);
        assert!(line.contains(words), "{line}");
    }
}
