//! The command line: what is named and what is not there.

use super::{Case, case};

pub const CASES: &[Case] = &[
    case("no command", &["no run was named", "xorl-dist --config run.yaml"], |_| {}).of(&[]),
    case(
        "a run without --config",
        &["unrecognized subcommand 'run.yaml'", "write --config run.yaml"],
        |_| {},
    )
    .of(&["run.yaml"]),
    case(
        "a flag that is misspelt",
        &["--train.max_step:", "unknown field", "did you mean train.max_steps?"],
        |_| {},
    )
    .of(&["--config", "run.yaml", "--train.max_step", "3"]),
    case("a GPU by its number", &["'cuda:1'", "'--device <DEVICE>'", "write --device cuda"], |_| {})
        .of(&["--config", "run.yaml", "--device", "cuda:1"]),
    case(
        "a run of a server's file",
        &["server.yaml is of a server, not of a run", "xorl-dist serve --config server.yaml"],
        |w| w.server(""),
    )
    .of(&["--config", "server.yaml"]),
    case("check of a server's file with a mistake", &["server.yaml is of a server, not of a run"], |w| {
        w.server("model_ids: [a]\nmax_seq_len: 7")
    })
    .of(&["check", "--config", "server.yaml"]),
    case(
        "a server of a run's file",
        &["run.yaml is of a run, not of a server", "xorl-dist --config run.yaml"],
        |_| {},
    )
    .of(&["serve", "--config", "run.yaml"]),
    case(
        "check of a server",
        &["server.yaml is of a server, not of a run", "xorl-dist serve --config server.yaml"],
        |w| w.server(""),
    )
    .of(&["check", "--config", "server.yaml"]),
    case(
        "generate without a prompt",
        &["required arguments were not provided", "--chat <TEXT>|--prompt <TEXT>"],
        |_| {},
    )
    .of(&["generate", "--model", "model"]),
    case(
        "generate without a tokenizer",
        &["model: no tokenizer.json", "copy it here with tokenizer_config.json"],
        |_| {},
    )
    .of(&["generate", "--model", "model", "--prompt", "a"]),
    case(
        "generate with the address of a model's page",
        &["https://huggingface.co/a/b: an address", "name it by its hub id, a/b"],
        |_| {},
    )
    .of(&["generate", "--model", "https://huggingface.co/a/b", "--prompt", "a"]),
    case(
        "generate with a model that is not there",
        &["modle: no such folder", "expected an HF model directory"],
        |_| {},
    )
    .of(&["generate", "--model", "modle", "--prompt", "a"]),
    case(
        "generate with an adapter that is none",
        &["model: expected a PEFT adapter (adapter_config.json) or the steps of a run, found neither"],
        |_| {},
    )
    .of(&["generate", "--adapter", "model", "--prompt", "a"]),
    case(
        "generate with a base that has moved",
        &[
            "step_1/adapter_config.json: base_model_name_or_path is model",
            "no folder here",
            "give --model DIR",
        ],
        |w| {
            w.trained();
            w.rename("model", "moved");
        },
    )
    .of(&["generate", "--adapter", "out", "--prompt", "a"]),
    case(
        "generate with one of two runs",
        &["out: several runs are in it", "name one of out/weights/run, out/weights/second"],
        |w| {
            w.trained();
            w.copy("out/weights/run", "out/weights/second");
        },
    )
    .of(&["generate", "--adapter", "out", "--prompt", "a"]),
    case(
        "merge into a folder that is there",
        &["model exists already", "nothing is replaced", "give another --out"],
        |w| w.trained(),
    )
    .of(&["merge", "--adapter", "out", "--out", "model"]),
    case(
        "merge onto another base",
        &["step_1 was trained on another base than model", "--onto original"],
        |w| {
            w.trained();
            w.change_base();
        },
    )
    .of(&["merge", "--adapter", "out"]),
    case("eval of a type that is none", &["--type: expected auto, tokenized", "got \"chats\""], |_| {})
        .of(&["eval", "--model", "model", "--data", "rows.jsonl", "--type", "chats"]),
    case("eval of a column that no type reads", &["--columns: ids is no field of a type"], |_| {}).of(&[
        "eval",
        "--model",
        "model",
        "--data",
        "rows.jsonl",
        "--columns",
        "ids=input_ids",
    ]),
    case("eval of a column with two names", &["--columns: labels has two names"], |_| {}).of(&[
        "eval",
        "--model",
        "model",
        "--data",
        "rows.jsonl",
        "--columns",
        "labels=a",
        "labels=b",
    ]),
    case("eval of a column without a name", &["--columns", "must be FIELD=NAME, as prompt=question"], |_| {})
        .of(&["eval", "--model", "model", "--data", "rows.jsonl", "--columns", "labels"]),
    case(
        "eval of a file whose name is misspelt",
        &["--data: row.jsonl: no such file or folder", "did you mean rows.jsonl?"],
        |_| {},
    )
    .of(&["eval", "--model", "model", "--data", "row.jsonl"]),
    case("eval of nothing", &["give --config, --model or --adapter"], |_| {}).of(&["eval"]),
    case(
        "eval of a run that validates nothing",
        &[
            "run.yaml:3: data: nothing to evaluate on",
            "set data.test_datasets or data.val_set_size, or give --data FILE",
        ],
        |_| {},
    )
    .of(&["eval", "--config", "run.yaml"]),
    case(
        "eval of rows of no type",
        &[
            "t.jsonl:1: no type fits a row of `q`, `a`",
            "name other fields by columns: {prompt: q, completion: a}",
        ],
        |w| w.write("t.jsonl", r#"{"q": "a", "a": "b"}"#),
    )
    .of(&["eval", "--model", "model", "--data", "t.jsonl"]),
    case("a run's file that is not there", &["nocfg.yaml:", "--config names a .yaml"], |_| {}).of(&[
        "check",
        "--config",
        "nocfg.yaml",
    ]),
    case("a field without its section", &["'--lr'", "fields of run.yaml are written --train.lr"], |_| {})
        .of(&["check", "--config", "run.yaml", "--lr", "1e-4"]),
    case("a run's field for a command that reads no run", &["'--lr'", "(see --help)"], |_| {})
        .of(&["runs", "--lr", "1e-4"]),
    case("generate of nothing", &["give --model or --adapter"], |_| {}).of(&["generate", "--prompt", "a"]),
    case("verify of nothing", &["nowhere: no such folder", "expected a step"], |_| {})
        .of(&["verify", "nowhere"]),
    case("verify of a file", &["run.yaml: a file; expected a step"], |_| {}).of(&["verify", "run.yaml"]),
    case(
        "a list on the command line with a mistake in it",
        &["--data.datasets[0].typ:", "unknown field", "did you mean type?"],
        |_| {},
    )
    .of(&["check", "--config", "run.yaml", "--data.datasets", "[{path: rows.jsonl, typ: tokenized}]"]),
    case(
        "report of a folder without runs",
        &["model: no run is in it", "expected metrics.jsonl, or weights/RUN_ID/step_N"],
        |_| {},
    )
    .of(&["report", "model"]),
];
