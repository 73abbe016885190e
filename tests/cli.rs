//! The command line as a user meets it: what parses to what, what is refused, and the frozen help.

use std::path::Path;
use std::process::{Command as Process, Output};
use xorl_dist::cli::{
    self, Command, Common, Invocation,
    check::Check,
    eval::Eval,
    generate::{DtypeChoice, Generate, Prompt, Sampling},
    merge::{Merge, MergedDtype, Onto},
    serve::Serve,
    train::Train,
};
use xorl_dist::config::Override;
use xorl_dist::device::DeviceChoice;
use xorl_dist::dtype::DType;
use xorl_dist::infer::{Prompts, Request, request::Choice};

fn parse(line: &str) -> Result<Invocation, String> {
    cli::parse(line.split_whitespace()).map_err(|error| error.to_string())
}

fn given(field: &str, values: &[&str]) -> Override {
    Override { field: field.into(), values: values.iter().map(|value| value.to_string()).collect() }
}

fn train(overrides: Vec<Override>, device: DeviceChoice) -> Invocation {
    let common = Common { overrides, device, debug: false };
    Invocation::Command(Command::Train(Box::new(Train { config: "run.yaml".into(), dry_run: false })), common)
}

fn check(ranks: Option<usize>, overrides: Vec<Override>, device: DeviceChoice) -> Invocation {
    let common = Common { overrides, device, debug: false };
    Invocation::Command(
        Command::Check(Box::new(Check { config: "run.yaml".into(), ranks, show_samples: None })),
        common,
    )
}

#[test]
fn train_is_the_default_command() {
    let expected = train(vec![], DeviceChoice::Auto);
    for line in ["--config run.yaml", "train --config run.yaml", "--config=run.yaml"] {
        assert_eq!(parse(line).as_ref(), Ok(&expected), "{line}");
    }
    for line in ["--device cpu check --config run.yaml", "check --config run.yaml --device cpu"] {
        assert_eq!(parse(line), Ok(check(None, vec![], DeviceChoice::Cpu)), "{line}");
    }
}

#[test]
fn a_dry_run_is_one_of_train_alone() {
    for line in ["--config run.yaml --dry-run", "train --dry-run --config run.yaml"] {
        let Ok(Invocation::Command(Command::Train(train), _)) = parse(line) else { panic!("{line}") };
        assert_eq!(*train, Train { config: "run.yaml".into(), dry_run: true });
    }
    for line in ["--dry-run", "check --config run.yaml --dry-run", "generate --model m --chat a --dry-run"] {
        assert!(parse(line).is_err(), "{line}");
    }
}

#[test]
fn overrides_are_taken_wherever_they_stand() {
    let overrides = vec![
        given("train.lr", &["1e-4"]),
        given("lora.lora_target_modules", &["q_proj", "o_proj"]),
        given("train.overwrite", &[]),
        given("train.data_parallel_shard_size", &["-1"]),
        given("train.run_id", &["a=b"]),
    ];
    let line = "--train.lr 1e-4 --lora.lora_target_modules q_proj o_proj --config run.yaml --train.overwrite \
                --device cuda --train.data_parallel_shard_size -1 --train.run_id=a=b";
    assert_eq!(parse(line), Ok(train(overrides.clone(), DeviceChoice::Cuda)));
    assert_eq!(parse(&format!("check --ranks 8 {line}")), Ok(check(Some(8), overrides, DeviceChoice::Cuda)));
    let empty = cli::parse(["--config", "run.yaml", "--train.max_steps", ""]).unwrap();
    assert_eq!(empty, train(vec![given("train.max_steps", &[""])], DeviceChoice::Auto));
    let equals = parse("--config run.yaml --train.max_steps=").unwrap();
    assert_eq!(equals, empty);
    // The name of a command that takes no fields, as a value.
    let named = train(vec![given("train.run_id", &["generate"])], DeviceChoice::Auto);
    assert_eq!(parse("--train.run_id generate --config run.yaml"), Ok(named));
}

#[test]
fn serve_takes_fields_of_a_server() {
    let overrides = vec![given("server.api_port", &["0"]), given("server.model_ids", &["a", "b"])];
    let common = Common { overrides, device: DeviceChoice::Cpu, debug: false };
    let expected =
        Invocation::Command(Command::Serve(Box::new(Serve { config: "server.yaml".into() })), common);
    let line = "serve --config server.yaml --server.api_port 0 --device cpu --server.model_ids a b";
    assert_eq!(parse(line), Ok(expected));
    let Ok(Invocation::Help(help)) = parse("serve --help") else { panic!("no help") };
    for (section, field) in xorl_dist::config::server_schema() {
        assert!(help.contains(&format!("--{section}.{} <{}>", field.key, field.type_name)), "{}", field.key);
    }
    assert!(!help.contains("--train.lr"));
}

