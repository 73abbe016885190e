//! Watching runs: the page of `report` in headless Chromium, the list of `runs`, lines of several steps, and
//! TensorBoard's files as TensorBoard reads them.

use crate::common::{
    failed, metrics, python, succeeded,
    tiny::{TinyRun, differences},
    xorl,
};
use crate::page::browser::Browser;
use serde_json::{Value, json};
use std::{fs, path::Path, process::Command};
use tempfile::TempDir;
use xorl_dist::checkpoint::output::OutputLock;

/// A line as a run writes it: losses fall from `first`, the norm is 0 once.
fn line(step: usize, steps: usize, first: f64) -> Value {
    let loss = first / (1.0 + step as f64 / 20.0) + 0.05 * (step as f64).sin();
    let mut line = json!({
        "step": step, "epoch": 0, "loss": loss, "grad_norm": if step == 7 { 0.0 } else { 1.0 / (step as f64).sqrt() },
        "lr": 1e-4 * (1.0 - step as f64 / 250.0), "tokens": 100 * steps, "tokens_total": 130 * steps,
        "tokens_padding": 10 * steps, "tokens_per_second": 900.0 + 50.0 * (step as f64 / 9.0).cos(),
        "step_seconds": 0.13 * steps as f64, "phase_seconds": {"forward": 0.03 * steps as f64, "backward": 0.08 * steps as f64},
        "peak_rss_bytes": 900_000_000 + 100_000 * step,
        "comm_bytes": {"all_gather/shard": 40_000_000 * steps, "all_to_all/expert": 3_000_000 * steps},
        "router": {"max_over_mean": 1.5, "entropy": 1.7 - 0.1 / step as f64, "aux_loss": 2.1}, "total_steps": 200,
    });
    if steps > 1 {
        line["steps"] = steps.into();
    }
    if step.is_multiple_of(20) {
        line["eval_loss"] = json!(loss + 0.2 + (step as f64 - 120.0).abs() / 200.0);
    }
    line
}

/// An output directory of `lines`, with a line that is torn.
fn output(folder: &Path, name: &str, lr: f64, lines: impl Iterator<Item = Value>) {
    let output = folder.join(name);
    fs::create_dir_all(&output).unwrap();
    let lines: String = lines.map(|line| format!("{line}\n")).collect();
    fs::write(output.join("metrics.jsonl"), lines + "{\"step\": 201, \"lo").unwrap();
    let config = format!("model: {{model_path: org/base}}\ntrain: {{lr: {lr}, run_id: run, seed: 42}}\n");
    fs::write(output.join("config.yaml"), config).unwrap();
}

/// Three runs: of all steps with an evaluation before them, of 120 steps, and of lines of 10 steps.
fn three_runs() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let before = json!({"step": 0, "eval_loss": 4.5});
    let first = std::iter::once(before).chain((1..=200).map(|step| line(step, 1, 4.0)));
    output(folder.path(), "rank8", 1e-4, first);
    output(folder.path(), "rank16 <b>", 2e-4, (1..=120).map(|step| line(step, 1, 3.5)));
    output(folder.path(), "sparse", 1e-4, (1..=20).map(|step| line(10 * step, 10, 3.0)));
    folder
}

/// Opens the report of `folder`.
fn open(browser: &mut Browser, folder: &Path) {
    let (page, at) = (folder.join("report.html"), folder.display().to_string());
    let output = xorl(1, &["report", &at, "--out", &page.display().to_string()]);
    succeeded(&output);
    browser.open(&format!("file://{}", page.display()));
    browser.wait("document.querySelectorAll('#run-rows tr').length > 0");
}

/// Takes a picture, which $XORL_SCREENSHOTS keeps.
fn picture(browser: &mut Browser, name: &str) -> Vec<u8> {
    let png = browser.screenshot();
    assert!(png.starts_with(b"\x89PNG"), "{name}");
    if let Some(folder) = std::env::var_os("XORL_SCREENSHOTS") {
        fs::write(Path::new(&folder).join(format!("{name}.png")), &png).unwrap();
    }
    png
}

/// The curve with this key.
fn curve(key: &str, rest: &str) -> String {
    format!("document.querySelector('figure[data-curve=\"{key}\"]'){rest}")
}

/// Curves of a chart.
fn traces(browser: &mut Browser, key: &str) -> u64 {
    browser.value(&curve(key, ".querySelectorAll('.trace:not(.raw)').length")).as_u64().unwrap()
}

