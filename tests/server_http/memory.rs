//! Bodies that are made to be read badly: every parser refuses them with an error of the client, in little time and in
//! memory of a small multiple of their bytes.

use super::server::{Double, datum, settings};
use crate::fuzz_corpus::targets::bounded;
use proptest::prelude::*;
use prost::Message;
use serde_json::{Value, json};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use xorl_dist::server::{
    app::App,
    fault::Fault,
    keys::Keys,
    registry::Tenant,
    wire::{
        Wire,
        tinker::{
            data::{Limits, PassCall},
            proto::{self, DType, Encoding, ForwardBackwardRequest, SparseCsr, Tensor},
        },
        xorl,
    },
};

/// The value of `run`, and the most bytes that it held.
fn peak<T>(run: impl FnOnce() -> T) -> (T, usize) {
    let mut given = None;
    let most = bounded(isize::MAX as usize, 0, || given = Some(run()));
    (given.unwrap(), most)
}

const MIB: usize = 1 << 20;
const LIMITS: Limits = Limits { data: 1024, tokens: 200_000, bytes: 64 * MIB, vocabulary: 100 };

struct Target {
    app: Arc<App>,
    _output: TempDir,
}

impl Target {
    fn new() -> Self {
        let output = tempfile::tempdir().unwrap();
        let mut settings = settings(output.path());
        settings.max_tokens = LIMITS.tokens;
        settings.futures.pending = 1_000_000;
        Self { app: App::new(Double::start(), settings, Keys::default()), _output: output }
    }

    fn post(&self, call: &str, body: &[u8]) -> Result<(), Fault> {
        let _ = Wire::of(&Default::default(), body);
        xorl::post(&self.app, &Tenant::everyone(), call, body).map(drop)
    }
}

/// `head`, then `part` until there are 2 MiB of them, joined by commas, then `tail`. `#` in a part is its number.
fn filled(head: &str, part: &str, tail: &str) -> String {
    let mut text = String::from(head);
    for i in 0.. {
        text += &part.replace('#', &i.to_string());
        if text.len() > 2 * MIB {
            break;
        }
        text.push(',');
    }
    text + tail
}

