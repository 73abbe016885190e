//! `server.yaml`.

use super::{Case, SERVE, case};

pub const CASES: &[Case] = &[
    case(
        "a field of a server that is misspelt",
        &["server.yaml:3: api_prot:", "did you mean api_port?"],
        |w| w.server("api_prot: 1"),
    )
    .of(SERVE),
    case(
        "a port beyond all",
        &["server.yaml:3: api_port:", "expected a port from 0 to 65535, got 70000"],
        |w| w.server("api_port: 70000"),
    )
    .of(SERVE),
    case(
        "a server open to all",
        &["server.yaml:3: api_host: \"0.0.0.0\"", "needs api_keys_file; or leave it at 127.0.0.1"],
        |w| w.server("api_host: 0.0.0.0"),
    )
    .of(SERVE),
    case(
        "a host with its scheme",
        &["server.yaml:3: api_host:", "is not an address alone; write api_host: 127.0.0.1, and api_port: 80"],
        |w| w.server("api_host: http://127.0.0.1:80"),
    )
    .of(SERVE),
    case(
        "keys as they are",
        &[
            "server.yaml:3: api_keys_file: keys:1:",
            "expected the SHA-256 of a key",
            "sha256sum` prints the hash",
        ],
        |w| {
            w.server("api_keys_file: keys");
            w.write("keys", "sk-secret\n");
        },
    )
    .of(SERVE),
    case(
        "an adapter's name with a slash",
        &["server.yaml:3: model_ids[0]:", "expected a name of letters, digits", "got \"a/b\""],
        |w| w.server("model_ids: [a/b]"),
    )
    .of(SERVE),
    case(
        "memory in a unit that is none",
        &["server.yaml:3: adapter_memory:", "such as 500MB or 10TB", "got \"8 gigs\""],
        |w| w.server("adapter_memory: 8 gigs"),
    )
    .of(SERVE),
    case("xorl's name of the model", &["server.yaml:3: model_name:", "is base_model_name here"], |w| {
        w.server("model_name: llama")
    })
    .of(SERVE),
    case(
        "a section of a run",
        &["server.yaml:3: train:", "a section of run.yaml", "the fields of server.yaml stand at its top"],
        |w| w.server("train: {lr: 1}"),
    )
    .of(SERVE),
    case(
        "merges in a server",
        &["server.yaml:3: merge_lora_interval: 5 is refused", "xorl-dist merge makes a model"],
        |w| w.server("merge_lora_interval: 5"),
    )
    .of(SERVE),
    case(
        "a run's field for a server",
        &["--train.lr:", "train.lr is of run.yaml", "the server's is server.lr"],
        |w| w.server(""),
    )
    .of(&["serve", "--config", "server.yaml", "--train.lr", "1"]),
];