#[test]
fn browser_the_report_shows_runs_over_each_other() {
    let folder = three_runs();
    let mut browser = Browser::start();
    browser.resize(1280);
    let mut pictures = Vec::new();
    for scheme in ["light", "dark"] {
        browser.prefer(scheme);
        open(&mut browser, folder.path());
        let lowest = browser.lowest_contrast();
        assert!((4.5..22.0).contains(&lowest[0].as_f64().unwrap()), "{scheme}: {lowest}");
        pictures.push(picture(&mut browser, &format!("three_{scheme}")));
    }
    assert_ne!(pictures[0], pictures[1]);
    // The table: names as they are, states, steps, and the lowest evaluation.
    let row = |browser: &mut Browser, i: usize| {
        browser.text(&format!("document.querySelectorAll('#run-rows tr')[{i}].innerText"))
    };
    let (first, second) = (row(&mut browser, 0), row(&mut browser, 1));
    assert!(first.contains("rank16 <b>") && first.contains("120 of 200"), "{first}");
    assert!(
        second.contains("rank8") && second.contains(" at step 1") && second.contains("interrupted"),
        "{second}"
    );
    for key in
        ["loss", "lr", "grad_norm", "tokens_per_second", "peak_rss_bytes", "received_bytes", "router.entropy"]
    {
        assert_eq!(traces(&mut browser, key), 3, "{key}");
    }
    assert_eq!(browser.value(&curve("device_memory_bytes", "")), Value::Null);
    let phases = browser.text("document.getElementById('phase-rows').innerText");
    assert!(phases.contains("backward") && phases.contains("0.08 s") && phases.contains("73 %"), "{phases}");
    let received = browser.text("document.getElementById('received-rows').innerText");
    assert!(received.contains("all_gather/shard") && received.contains("38.1 MB"), "{received}");
    let fields = browser.text("document.getElementById('config-rows').innerText");
    assert!(fields.contains("train.lr") && !fields.contains("train.seed"), "{fields}");
    // The cursor reads all runs, in every chart at once.
    browser.value(&curve("loss", ".querySelector('svg').focus()"));
    browser.press("ArrowLeft");
    let read = browser.text("document.activeElement.getAttribute('aria-valuetext')");
    let loss = |step: usize, first: f64| {
        let loss = line(step, 1, first)["loss"].as_f64().unwrap();
        browser_number(loss)
    };
    assert_eq!(read, format!("step 199: rank16 <b> –, rank8 {}, sparse {}", loss(199, 4.0), loss(200, 3.0)));
    assert_eq!(browser.text(&curve("lr", ".querySelector('.now').innerText")), "step 199");
    // A run is hidden and shown again by its box.
    browser.value("document.querySelectorAll('#run-rows input')[1].click()");
    assert_eq!(traces(&mut browser, "loss"), 2);
    assert_eq!(browser.text("document.getElementById('news').innerText"), "rank8 is hidden");
    browser.value("document.querySelectorAll('#run-rows input')[1].click()");
    // Scale, axis and smoothing.
    let ticks = curve("grad_norm", ".querySelector('svg').textContent");
    let linear = browser.text(&ticks);
    browser.value("document.querySelector('input[value=log]').click()");
    assert_ne!(browser.text(&ticks), linear);
    assert_eq!(traces(&mut browser, "grad_norm"), 3);
    browser.value("document.querySelector('input[value=tokens]').click()");
    browser.value("document.querySelector('input[value=seconds]').click()");
    let told = browser.text(&curve("loss", ".querySelector('svg').getAttribute('aria-valuetext')"));
    assert!(told.starts_with("0.4333 min: "), "{told}");
    let smooth = "(() => { const range = document.querySelector('input[name=smoothing]'); range.value = 0.9; \
                  range.dispatchEvent(new Event('input', { bubbles: true })); })()";
    browser.value(smooth);
    assert_eq!(browser.value(&curve("loss", ".querySelectorAll('.trace.raw').length")), 3);
    assert_eq!(traces(&mut browser, "loss"), 3);
    picture(&mut browser, "three_smoothed");
    // Everything has a name, and nothing was asked of a network.
    assert!(browser.named_nodes(&["banner", "main", "status"]) > 20);
    assert_eq!(browser.value("performance.getEntriesByType('resource').length"), 0);
    browser.resize(400);
    assert!(browser.value("document.documentElement.scrollWidth").as_u64().unwrap() <= 400);
    picture(&mut browser, "three_narrow");
}

/// A number as the page writes it: four significant digits.
fn browser_number(value: f64) -> String {
    let digits = (3 - value.abs().log10().floor() as i32).max(0) as usize;
    format!("{value:.digits$}").trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[test]
fn browser_the_report_shows_a_run_of_one_step_and_an_empty_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut browser = Browser::start();
    browser.resize(1280);
    output(folder.path(), "empty", 1e-4, std::iter::empty());
    open(&mut browser, folder.path());
    assert_eq!(browser.text("document.getElementById('nothing').innerText"), "No step was made yet.");
    picture(&mut browser, "empty");
    output(folder.path(), "one", 1e-4, std::iter::once(line(1, 1, 4.0)));
    open(&mut browser, folder.path());
    assert_eq!(browser.value(&curve("loss", ".querySelectorAll('.mark').length")), 1);
    assert_eq!(browser.value("document.getElementById('nothing').hidden"), true);
    assert_eq!(browser.value("document.querySelectorAll('#run-rows tr').length"), 2);
    picture(&mut browser, "one_and_empty");
}