/// Bodies of a pass, each bad in its own way.
fn passes() -> Vec<String> {
    let rows = |part: &str| filled("{\"batches\": [", part, "]}");
    let row = |head: &str, part: &str, tail: &str| {
        filled(&format!("{{\"batches\": [{{{head}"), part, &format!("{tail}}}]}}"))
    };
    let data = |part: &str| {
        filled(
            "{\"model_id\": \"default\", \"forward_backward_input\": {\"loss_fn\": \"x\", \"data\": [",
            part,
            "]}}",
        )
    };
    let of_datum = |head: &str, part: &str, tail: &str| {
        let start = format!(
            "{{\"model_id\": \"default\", \"forward_backward_input\": {{\"loss_fn\": \"x\", \"data\": [{{{head}"
        );
        filled(&start, part, &format!("{tail}}}]}}}}"))
    };
    let many = (0..100_000).map(|_| "[0]").collect::<Vec<_>>().join(",");
    vec![
        row("\"input_ids\": [", "0", "]"),
        row("\"input_ids\": [", "[0]", "]"),
        row("\"input_ids\": [", "[]", "]"),
        row("\"input_ids\": [", "[0],[]", "]"),
        row("\"input_ids\": [", "[[0]]", "]"),
        row("\"input_ids\": [", "1e308", "]"),
        row("\"input_ids\": [", "{}", "]"),
        row("\"input_ids\": [1, 2], \"x\": [", "0", "]"),
        row(&format!("\"input_ids\": [{many}], \"x\": ["), "0", "]"),
        row(&format!("\"input_ids\": [{many}], \"labels\": ["), "0", "]"),
        row("", "\"k#\": []", ""),
        row("", "\"input_ids\": [1]", ""),
        rows("{}"),
        rows("[]"),
        rows("{\"a\": []}"),
        rows("{\"input_ids\": [1]}"),
        rows("{\"input_ids\": [1], \"labels\": [1], \"weights\": [1]}"),
        data("{}"),
        data("{\"model_input\": {}, \"loss_fn_inputs\": {\"a\": []}}"),
        data("{\"model_input\": {\"chunks\": []}, \"loss_fn_inputs\": {\"a\": {\"data\": []}}}"),
        data("{\"model_input\": {\"input_ids\": [1]}, \"loss_fn_inputs\": {\"target_tokens\": [1]}}"),
        of_datum("\"loss_fn_inputs\": {}, \"model_input\": {\"chunks\": [", "{}", "]}"),
        of_datum("\"loss_fn_inputs\": {}, \"model_input\": {\"chunks\": [", "{\"tokens\": []}", "]}"),
        of_datum("\"loss_fn_inputs\": {}, \"model_input\": {\"chunks\": [{\"tokens\": [", "1", "]}]}"),
        of_datum("\"model_input\": {\"chunks\": []}, \"loss_fn_inputs\": {", "\"k#\": []", "}"),
        of_datum("\"model_input\": {\"chunks\": []}, \"loss_fn_inputs\": {", "\"k#\": {\"data\": []}", "}"),
        of_datum(
            "\"model_input\": {\"input_ids\": [1]}, \"loss_fn_inputs\": {\"target_tokens\": {\"data\": [1], \"shape\": [",
            "18446744073709551615",
            "]}}",
        ),
        of_datum(
            "\"model_input\": {\"chunks\": [{\"tokens\": [1]}]}, \"loss_fn_inputs\": {\"target_tokens\": {\"data\": [",
            "1",
            "], \"shape\": [1, 9223372036854775807]}}",
        ),
        filled("{\"batches\": [{\"input_ids\": [1]}], \"loss_fn_params\": {", "\"k#\": 1", "}}"),
        filled("{\"batches\": [{\"input_ids\": [1]}], \"loss_fn_params\": {\"a\": [", "[]", "]}}"),
        filled("{\"batches\": [{\"input_ids\": [1], \"input_ids\": [1", ",1", "]}]}").replacen("[1,", "[", 1),
        filled("{\"batches\": 3, \"x\": [", "[{\"a\": []}]", "]}"),
        filled("{", "\"seq_id\": 1", "}"),
        format!("{{\"batches\": [{{\"input_ids\": {}", "[".repeat(2 * MIB)),
        format!("{{\"x\": {}", "{\"a\":".repeat(MIB / 2)),
        format!("{{\"model_id\": \"{}\"}}", "\\u0061".repeat(MIB)),
        format!("{{\"batches\": [{{\"{}\": 1}}]}}", "k".repeat(2 * MIB)),
    ]
}

/// The most bytes for each of a body.
const MULTIPLE: usize = 24;

fn check(shown: &str, bytes: usize, run: impl FnOnce() -> Result<(), String>) {
    let started = Instant::now();
    let (read, most) = peak(run);
    let (took, shown) = (started.elapsed(), &shown[..shown.len().min(120)]);
    assert!(took < Duration::from_secs(8), "{shown}: {took:?}");
    assert!(
        most < MULTIPLE * bytes + 16 * MIB,
        "{shown}: {} MiB for {} MiB, {read:?}",
        most / MIB,
        bytes / MIB
    );
}

#[test]
fn a_pass_takes_a_small_multiple_of_its_bytes_to_read() {
    let target = Target::new();
    for body in passes() {
        check(&body, body.len(), || match target.post("forward_backward", body.as_bytes()) {
            Err(fault) if !fault.status.is_client_error() => panic!("{fault}"),
            read => read.map_err(|fault| fault.detail.chars().take(200).collect()),
        });
        check(&body, body.len(), || {
            PassCall::from_json(body.as_bytes(), &LIMITS).map(drop).map_err(|refused| refused.to_string())
        });
    }
}

#[test]
fn a_body_without_data_takes_a_small_multiple_of_its_bytes_to_read() {
    let target = Target::new();
    for (head, part, tail) in [
        ("{\"a\": [", "[]", "]}"),
        ("{", "\"k#\": {}", "}"),
        ("{\"lora_config\": {\"target_modules\": [", "\"\"", "]}}"),
        ("{\"lora_config\": {", "\"k#\": 1", "}}"),
        ("{\"adam_params\": {\"lr\": [", "1", "]}}"),
    ] {
        let body = filled(head, part, tail);
        let body = format!("{}{tail}", &body[..body[..MIB - 10].rfind(',').unwrap()]);
        for call in ["create_model", "optim_step", "save_weights", "kill_session", "retrieve_future"] {
            check(&body, body.len(), || match target.post(call, body.as_bytes()) {
                Err(fault) if !fault.status.is_client_error() => panic!("{fault}"),
                read => read.map_err(|fault| fault.detail),
            });
        }
        let _ = xorl::object(body.as_bytes());
    }
}

