//! Models and data sets by hub id: downloaded once, checked, found again by us and by Python's huggingface_hub; and
//! mistakes in one line. The hub is a server in this process.

mod data_sets;
mod server;

use crate::common::{failed, python, ranks_of, succeeded, tiny::TinyRun};
use serde_json::{Value, json};
use server::{COMMIT, Faults, Hub, LARGE, NAME};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use xorl_dist::{config::BaseFiles, model::hf_config::HfModel, weights::RandomSource};

/// A run whose base is [`NAME`], the hub that has it, and a cache.
struct Setup {
    run: TinyRun,
    hub: Hub,
}

impl Setup {
    fn new(faults: Faults) -> Self {
        let run = TinyRun::new();
        let hf = HfModel::open(&run.at("config.json")).unwrap();
        let source = RandomSource::new(hf.spec.tensors(), hf.spec.initializer_range, 3);
        let config = run.at("config.json");
        fs::create_dir(run.at("base")).unwrap();
        let files = BaseFiles { weights: None, tokenizer: config.clone(), config };
        files.write(&run.at("base"), None, &source).unwrap();
        let model = run.at("base/model");
        let mut files: Vec<(String, Vec<u8>)> = fs::read_dir(&model)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap()))
            .collect();
        for (name, text) in [
            ("generation_config.json", "{}"),
            ("vocab.json", ""),
            ("README.md", "no part of it"),
            ("pytorch_model.bin", "a pickle"),
            ("consolidated.safetensors", "a duplicate"),
            ("onnx/model.onnx", "another format"),
        ] {
            files.push((name.into(), text.into()));
        }
        let text = fs::read_to_string(run.at("run.yaml")).unwrap();
        let line = format!("config_path: {}", run.at("").display().to_string().trim_end_matches('/'));
        fs::write(run.at("run.yaml"), text.replacen(&line, &format!("model_path: {NAME}"), 1)).unwrap();
        let hub = Hub::start(files, data_set(&run), faults);
        Self { run, hub }
    }

    /// `xorl-dist` with this hub and the cache `cache`.
    fn command(&self, ranks: usize, cache: &str, arguments: &[&str]) -> Command {
        let mut command = ranks_of(Path::new(env!("CARGO_BIN_EXE_xorl-dist")), ranks);
        command.args(arguments).current_dir(self.run.at(""));
        with_hub(&mut command, &self.hub.endpoint, &self.run.at(cache));
        command
    }

    fn check(&self, cache: &str, more: &[&str]) -> Output {
        let config = self.run.at("run.yaml").display().to_string();
        let arguments = [&["check", "--config", &config], more].concat();
        self.command(1, cache, &arguments).output().unwrap()
    }

    fn folder(&self, cache: &str) -> PathBuf {
        self.run.at(cache).join("hub").join(format!("models--{}", NAME.replace('/', "--")))
    }

    fn snapshot(&self, cache: &str) -> PathBuf {
        self.folder(cache).join("snapshots").join(COMMIT)
    }

    /// Files that were sent, in the order of their names.
    fn sent(&self) -> Vec<String> {
        let mut sent: Vec<String> =
            self.hub.requests().into_iter().filter(|line| line.starts_with("GET /tiny")).collect();
        sent.iter_mut().for_each(|line| *line = line.rsplit('/').next().unwrap().to_owned());
        sent.sort_unstable();
        sent
    }
}