#[test]
fn a_report_needs_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().display().to_string();
    let told = failed(&xorl(1, &["report", &at]), 2);
    assert!(told.contains("no run is in it; expected metrics.jsonl"), "{told}");
    let told = failed(&xorl(1, &["runs", &format!("{at}/absent")]), 2);
    assert!(told.contains("absent: no such folder"), "{told}");
    output(folder.path(), "one", 1e-4, std::iter::once(line(1, 1, 4.0)));
    let told = failed(&xorl(1, &["report", &at, "--out", &format!("{at}/absent/report.html")]), 2);
    assert!(told.contains("--out") && told.contains("absent/report.html"), "{told}");
}

/// The runs below `folder`, by their folder's name.
fn listed(folder: &Path) -> Vec<Value> {
    let output = xorl(1, &["runs", &folder.display().to_string(), "--json"]);
    succeeded(&output);
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn runs_tells_the_state_of_each_run() {
    let run = TinyRun::new();
    let all = |name: &str| run.at("all").join(name);
    succeeded(&run.run(1, "all/whole", &["--train.max_steps", "10", "--train.run_id", "run"]));
    run.interrupted("all/whole", "all/killed", 5);
    run.interrupted("all/whole", "all/going", 5);
    let lock = OutputLock::take(&all("going")).unwrap();
    // Steps that are not finite end a run, which says why.
    let broken = ["--train.lr", "1e30", "--train.lr_min", "0", "--train.lr_warmup_ratio", "0"];
    let told =
        failed(&run.run(1, "all/broken", &[&broken[..], &["--train.max_skipped_steps", "2"]].concat()), 1);
    let runs = listed(&run.at("all"));
    drop(lock);
    let of = |key: &str| runs.iter().map(|run| run[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("state"), ["failed", "running", "interrupted", "finished"]);
    assert_eq!(of("step")[1..], [json!(8), json!(8), json!(10)]);
    assert_eq!(of("total_steps")[1..], [10; 3]);
    assert_eq!(of("saved_step")[1..], [json!(5), json!(5), json!(10)]);
    assert!(told.contains(runs[0]["reason"].as_str().unwrap()), "{told} {runs:?}");
    let last = metrics(&all("whole"))[9]["loss"].clone();
    assert_eq!(runs[3]["loss"], last);
    let table = xorl(1, &["runs", &run.at("all").display().to_string()]);
    let table = String::from_utf8(table.stdout).unwrap();
    let line = table.lines().find(|line| line.starts_with("whole ")).expect(&table);
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[1..3], ["finished", "10/10"], "{table}");
    assert_eq!(words[3], format!("{:.4}", last.as_f64().unwrap()), "{table}");
}

/// Lines of several steps change no adapter, and TensorBoard reads every line once, also after a resume.
#[test]
fn python_tensorboard_reads_every_logged_step_once() {
    let run = TinyRun::new();
    let more = ["--train.use_tensorboard", "true"];
    succeeded(&run.run(1, "whole", &more));
    run.interrupted("whole", "half", 10);
    succeeded(&run.run(1, "half", &[&more[..], &["--train.load_checkpoint_path", "auto"]].concat()));
    succeeded(&run.run(1, "sparse", &[&more[..], &["--train.logging_steps", "7"]].concat()));
    let different = differences(&run.step("whole", 20), &run.step("sparse", 20));
    let of_settings = |path: &std::path::PathBuf| path.ends_with("manifest.json");
    assert!(different.iter().all(of_settings), "{different:?}");
    let outputs = ["whole", "half", "sparse"];
    let folders = outputs.map(|out| run.at(out).join("tensorboard/run"));
    assert_eq!(fs::read_dir(&folders[1]).unwrap().count(), 2, "a resume has a file of its own");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/event_files.py");
    let read = Command::new(python()).arg(script).args(&folders).output().unwrap();
    succeeded(&read);
    let read: Vec<Value> = serde_json::from_slice(&read.stdout).unwrap();
    for (read, out) in read.iter().zip(outputs) {
        let lines = metrics(&run.at(out));
        for (tag, key) in [
            ("train/loss", "/loss"),
            ("train/grad_norm", "/grad_norm"),
            ("train/learning_rate", "/lr"),
            ("phase_seconds/forward", "/phase_seconds/forward"),
            ("memory/peak_rss_bytes", "/peak_rss_bytes"),
        ] {
            let value = |line: &Value| f64::from(line.pointer(key).unwrap().as_f64().unwrap() as f32);
            let expected: Vec<Value> = lines.iter().map(|line| json!([line["step"], value(line)])).collect();
            let found: Vec<Value> = read[tag].as_array().unwrap_or_else(|| panic!("{tag}: {read}")).clone();
            assert_eq!(found, expected, "{out} {tag}");
        }
    }
    let steps: Vec<u64> =
        metrics(&run.at("sparse")).iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 5, 7, 10, 14, 15, 20]);
    // The lines of several steps are means and sums of those of each.
    let (whole, sparse) = (metrics(&run.at("whole")), metrics(&run.at("sparse")));
    let of = |key: &str| whole[1..5].iter().map(|line| line[key].as_f64().unwrap()).sum::<f64>();
    assert!((sparse[1]["loss"].as_f64().unwrap() - of("loss") / 4.0).abs() < 1e-12);
    assert_eq!((&sparse[1]["steps"], sparse[1]["tokens"].as_f64().unwrap()), (&json!(4), of("tokens")));
}