/// A field of bytes in protobuf.
fn field(tag: u8, bytes: &[u8]) -> Vec<u8> {
    let mut all = vec![tag << 3 | 2];
    prost::encoding::encode_varint(bytes.len() as u64, &mut all);
    all.extend_from_slice(bytes);
    all
}

#[test]
fn a_pass_in_protobuf_takes_a_small_multiple_of_its_bytes_to_read() {
    let start = [field(1, b"m"), vec![0x10, 1]].concat();
    let names = |entry: &dyn Fn(u32) -> Vec<u8>| (0..400_000).flat_map(entry).collect::<Vec<u8>>();
    let input = |i: u32| {
        field(2, &field(1, &i.to_le_bytes()[..3].iter().map(|byte| byte & 0x7f).collect::<Vec<_>>()))
    };
    let tensor = |values: usize, shape: &[i64], csr: bool| {
        let bytes = vec![0; values];
        let sparse = SparseCsr {
            values: bytes.clone().into(),
            crow_indices: bytes.clone().into(),
            col_indices: bytes.clone().into(),
        };
        let encoding = if csr { Encoding::SparseCsr(sparse) } else { Encoding::Dense(bytes.into()) };
        let tensor = Tensor { encoding: Some(encoding), dtype: DType::Int64.into(), shape: shape.to_vec() };
        let entry = [field(1, b"target_tokens"), field(2, &tensor.encode_to_vec())].concat();
        [field(1, &field(1, &field(1, &[1, 0, 0, 0]))), field(2, &entry)].concat()
    };
    let bodies = [
        ("empty data", [start.clone(), field(3, b"").repeat(2 * MIB)].concat()),
        ("empty chunks", [start.clone(), field(3, &field(1, b"").repeat(2 * MIB))].concat()),
        ("empty texts", [start.clone(), field(3, &field(1, &field(1, b"")).repeat(MIB))].concat()),
        ("inputs", [start.clone(), field(3, &names(&input))].concat()),
        (
            "parameters",
            [
                start.clone(),
                names(&|i| {
                    let mut entry = input(i);
                    entry[0] = 5 << 3 | 2;
                    entry
                }),
            ]
            .concat(),
        ),
        ("a shape", [start.clone(), field(3, &tensor(8, &[1; 4 * MIB], false))].concat()),
        ("values", [start.clone(), field(3, &tensor(4 * MIB, &[1], false))].concat()),
        ("csr", [start.clone(), field(3, &tensor(MIB, &[1, i64::MAX], true))].concat()),
        ("csr with overflow", [start.clone(), field(3, &tensor(16, &[1, i64::MIN], true))].concat()),
        ("csr of nothing", [start.clone(), field(3, &tensor(0, &[1, 8 * MIB as i64], true))].concat()),
        ("groups", [start.clone(), vec![0x7b; 4 * MIB]].concat()),
        (
            "a length that is too large",
            [start, vec![0x1a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]].concat(),
        ),
    ];
    for (name, body) in bodies {
        let bytes = body.len();
        check(name, bytes, || {
            let read = PassCall::from_protobuf(body.into(), &LIMITS);
            let refused = read.expect_err(name).to_string();
            assert!(refused.len() < 1000 || name == "a shape", "{name}: a text of {} bytes", refused.len());
            Err(refused.chars().take(200).collect())
        });
    }
}