/// Files of a data set whose split `train` has the rows of `run`.
fn data_set(run: &TinyRun) -> Vec<(String, Vec<u8>)> {
    let text = fs::read_to_string(run.at("rows.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let (first, last) = lines.split_at(lines.len() / 2);
    let readme = "---\nlicense: mit\nconfigs:\n- config_name: main\n  default: true\n  data_files:\n  - split: train\n    \
                  path: data/train-*\n  - split: test\n    path: data/test-*\n  - split: all\n    path: data/*.jsonl\n\
                  - config_name: other\n  data_files: data/*.png\n---\n# Rows\n";
    let files = [
        ("README.md", readme.to_owned()),
        ("data/train-00000-of-00002.jsonl", first.join("\n")),
        ("data/train-00001-of-00002.jsonl", last.join("\n")),
        ("data/test-00000-of-00001.jsonl", lines[0].to_owned()),
        ("data/picture.png", "no rows".to_owned()),
    ];
    files.map(|(name, text)| (name.to_owned(), text.into_bytes())).into()
}

/// Has `command` use the hub at `endpoint` and the cache below `home`.
fn with_hub(command: &mut Command, endpoint: &str, home: &Path) {
    for name in [
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_TOKEN",
        "HF_TOKEN_PATH",
    ] {
        command.env_remove(name);
    }
    for name in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home).env("HF_HUB_DISABLE_TELEMETRY", "1");
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const WANTED: [&str; 4] = ["config.json", "generation_config.json", LARGE, "vocab.json"];

#[test]
fn a_model_is_downloaded_once_and_then_found() {
    let setup = Setup::new(Faults::default());
    let first = setup.check("cache", &[]);
    succeeded(&first);
    // An empty file needs no request.
    assert_eq!(setup.sent(), ["config.json", "generation_config.json", LARGE]);
    let snapshot = setup.snapshot("cache");
    for name in WANTED {
        let link = fs::read_link(snapshot.join(name)).unwrap();
        assert!(link.starts_with("../../blobs"), "{}", link.display());
    }
    assert_eq!(fs::read_dir(&snapshot).unwrap().count(), WANTED.len());
    assert_eq!(
        fs::read(snapshot.join(LARGE)).unwrap(),
        fs::read(setup.run.at("base/model").join(LARGE)).unwrap()
    );
    assert_eq!(fs::read_to_string(setup.folder("cache").join("refs/main")).unwrap(), COMMIT);
    assert!(stderr(&first).contains(&format!("downloading {NAME}: ")), "{}", stderr(&first));
    assert!(!stderr(&first).contains('\r'), "no bar where there is no terminal");

    // Found by branch, with one request; by commit and offline, with none; with a hub that is gone, with a warning.
    setup.hub.forget();
    succeeded(&setup.check("cache", &[]));
    assert_eq!(setup.hub.requests(), [format!("GET /api/models/{NAME}/revision/main")]);
    setup.hub.forget();
    succeeded(&setup.check("cache", &["--model.revision", COMMIT]));
    succeeded(&setup.check("cache", &["--model.model_path", &format!("{NAME}@{COMMIT}")]));
    let config = setup.run.at("run.yaml").display().to_string();
    let mut offline = setup.command(1, "cache", &["check", "--config", &config]);
    succeeded(&offline.env("HF_HUB_OFFLINE", "1").output().unwrap());
    assert_eq!(setup.hub.requests(), [""; 0]);
    let mut away = setup.command(1, "cache", &["check", "--config", &config]);
    let found = away.env("HF_ENDPOINT", "http://127.0.0.1:1").output().unwrap();
    succeeded(&found);
    assert!(stderr(&found).contains("is used as the cache has it"), "{}", stderr(&found));

    // A folder of that name wins.
    setup.hub.forget();
    fs::create_dir_all(setup.run.at("tiny")).unwrap();
    std::os::unix::fs::symlink(setup.run.at("base/model"), setup.run.at(NAME)).unwrap();
    succeeded(&setup.check("other", &[]));
    assert_eq!(setup.hub.requests(), [""; 0]);
}

#[test]
fn a_download_survives_what_goes_wrong_on_the_way() {
    let cases: [(&str, Faults); 6] = [
        ("cut twice", Faults { cuts: 2, ..Faults::default() }),
        ("cut, and a hub without ranges", Faults { cuts: 1, no_ranges: true, ..Faults::default() }),
        ("wrong bytes once", Faults { wrong: 1, ..Faults::default() }),
        ("unavailable at first", Faults { unavailable: 2, ..Faults::default() }),
        ("shards", Faults { shards: true, ..Faults::default() }),
        ("a model that was renamed", Faults { renamed: true, ..Faults::default() }),
    ];
    for (name, faults) in cases {
        let (cuts, is_sharded) = (faults.cuts, faults.shards);
        let no_ranges = faults.no_ranges;
        let setup = Setup::new(faults);
        let output = setup.check("cache", &[]);
        assert!(output.status.success(), "{name}: {}", stderr(&output));
        let file = if is_sharded { "model-00001-of-00001.safetensors" } else { LARGE };
        let got = fs::read(setup.snapshot("cache").join(file)).unwrap();
        assert!(got == fs::read(setup.run.at("base/model").join(LARGE)).unwrap(), "{name}");
        assert!(!setup.snapshot("cache").join("consolidated.safetensors").exists());
        let ranges = setup.hub.ranges();
        if cuts > 0 && !no_ranges {
            assert_eq!(ranges.len(), cuts, "{name}: {ranges:?}");
        }
        assert!(
            fs::read_dir(setup.folder("cache").join("blobs"))
                .unwrap()
                .all(|entry| { !entry.unwrap().file_name().to_str().unwrap().ends_with(".incomplete") })
        );
    }
}

#[test]
fn a_download_that_was_broken_off_goes_on_where_it_ended() {
    let setup = Setup::new(Faults { cuts: 1, then_unavailable: true, ..Faults::default() });
    let line = failed(&setup.check("cache", &[]), 1);
    assert!(line.contains("run.yaml:2: model.model_path: tiny/model: http"), "{line}");
    assert!(line.ends_with("the hub answers 503; try again later"), "{line}");
    setup.hub.heal();
    setup.hub.forget();
    succeeded(&setup.check("cache", &[]));
    assert_eq!(setup.sent(), [LARGE]);
    let ranges = setup.hub.ranges();
    assert!(ranges.len() == 1 && ranges[0] > 0, "{ranges:?}");
    // Another process's bytes, of the right length and wrong, are not taken.
    let setup = Setup::new(Faults::default());
    let etag = setup.hub.etag(LARGE);
    let blobs = setup.folder("cache").join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{etag}.incomplete")), vec![7; 1000]).unwrap();
    succeeded(&setup.check("cache", &[]));
    assert_eq!(setup.hub.ranges(), [1000]);
}

#[test]
fn what_cannot_be_had_is_told_in_one_line() {
    type Case<'a> = (&'a str, Faults, &'a [&'a str], &'a [(&'a str, &'a str)], i32, &'a [&'a str]);
    let none = Faults::default;
    let cases: &[Case<'_>] = &[
        ("absent", Faults { status: 404, ..none() }, &[], &[], 2, &["no such model on http", "HF_TOKEN"]),
        (
            "not admitted",
            Faults { status: 401, ..none() },
            &[],
            &[],
            2,
            &["or a private one", "needs HF_TOKEN"],
        ),
        (
            "not admitted with a token",
            Faults { status: 404, ..none() },
            &[],
            &[("HF_TOKEN", "hf_x")],
            2,
            &["a token that may read it"],
        ),
        ("a revision", none(), &["--model.revision", "v9"], &[], 2, &["no revision v9"]),
        (
            "gated",
            Faults { gated: true, ..none() },
            &[],
            &[],
            2,
            &["is gated: accept its terms at http", "set HF_TOKEN"],
        ),
        (
            "gated with a token",
            Faults { gated: true, ..none() },
            &[],
            &[("HF_TOKEN", "hf_x")],
            2,
            &["accept its terms", "token of that account in HF_TOKEN"],
        ),
        (
            "a bad token",
            Faults { token: true, ..none() },
            &[],
            &[("HF_TOKEN", "hf_x")],
            2,
            &["renew HF_TOKEN"],
        ),
        (
            "no weights",
            Faults { no_weights: true, ..none() },
            &[],
            &[],
            2,
            &["no safetensors", "pytorch_model.bin"],
        ),
        (
            "wrong bytes",
            Faults { wrong: 9, ..none() },
            &[],
            &[],
            1,
            &["expected a file with sha256", "it was not kept"],
        ),
        (
            "no hub",
            none(),
            &[],
            &[("HF_ENDPOINT", "http://127.0.0.1:1")],
            1,
            &["no such folder here, and as a hub id", "check the network", "HF_HUB_OFFLINE=1"],
        ),
        ("another server", Faults { html: true, ..none() }, &[], &[], 1, &["HF_ENDPOINT has to name a hub"]),
        (
            "offline",
            none(),
            &[],
            &[("HF_HUB_OFFLINE", "1")],
            2,
            &["no such model in the cache", "unset HF_HUB_OFFLINE"],
        ),
    ];
    std::thread::scope(|scope| {
        for (name, faults, more, environment, code, words) in cases {
            scope.spawn(move || {
                let setup = Setup::new(faults.clone());
                let config = setup.run.at("run.yaml").display().to_string();
                let mut command =
                    setup.command(1, "cache", &[&["check", "--config", &config], *more].concat());
                let output = command.envs(environment.iter().copied()).output().unwrap();
                let line = failed(&output, *code);
                assert!(line.contains(&format!("run.yaml:2: model.model_path: {NAME}")), "{name}: {line}");
                for word in *words {
                    assert!(line.contains(word), "{name}: {word}: {line}");
                }
                assert!(!setup.snapshot("cache").join(LARGE).exists(), "{name}");
            });
        }
    });
    // Other commands name their own place.
    let setup = Setup::new(Faults { status: 404, ..none() });
    let output = setup.command(1, "cache", &["generate", "--model", NAME, "--prompt", "a"]).output().unwrap();
    assert!(
        failed(&output, 2)
            .starts_with(&format!("error: --model: {NAME}: no such folder here, and no such model"))
    );
    fs::write(setup.run.at("server.yaml"), format!("model_path: {NAME}\noutput_dir: o\n")).unwrap();
    let output = setup.command(1, "cache", &["serve", "--config", "server.yaml"]).output().unwrap();
    assert!(
        failed(&output, 2)
            .starts_with(&format!("error: server.yaml:1: model_path: {NAME}: no such folder here"))
    );
    // A revision of a folder, and one that is named twice.
    let line =
        failed(&setup.check("cache", &["--model.model_path", "base/model", "--model.revision", "v1"]), 2);
    assert!(line.contains("--model.revision: base/model: a path here, which has no revisions"), "{line}");
    let line = failed(&setup.check("cache", &["--model.model_path", "a/b@v2", "--model.revision", "v1"]), 2);
    assert!(line.contains("a/b@v2 names a revision, too"), "{line}");
}

/// Also the adapter's way back to its base, merged by two ranks.
#[test]
fn mpi_two_ranks_ask_for_each_file_once() {
    let setup = Setup::new(Faults::default());
    let config = setup.run.at("run.yaml").display().to_string();
    let revision = ["--model.revision", "main"];
    let short = [
        "--config",
        &config,
        "--train.max_steps",
        "2",
        "--train.save_steps",
        "2",
        "--train.output_dir",
        "out",
        "--data.datasets",
        r#"[{"path": "tiny/rows", "type": "tokenized"}]"#,
    ];
    let output = setup.command(2, "cache", &[&short[..], &revision].concat()).output().unwrap();
    succeeded(&output);
    assert_eq!(setup.sent(), ["config.json", "generation_config.json", LARGE]);
    let asked = setup.hub.requests();
    assert_eq!(asked.iter().filter(|line| line.contains("/api/")).count(), 2, "{asked:?}");
    assert_eq!(asked.iter().filter(|line| line.starts_with("GET /datasets/")).count(), 3, "{asked:?}");
    let step = setup.run.at("out/weights/run/step_2");
    let adapter: Value =
        serde_json::from_slice(&fs::read(step.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&adapter["base_model_name_or_path"], &adapter["revision"]), (&json!(NAME), &json!("main")));

    setup.hub.forget();
    let adapter = step.display().to_string();
    let output =
        setup.command(2, "second", &["merge", "--adapter", &adapter, "--out", "merged"]).output().unwrap();
    succeeded(&output);
    assert_eq!(setup.sent(), ["config.json", "generation_config.json", LARGE]);
    assert!(
        setup.run.at("merged/model.safetensors").is_file() && setup.run.at("merged/config.json").is_file()
    );

    // One rank meets the fault, and both end.
    let absent = Setup::new(Faults { status: 404, ..Faults::default() });
    let config = absent.run.at("run.yaml").display().to_string();
    let line = failed(&absent.command(2, "cache", &["--config", &config]).output().unwrap(), 2);
    assert!(line.contains("no such model on http"), "{line}");
    assert_eq!(absent.hub.requests().len(), 1);
}

#[test]
fn python_and_we_read_each_others_cache() {
    let setup = Setup::new(Faults::default());
    succeeded(&setup.check("ours", &[]));
    let snapshot = |cache: &str, local: &str| {
        let code = format!(
            "from huggingface_hub import snapshot_download as s; print(s({NAME:?}, allow_patterns=['*.json', \
             'model.safetensors'], local_files_only={local}))"
        );
        let mut command = Command::new(python());
        with_hub(&mut command, &setup.hub.endpoint, &setup.run.at(cache));
        let output = command.args(["-c", &code]).output().unwrap();
        succeeded(&output);
        PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
    };
    assert_eq!(snapshot("ours", "True"), setup.snapshot("ours"));
    // What Python finds in our cache it does not ask for again.
    setup.hub.forget();
    assert_eq!(snapshot("ours", "False"), setup.snapshot("ours"));
    assert_eq!(setup.sent(), [""; 0]);
    // And we in its own.
    assert_eq!(snapshot("pythons", "False"), setup.snapshot("pythons"));
    setup.hub.forget();
    let config = setup.run.at("run.yaml").display().to_string();
    let mut command = setup.command(1, "pythons", &["check", "--config", &config]);
    succeeded(&command.env("HF_HUB_OFFLINE", "1").output().unwrap());
    succeeded(&setup.check("pythons", &[]));
    assert_eq!(setup.sent(), [""; 0]);
}