#[test]
fn generate_takes_a_chat_or_a_prompt() {
    let plain = Generate {
        model: Some("m".into()),
        adapter: None,
        prompt: Prompt { prompt: Some("hi".into()), ..Prompt::default() },
        system: None,
        out: None,
        max_new_tokens: 128,
        sampling: Sampling::default(),
        stop: vec![],
        dtype: DtypeChoice::Auto,
    };
    let parsed = |words: &[&str]| match cli::parse(words).unwrap() {
        Invocation::Command(Command::Generate(generate), common) if common.overrides.is_empty() => {
            (*generate, common.device)
        }
        other => panic!("{other:?}"),
    };
    let words = |line: &'static str| line.split_whitespace().collect::<Vec<_>>();
    assert_eq!(parsed(&words("generate --model m --prompt hi")), (plain.clone(), DeviceChoice::Auto));
    let request = Request {
        model_dir: Some("m".into()),
        adapter_dir: None,
        prompts: Prompts::Text("hi".into()),
        system: None,
        max_new_tokens: 128,
        choice: Choice { temperature: 0.0, top_p: 1.0, top_k: None },
        seed: 0,
        stop: vec![],
        compute: None,
    };
    assert_eq!(plain.request(), request);
    let line =
        ["generate", "--model", "m", "--adapter", "a", "--chat", "--train.lr is what?", "--device", "cpu"];
    let more = ["--max-new-tokens", "5", "--dtype", "bfloat16"];
    let (generate, device) = parsed(&[&line[..], &more].concat());
    let expected = Request {
        adapter_dir: Some("a".into()),
        prompts: Prompts::Chat("--train.lr is what?".into()),
        max_new_tokens: 5,
        compute: Some(DType::Bf16),
        ..request.clone()
    };
    assert_eq!((generate.request(), device), (expected, DeviceChoice::Cpu));
    let (generate, _) = parsed(&words("generate --adapter a --prompt hi"));
    let expected = Request { model_dir: None, adapter_dir: Some("a".into()), ..request.clone() };
    assert_eq!(generate.request(), expected);
    let line = "generate --model m --interactive --system s --temperature 0.7 --top-p 0.9 --top-k 5 --seed 3 --stop a --stop b";
    let expected = Request {
        prompts: Prompts::Interactive,
        system: Some("s".into()),
        choice: Choice { temperature: 0.7, top_p: 0.9, top_k: Some(5) },
        seed: 3,
        stop: vec!["a".into(), "b".into()],
        ..request.clone()
    };
    assert_eq!(parsed(&words(line)).0.request(), expected);
    let chats = words("generate --model m --chat-file c.jsonl");
    for (more, out) in [("", None), ("--out o.jsonl", Some("o.jsonl".into()))] {
        let expected = Request { prompts: Prompts::File { chats: "c.jsonl".into(), out }, ..request.clone() };
        let (generate, device) = parsed(&[&chats[..], &words(more)].concat());
        assert_eq!((generate.request(), device), (expected, DeviceChoice::Auto));
    }
}

#[test]
fn merge_takes_an_adapter_and_what_it_is_added_to() {
    let plain =
        Merge { model: None, adapter: "a".into(), out: None, dtype: MergedDtype::Base, onto: Onto::Trained };
    let parsed = |line| match parse(line).unwrap() {
        Invocation::Command(Command::Merge(merge), _) => *merge,
        other => panic!("{other:?}"),
    };
    assert_eq!(parsed("merge --adapter a"), plain);
    let all = Merge {
        model: Some("m".into()),
        out: Some("o".into()),
        dtype: MergedDtype::Bfloat16,
        onto: Onto::Original,
        ..plain
    };
    assert_eq!(parsed("merge --adapter a --model m --out o --dtype bfloat16 --onto original"), all);
}

#[test]
fn eval_takes_a_run_or_a_model_and_data() {
    let parsed = |line| match parse(line).unwrap() {
        Invocation::Command(Command::Eval(eval), common) => (*eval, common.overrides),
        other => panic!("{other:?}"),
    };
    let plain = Eval { config: Some("run.yaml".into()), ..Eval::default() };
    let overrides = vec![given("train.micro_batch_size", &["4"])];
    assert_eq!(parsed("eval --config run.yaml --train.micro_batch_size 4"), (plain, overrides));
    let all = Eval {
        model: Some("m".into()),
        adapter: Some("a".into()),
        data: Some("d.jsonl".into()),
        kind: Some("chat".into()),
        exact_match: true,
        json: true,
        dtype: DtypeChoice::Float32,
        ..Eval::default()
    };
    let line = "eval --model m --adapter a --data d.jsonl --type chat --exact-match --json --dtype float32";
    assert_eq!(parsed(line), (all, vec![]));
}