/// A valid body with one value replaced by another that is bad.
fn replaced() -> impl Strategy<Value = Vec<u8>> {
    let bases = [
        json!({"model_id": "default", "seq_id": 1, "forward_backward_input": {"data": [datum()],
            "loss_fn": "cross_entropy", "loss_fn_params": {"beta": 1}}}),
        json!({"batches": [{"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]], "attention_mask": [1, 1]}],
            "loss_fn": "x", "loss_fn_params": {"a": 1}}),
        json!({"model_id": "a", "base_model": "org/base", "lora_config": {"rank": 8, "alpha": 16.5, "seed": 1,
            "target_modules": ["q_proj"], "train_mlp": true, "dropout": 0.5}}),
        json!({"adam_params": {"lr": 1, "beta1": 0.5, "eps": 1e-8}, "learning_rate": 1e-3, "gradient_clip": 1}),
        json!({"path": "n", "name": "n", "checkpoint_id": "weights/n", "xorl_path": "xorl://a/weights/n",
            "optimizer": true, "overwrite": false, "save_checkpoint": false, "request_id": "future_1"}),
    ];
    let bad = [
        "null",
        "true",
        "-0.0",
        "1e308",
        "1e309",
        "-1e309",
        "5e-324",
        "9223372036854775807",
        "9223372036854775808",
        "-9223372036854775809",
        "18446744073709551616",
        "1.5",
        "NaN",
        "Infinity",
        "-Infinity",
        "01",
        "\"\"",
        "\"a\"",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "\"..\"",
        "[]",
        "{}",
        "[null]",
        "[[]]",
        "[{}]",
        "[-1]",
        "[1e300]",
        "[1,[1]]",
        "{\"data\":[1],\"shape\":[4294967296,4294967296]}",
        "{\"data\":[],\"shape\":[0,18446744073709551615]}",
        "{\"data\":[1],\"shape\":[-1]}",
        "{\"data\":{\"data\":{\"data\":[1]}}}",
        "{\"shape\":[1]}",
        "\u{1}",
        "",
    ];
    let bad: Vec<String> = bad
        .iter()
        .map(|text| (*text).to_owned())
        .chain(["[", "{\"a\":"].iter().map(|open| open.repeat(100_000)))
        .chain([format!("\"{}\"", "é".repeat(5000)), format!("[{}1]", "1,".repeat(5000))])
        .collect();
    let picked =
        (prop::sample::select(bases.to_vec()), any::<prop::sample::Index>(), prop::sample::select(bad));
    (picked, any::<Option<(prop::sample::Index, u8)>>()).prop_map(|((base, at, bad), broken)| {
        let mut places = Vec::new();
        pointers(&base, "", &mut places);
        let (mut body, place) = (base, &places[at.index(places.len())]);
        *body.pointer_mut(place).unwrap() = json!("the place");
        let mut bytes = body.to_string().replace("\"the place\"", &bad).into_bytes();
        if let Some((at, byte)) = broken.filter(|_| !bytes.is_empty()) {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes
    })
}

fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, part)| pointers(part, &format!("{at}/{name}"), found))
        }
        Value::Array(parts) => {
            parts.iter().enumerate().for_each(|(i, part)| pointers(part, &format!("{at}/{i}"), found))
        }
        _ => {}
    }
}

const CALLS: [&str; 14] = [
    "abort_gradient_epoch",
    "create_model",
    "delete_checkpoint",
    "forward",
    "forward_backward",
    "get_info",
    "kill_session",
    "list_checkpoints",
    "load_weights",
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "unload_model",
    "weights_info",
];

#[test]
fn a_bad_value_anywhere_is_a_fault_of_the_client() {
    let target = Target::new();
    let config = ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(body in replaced())| {
        for call in CALLS {
            if let Err(fault) = target.post(call, &body) {
                prop_assert!(fault.status.is_client_error() && fault.status.as_u16() != 409, "{}: {}", call, fault);
                prop_assert!(fault.detail.len() <= 2003, "{}: {} bytes of text", call, fault.detail.len());
            }
        }
        let _ = PassCall::from_json(&body, &LIMITS);
        let _ = PassCall::from_protobuf(body.into(), &LIMITS);
    });
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn data_are_counted_as_they_are_decoded(
        data in 0usize..5,
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
    ) {
        let datum = proto::Datum::default();
        let request = ForwardBackwardRequest { model_id: "m".into(), seq_id: 3, data: vec![datum; data],
            loss_fn: "x".into(), ..Default::default() };
        let mut body = request.encode_to_vec();
        for (at, byte) in flips {
            let at = at.index(body.len());
            body[at] = byte;
        }
        let counted = proto::fields(&body).filter(|(tag, _)| *tag == 3).count();
        if let Ok(decoded) = ForwardBackwardRequest::decode(&body[..]) {
            prop_assert_eq!(counted, decoded.data.len());
        }
    }
}
