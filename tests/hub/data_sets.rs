//! Data sets by hub id: the files that HF `datasets` chooses, downloaded once and read as local ones are.

use super::{
    Setup,
    server::{COMMIT, DATA, Faults},
    stderr, with_hub,
};
use crate::common::{failed, python, succeeded};
use serde_json::{Value, json};
use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};
use xorl_dist::hub::{Subset, choose};

impl Setup {
    /// A check of the run on data sets of the hub.
    fn data(&self, cache: &str, sets: &Value, environment: &[(&str, &str)]) -> std::process::Output {
        let sets = sets.to_string();
        let config = self.run.at("run.yaml").display().to_string();
        let model = self.run.at("base/model").display().to_string();
        let arguments = [
            "check",
            "--config",
            &config,
            "--model.model_path",
            &model,
            "--data.datasets",
            &sets,
            "--show-samples",
            "100",
        ];
        self.command(1, cache, &arguments).envs(environment.iter().copied()).output().unwrap()
    }

    /// Requests for files of the data set, without their beginning.
    fn sent_of_data(&self) -> Vec<String> {
        let start = format!("GET /datasets/{DATA}/resolve/{COMMIT}/");
        let sent = self.hub.requests().into_iter();
        sent.filter_map(|line| line.strip_prefix(&start).map(str::to_owned)).collect()
    }

    fn snapshot_of_data(&self, cache: &str) -> PathBuf {
        let folder = format!("datasets--{}", DATA.replace('/', "--"));
        self.run.at(cache).join("hub").join(folder).join("snapshots").join(COMMIT)
    }
}

/// The rows that a check shows.
fn samples(output: &std::process::Output) -> String {
    succeeded(output);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text[text.find("== row 1").unwrap()..].to_owned()
}

#[test]
fn a_data_set_is_downloaded_once_and_then_found() {
    let setup = Setup::new(Faults::default());
    let train = json!([{"path": DATA, "type": "tokenized"}]);
    let first = setup.data("cache", &train, &[]);
    let local = json!([{"path": setup.run.at("rows.jsonl"), "type": "tokenized"}]);
    assert_eq!(samples(&first), samples(&setup.data("cache", &local, &[])), "the rows of the local file");
    let shards = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"];
    assert_eq!(setup.sent_of_data(), [&["README.md"], &shards[..]].concat());
    assert!(fs::read_link(setup.snapshot_of_data("cache").join(shards[0])).is_ok());
    assert!(stderr(&first).contains(&format!("downloading {DATA}: ")), "{}", stderr(&first));

    // Another split brings its own file alone; both are found offline, and by commit, without a request.
    setup.hub.forget();
    let both =
        json!([{"path": DATA, "type": "tokenized"}, {"path": DATA, "type": "tokenized", "split": "test"}]);
    succeeded(&setup.data("cache", &both, &[]));
    assert_eq!(setup.sent_of_data(), ["data/test-00000-of-00001.jsonl"]);
    setup.hub.forget();
    succeeded(&setup.data("cache", &both, &[("HF_HUB_OFFLINE", "1")]));
    succeeded(&setup.data("cache", &json!([{"path": format!("{DATA}@{COMMIT}"), "type": "tokenized"}]), &[]));
    assert_eq!(setup.hub.requests(), [""; 0]);
    let away = setup.data("cache", &both, &[("HF_ENDPOINT", "http://127.0.0.1:1")]);
    succeeded(&away);
    assert!(stderr(&away).contains("is used as the cache has it"), "{}", stderr(&away));

    // A part of a split is not taken for all of it.
    fs::remove_file(setup.snapshot_of_data("cache").join(shards[1])).unwrap();
    let line = failed(&setup.data("cache", &train, &[("HF_HUB_OFFLINE", "1")]), 2);
    assert!(line.contains(&format!("{DATA}: ")) && line.contains(&format!("lacks {}", shards[1])), "{line}");
    succeeded(&setup.data("cache", &train, &[]));
}

#[test]
fn a_data_set_that_cannot_be_had_is_told_in_one_line() {
    let none = Faults::default;
    let set = |more: &Value| {
        let mut set = json!({"path": DATA, "type": "tokenized"});
        set.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!([set])
    };
    let cases: [(&str, Faults, Value, i32, &[&str]); 7] = [
        (
            "absent",
            Faults { status: 404, ..none() },
            json!({}),
            2,
            &["no such file or folder here, and no such data set on http", "needs HF_TOKEN"],
        ),
        (
            "gated",
            Faults { gated: true, ..none() },
            json!({}),
            2,
            &["accept its terms at http", "/datasets/"],
        ),
        (
            "a revision",
            none(),
            json!({"path": format!("{DATA}@v9")}),
            2,
            &["has the data set, but no revision v9"],
        ),
        (
            "a split",
            none(),
            json!({"split": "dev"}),
            2,
            &["no split dev; set split to one of: train, test, all"],
        ),
        (
            "a configuration",
            none(),
            json!({"name": "x"}),
            2,
            &["no configuration x; set name to one of: main, other"],
        ),
        ("images", none(), json!({"name": "other"}), 2, &["no file of rows", "it has data/"]),
        (
            "a name of a file's",
            none(),
            json!({"path": "rows.jsonl", "name": "x"}),
            2,
            &["rows.jsonl: a path here, which has no configurations; remove name: x"],
        ),
    ];
    std::thread::scope(|scope| {
        for (name, faults, more, code, words) in &cases {
            scope.spawn(move || {
                let setup = Setup::new(faults.clone());
                let line = failed(&setup.data("cache", &set(more), &[]), *code);
                for word in *words {
                    assert!(line.contains(word), "{name}: {word}: {line}");
                }
            });
        }
    });
}