#[test]
fn what_is_no_command_is_refused_in_one_line() {
    for (line, words) in [
        ("", "no run was named"),
        ("train", "--config <FILE>"),
        ("serve", "--config <FILE>"),
        ("run.yaml", "write --config run.yaml"),
        ("train run.yaml --train.lr 1", "--config"),
        ("--config", "--config <FILE>"),
        ("--config run.yaml --lr 1", "--lr"),
        ("--config run.yaml --device tpu", "possible values: auto, cpu, cuda"),
        ("--config run.yaml --device gpu", "write --device cuda"),
        (
            "--config run.yaml --device cuda:1",
            "write --device cuda: each rank of a host takes a GPU of CUDA_VISIBLE",
        ),
        ("trian --config run.yaml", "trian"),
        ("--config run.yaml check --config run.yaml", "after the command"),
        ("generate --model m", "--chat"),
        ("generate --model m --chat a --prompt b", "cannot be used with"),
        ("generate --chat a", "--model"),
        ("generate --model m --chat a --chat-file f", "cannot be used with"),
        ("generate --model m --chat a --out o", "--chat-file"),
        ("generate --model m --chat a --interactive", "cannot be used with"),
        ("generate --model m --prompt a --system o", "--system goes with --chat or --interactive"),
        ("generate --model m --chat a --seed 1", "--seed goes with a --temperature above 0"),
        ("generate --model m --chat a --top-p 0.5", "--top-p goes with a --temperature above 0"),
        ("generate --model m --chat a --temperature -1", "at least 0"),
        ("generate --model m --chat a --temperature NaN", "at least 0"),
        ("generate --model m --chat a --temperature 1 --top-p 0", "above 0 and at most 1"),
        ("generate --model m --chat a --temperature 1 --top-k 0", "at least 1"),
        ("generate --model m --chat a --stop=", "not empty"),
        ("eval", "give --config, --model or --adapter"),
        ("eval --model m", "--data is missing"),
        ("eval --config run.yaml --type chat", "--data"),
        ("eval --config run.yaml --dtype float32", "--dtype goes without --config"),
        ("merge --model m", "--adapter <DIR>"),
        ("merge --adapter a --onto original", "--onto original goes with --model"),
        ("merge --adapter a --dtype float16", "possible values: base, float32, bfloat16"),
        ("merge --adapter a --train.lr 1", "--train.lr"),
        ("marge --adapter a", "merge"),
        ("--train.lr=1 generate --model m --chat a", "--train.lr: generate reads no configuration"),
        ("generate --model m --chat a --max-new-tokens 0", "at least 1"),
        ("check --config run.yaml --show-samples 0", "at least 1"),
        ("check --config run.yaml --ranks 1000000000000", "at most 1048576"),
        ("generate --model m --chat a --max-new-tokens 18446744073709551615", "at most 1048576"),
    ] {
        let error = parse(line).expect_err(line);
        assert!(error.contains(words), "{line:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(!error.starts_with("error"), "{error}");
    }
}

#[test]
fn help_shows_every_field() {
    let Ok(Invocation::Help(help)) = parse("--help") else { panic!("no help") };
    for (section, field) in xorl_dist::config::schema() {
        assert!(help.contains(&format!("--{section}.{} <{}>", field.key, field.type_name)), "{}", field.key);
    }
    for line in ["check --help", "train --help"] {
        let Ok(Invocation::Help(text)) = parse(line) else { panic!("{line}") };
        assert!(text.contains("--train.lr"), "{line}");
    }
    let Ok(Invocation::Help(short)) = parse("-h") else { panic!("-h") };
    assert!(!short.contains("--train.lr"));
    assert_eq!(parse("--version"), Ok(Invocation::Version));
}

/// `XORL_UPDATE_SNAPSHOTS=1` writes the snapshot anew.
#[test]
fn help_is_as_the_snapshot_says() {
    let Ok(Invocation::Help(help)) = parse("--help") else { panic!("no help") };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/help.txt");
    if std::env::var_os("XORL_UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, &help).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap();
    assert!(
        kept == help,
        "help.txt changed; if that is meant, run again with XORL_UPDATE_SNAPSHOTS=1\n{help}"
    );
}

fn xorl_dist(args: &[&str]) -> Output {
    Process::new(env!("CARGO_BIN_EXE_xorl-dist")).args(args).output().unwrap()
}

#[test]
fn wrong_input_ends_with_code_two_and_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("run.yaml");
    std::fs::write(&config, "model:\n  model_path: m\ntrain:\n  lr: fast\n").unwrap();
    let config = config.to_str().unwrap();
    for args in [vec![], vec!["--frobnicate"], vec!["run.yaml"]] {
        let output = xorl_dist(&args);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(message.starts_with("error: "), "{message}");
        assert!(output.stdout.is_empty());
    }
    assert!(Path::new(config).exists());
}

#[test]
fn version_names_the_libraries() {
    let output = xorl_dist(&["--version"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    for name in ["xorl-dist", "tch", "libtorch", "MPI", "CUDA driver", "NCCL"] {
        assert!(text.lines().any(|line| line.starts_with(name)), "{name}\n{text}");
    }
    assert!(text.contains("2.13."), "{text}");
}