/// Cases: the files of a data set, its README.md, and the configuration that is asked for.
fn cases() -> Value {
    let by_language = |more: &str| {
        format!(
            "---\nconfigs:\n- config_name: en\n  data_dir: en\n- config_name: de\n  data_dir: ./de/\n{more}---\n"
        )
    };
    let lists = "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/train*\n  - split: test\n\
                 \x20   path: [en/test*, en/more/*]\n- config_name: de\n  default: true\n  data_files: de/*\n---\ntext\n";
    let deep = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/**/*.parquet\n---\n";
    let absent = "---\nconfigs:\n- config_name: en\n  data_files: none.csv\n---\n";
    let languages = ["en/train-1.parquet", "en/test-1.parquet", "en/more/t.parquet", "de/train-1.parquet"];
    fn case(files: &[&str], readme: Option<&str>, name: Option<&str>) -> Value {
        json!({"files": files, "readme": readme, "name": name})
    }
    json!([
        case(
            &[
                "data/train-00001-of-00002.parquet",
                "data/train-00000-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
                "data/more-00000-of-00001.parquet",
                "other.csv"
            ],
            None,
            None
        ),
        case(&["train.parquet", "data/train-00000-of-00001-abc.parquet"], None, None),
        case(&["train.jsonl", "test.jsonl", "valid.jsonl"], None, None),
        case(&["rows.json", "more/rows.json", ".hidden/x.json", "__special__/y.json"], None, None),
        case(&["rows.json", "config.json", "dataset_info.json"], None, None),
        case(&["train/a.csv", "train/b.csv", "eval/a.csv"], None, None),
        case(
            &["d/train/0.csv", "d/train-2/0.csv", "d/my_train/1.csv", "d/test/0.csv", "d/0.csv"],
            None,
            None
        ),
        case(&["my-training-set.jsonl", "dev_1.jsonl", "pretrain.jsonl"], None, None),
        case(
            &["default-train.jsonl.zst", "default_test.jsonl.zst", "trainer.json"],
            Some("# no head\n"),
            None
        ),
        case(&["a.csv", "b.json", "c.json", "d.jsonl.gz"], None, None),
        case(&["x.csv", "y.json"], None, None),
        case(&["x.txt", "y.tsv"], None, None),
        case(&["notes.doc"], None, None),
        case(&languages, Some(lists), None),
        case(&languages, Some(lists), Some("en")),
        case(&languages, Some(lists), Some("fr")),
        case(&languages, Some(&by_language("")), None),
        case(&languages, Some(&by_language("")), Some("de")),
        case(&languages, Some(&by_language("  default: true\n")), None),
        case(&["data/b/2.parquet", "data/a/1.parquet", "data/1.parquet"], Some(deep), None),
        case(&["train.csv"], Some(absent), None),
    ])
}

/// Also finds what we have downloaded by huggingface_hub.
#[test]
fn python_datasets_chooses_the_same_files() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle/data_sets.py");
    let mut command = Command::new(python());
    command.arg(script).env("HF_HUB_OFFLINE", "1").stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(cases().to_string().as_bytes()).unwrap();
    let answered = child.wait_with_output().unwrap();
    let answers: Value = serde_json::from_slice(&answered.stdout).unwrap();
    let cases = cases();
    assert_eq!(cases.as_array().unwrap().len(), answers.as_array().unwrap().len());
    for (case, theirs) in cases.as_array().unwrap().iter().zip(answers.as_array().unwrap()) {
        let mut files: Vec<String> = serde_json::from_value(case["files"].clone()).unwrap();
        files.extend(case["readme"].is_string().then(|| "README.md".to_owned()));
        let subset = |split: Option<&str>| Subset {
            name: case["name"].as_str().map(str::to_owned),
            split: split.map(str::to_owned),
        };
        let ours = |split| choose(&files, case["readme"].as_str(), &subset(split));
        let Some(splits) = theirs.as_object() else {
            assert!(ours(None).is_err(), "{case}: {:?}", ours(None));
            continue;
        };
        for (split, theirs) in splits {
            let theirs: Vec<String> = serde_json::from_value(theirs.clone()).unwrap();
            assert_eq!(ours(Some(split)).unwrap(), theirs, "{case}: {split}");
        }
        let told = ours(Some("none")).unwrap_err().to_string();
        let names: Vec<&str> = splits.keys().map(String::as_str).collect();
        assert!(told.ends_with(&format!("set split to one of: {}", names.join(", "))), "{told}");
    }

    let setup = Setup::new(Faults::default());
    succeeded(&setup.data("ours", &json!([{"path": DATA, "type": "tokenized"}]), &[]));
    let code = format!(
        "from huggingface_hub import snapshot_download as s, scan_cache_dir as c; print(s({DATA:?}, \
         repo_type='dataset', local_files_only=True)); assert not c().warnings, c().warnings"
    );
    let mut command = Command::new(python());
    with_hub(&mut command, &setup.hub.endpoint, &setup.run.at("ours"));
    let output = command.args(["-c", &code]).output().unwrap();
    succeeded(&output);
    let found = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    assert_eq!(found, setup.snapshot_of_data("ours"));
}
