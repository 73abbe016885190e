//! Bodies of the tinker wire that are refused: each with a text that says where and why, and none with a panic.

use proptest::prelude::*;
use prost::{Message, bytes::Bytes};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use xorl_dist::server::wire::tinker::{
    calls::{
        Address, CallError, CreateModel, LoadWeights, ModelDefaults, OptimStepCall, SaveWeightsForSampler,
        ttl,
    },
    data::{Limits, PassCall},
    proto::{
        Chunk, ChunkKind, DType, Datum, DmelChunk, EncodedTextChunk, Encoding, ForwardBackwardRequest,
        ImageChunk, LossConfigValue, SparseCsr, Tensor,
    },
};

const LIMITS: Limits = Limits { data: 3, tokens: 8, bytes: 256, vocabulary: 100 };

fn integers(values: &[i64], shape: &[i64]) -> Tensor {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let encoding = Some(Encoding::Dense(bytes.into()));
    Tensor { encoding, dtype: DType::Int64.into(), shape: shape.to_vec() }
}

fn floats(values: &[f32], shape: &[i64]) -> Tensor {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let encoding = Some(Encoding::Dense(bytes.into()));
    Tensor { encoding, dtype: DType::Float32.into(), shape: shape.to_vec() }
}

fn text(tokens: &[i32]) -> Chunk {
    let tokens: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    Chunk { kind: Some(ChunkKind::EncodedText(EncodedTextChunk { tokens: tokens.into() })) }
}

fn request() -> ForwardBackwardRequest {
    let targets = integers(&[2, 3, 0], &[3]);
    let weights = floats(&[1.0, -0.5, 0.0], &[3]);
    let inputs =
        [("target_tokens", targets), ("weights", weights)].map(|(name, tensor)| (name.to_owned(), tensor));
    let datum = Datum { model_input: vec![text(&[1]), text(&[2, 3])], loss_fn_inputs: inputs.into() };
    ForwardBackwardRequest {
        model_id: "sess-1:train:0".to_owned(),
        seq_id: 4,
        data: vec![datum.clone(), datum],
        loss_fn: "cross_entropy".to_owned(),
        ..ForwardBackwardRequest::default()
    }
}

fn read(request: &ForwardBackwardRequest) -> Result<PassCall, String> {
    PassCall::from_protobuf(request.encode_to_vec().into(), &LIMITS).map_err(|refused| refused.to_string())
}

/// The text with which a request is refused that `change` makes of a good one. Its address is known all the same.
fn refusal(change: impl FnOnce(&mut ForwardBackwardRequest)) -> String {
    let mut request = request();
    change(&mut request);
    let refused = PassCall::from_protobuf(request.encode_to_vec().into(), &LIMITS).unwrap_err();
    assert_eq!(refused.address.model.as_ref().map(|model| model.as_str()), Some("sess-1:train:0"));
    assert_eq!(refused.address.seq_id, Some(4));
    refused.to_string()
}

/// The same for a change of the second datum.
fn datum_refusal(change: impl FnOnce(&mut Datum)) -> String {
    refusal(|request| change(&mut request.data[1]))
}

fn input_refusal(name: &str, tensor: Tensor) -> String {
    datum_refusal(|datum| drop(datum.loss_fn_inputs.insert(name.to_owned(), tensor)))
}

#[test]
fn every_refused_pass_says_where_and_why() {
    assert!(read(&request()).is_ok());
    let image = |kind| datum_refusal(|datum| datum.model_input.push(Chunk { kind: Some(kind) }));
    let text_only = "this server trains on text; send encoded_text";
    let refusals = [
        (image(ChunkKind::Image(ImageChunk {})), format!("data[1]: model_input.chunks[2] is image: {text_only}")),
        (image(ChunkKind::Dmel(DmelChunk {})), format!("data[1]: model_input.chunks[2] is dmel: {text_only}")),
        (datum_refusal(|datum| datum.model_input.clear()), "data[1]: model_input: no token".to_owned()),
        (
            datum_refusal(|datum| datum.model_input = vec![text(&[1; 9])]),
            "data[1]: model_input: 9 tokens, at most 8 a datum".to_owned(),
        ),
        (
            datum_refusal(|datum| datum.model_input = vec![text(&[1, 100, 3])]),
            "data[1]: model_input: token 1 is 100: the vocabulary has 100 ids, 0 and up".to_owned(),
        ),
        (
            input_refusal("target_tokens", integers(&[2, 3, 100], &[3])),
            "data[1]: target_tokens: token 2 is 100: the vocabulary has 100 ids, 0 and up".to_owned(),
        ),
        (
            datum_refusal(|datum| drop(datum.loss_fn_inputs.remove("target_tokens"))),
            "data[1]: loss_fn_inputs: target_tokens is missing; it names the token that each position predicts"
                .to_owned(),
        ),
        (
            input_refusal("target_tokens", floats(&[1.0, 2.0, 3.0], &[3])),
            "data[1]: loss_fn_inputs.target_tokens: dtype float32: expected int64 or int32".to_owned(),
        ),
        (
            input_refusal("weights", floats(&[1.0, 2.0], &[2])),
            "data[1]: loss_fn_inputs.weights: shape [2]: expected [3] or [3, k], one row for each token".to_owned(),
        ),
        (
            input_refusal("weights", floats(&[1.0, 2.0], &[3])),
            "data[1]: loss_fn_inputs.weights: 2 values: expected 3, as shape [3] says".to_owned(),
        ),
        (
            input_refusal("weights", floats(&[0.0; 6], &[3, 2])),
            "data[1]: loss_fn_inputs.weights: 2 values a token: expected 1, or 1 for each of its 1 targets".to_owned(),
        ),
        (
            input_refusal("weights", Tensor { encoding: None, ..floats(&[], &[3]) }),
            "data[1]: loss_fn_inputs.weights: no values: send dense or sparse_csr".to_owned(),
        ),
        (
            input_refusal("weights", Tensor { dtype: 7, ..floats(&[0.0; 3], &[3]) }),
            "data[1]: loss_fn_inputs.weights: dtype 7: expected float32, bfloat16, int64 or int32".to_owned(),
        ),
        (
            input_refusal("weights", Tensor { dtype: DType::Int64.into(), ..floats(&[0.0; 3], &[3]) }),
            "data[1]: loss_fn_inputs.weights: 12 bytes are no whole number of int64 values".to_owned(),
        ),
        (
            input_refusal("target_tokens", integers(&[0; 24], &[3, 8])),
            "data[1]: with this datum the request exceeds 256 bytes: send fewer data at once".to_owned(),
        ),
        (
            refusal(|request| request.data.extend(request.data.clone())),
            "4 data: at most 3 a request; send them in several".to_owned(),
        ),
        (refusal(|request| request.data.clear()), "data: no datum".to_owned()),
        (
            refusal(|request| {
                request.loss_fn_config_v2 = BTreeMap::from([("beta".to_owned(), LossConfigValue { value: None })]);
            }),
            "loss_fn_config_v2.beta: expected a number or a text".to_owned(),
        ),
    ];
    for (text, expected) in refusals {
        assert_eq!(text, expected);
    }
    let mut other = request();
    other.seq_id = -3;
    assert_eq!(read(&other).unwrap_err(), "seq_id -3: expected a positive number");
    other.model_id = "../up".to_owned();
    assert!(read(&other).unwrap_err().starts_with("model_id \"../up\": expected"));
}

#[test]
fn a_sparse_target_of_a_huge_shape_is_refused_before_memory_is_taken() {
    let crow: Vec<u8> = [0_i64; 4].iter().flat_map(|index| index.to_le_bytes()).collect();
    for k in [1_i64 << 20, 1 << 40, i64::MAX] {
        let csr =
            SparseCsr { values: Bytes::new(), crow_indices: crow.clone().into(), col_indices: Bytes::new() };
        let encoding = Some(Encoding::SparseCsr(csr));
        let tensor = Tensor { encoding, dtype: DType::Int64.into(), shape: vec![3, k] };
        let expected = format!("shape [3, {k}] is more than the 32 values that a request may hold");
        assert!(input_refusal("target_tokens", tensor).contains(&expected));
    }
}

#[test]
fn integer_and_bfloat16_inputs_are_read_as_numbers() {
    let mut request = request();
    let encoded = |dtype: DType, bytes: Vec<u8>| Tensor {
        encoding: Some(Encoding::Dense(bytes.into())),
        dtype: dtype.into(),
        shape: vec![],
    };
    let inputs = &mut request.data[0].loss_fn_inputs;
    let int32: Vec<u8> = [1_i32, 0, -2].iter().flat_map(|value| value.to_le_bytes()).collect();
    // 1, -2 and 0.5 in bfloat16.
    let bfloat16: Vec<u8> =
        [0x3f80_u16, 0xc000, 0x3f00].iter().flat_map(|value| value.to_le_bytes()).collect();
    inputs.insert("weights".to_owned(), encoded(DType::Int32, int32.clone()));
    inputs.insert("advantages".to_owned(), encoded(DType::Bfloat16, bfloat16));
    inputs.insert("mask".to_owned(), integers(&[1, 0, 1], &[3, 1]));
    inputs.insert("target_tokens".to_owned(), encoded(DType::Int32, int32));
    let call = read(&request).unwrap();
    let datum = &call.pass.data[0];
    assert_eq!(datum.targets, [1, 0, -2]);
    let expected =
        [("weights", [1.0, 0.0, -2.0]), ("advantages", [1.0, -2.0, 0.5]), ("mask", [1.0, 0.0, 1.0])];
    assert_eq!(datum.inputs, expected.map(|(name, values)| (name.to_owned(), values.to_vec())).into());
}

fn json_request() -> Value {
    let inputs = json!({
        "target_tokens": {"data": [2, 3, 0], "dtype": "int64", "shape": [3]},
        "weights": {"data": [1, 0.5, 0], "dtype": "float32"},
    });
    let chunks = json!([{"tokens": [1, 2, 3], "type": "encoded_text"}]);
    let data = json!([{"model_input": {"chunks": chunks}, "loss_fn_inputs": inputs}]);
    json!({"model_id": "m", "seq_id": 4, "forward_backward_input": {"data": data, "loss_fn": "ppo", "new": 1}})
}

#[test]
fn a_refused_json_pass_says_why_and_which_request_it_was() {
    let read = |request: &Value| PassCall::from_json(request.to_string().as_bytes(), &LIMITS);
    assert_eq!(read(&json_request()).unwrap().pass.data[0].inputs["weights"], [1.0, 0.5, 0.0]);
    let input = "/forward_backward_input/data/0";
    let cases = [
        ("/loss_fn_inputs/target_tokens/data", json!([1, 2.5, 3]), "value 1 is 2.5: expected a whole number"),
        ("/loss_fn_inputs/target_tokens/data", json!([1, 1e300, 3]), "token 1 is 9223372036854775807"),
        ("/loss_fn_inputs/target_tokens/data", json!("text"), "body: invalid type: string"),
        ("/loss_fn_inputs/target_tokens/shape", json!([3, -1]), "expected [3] or [3, k]"),
        ("/loss_fn_inputs/weights", json!({"data": [1], "sparse_col_indices": [0]}), "come together"),
        ("/loss_fn_inputs/weights", json!({"data": [1], "shape": [2]}), "expected [3] or [3, k]"),
        ("/model_input/chunks/0/type", json!("image_asset_pointer"), "chunks[0] is image_asset_pointer"),
        ("/model_input/chunks/0/tokens", json!([1, 2]), "data[0]: loss_fn_inputs.target_tokens: shape [3]"),
        ("/model_input/chunks", json!(3), "body: invalid type: integer `3`"),
    ];
    for (place, value, expected) in cases {
        let mut request = json_request();
        *request.pointer_mut(&format!("{input}{place}")).unwrap() = value;
        let refused = read(&request).unwrap_err();
        assert!(refused.to_string().contains(expected), "{place}: {refused}");
        assert_eq!(refused.address.seq_id, Some(4), "{place}");
        assert_eq!(refused.address.model.unwrap().as_str(), "m", "{place}");
    }
    let mut both = json_request();
    both["forward_input"] = both["forward_backward_input"].clone();
    assert_eq!(
        read(&both).unwrap_err().to_string(),
        "expected either forward_backward_input or forward_input"
    );
    assert_eq!(Address::of(br#"{"model_id": 3, "seq_id": "x"}"#), Address::default());
}

#[test]
fn calls_that_ask_for_what_the_server_has_not_are_refused_by_name() {
    let defaults =
        ModelDefaults { base_model: "org/base".to_owned(), lora_rank: 16, lora_alpha: 32.0, seed: 0 };
    let create = |field: &str, value: Value| {
        let mut call = json!({"session_id": "s", "model_seq_id": 0, "base_model": "org/base"});
        call[field] = value;
        let call: CreateModel = serde_json::from_value(call).unwrap();
        call.spec(&defaults).map_err(|error| error.to_string())
    };
    let (spec, warning) = create("lora_config", Value::Null).unwrap();
    assert_eq!((spec.rank, spec.seed, warning), (16, 0, None));
    let refused = [
        ("base_model", json!("other"), "base_model \"other\": this server trains \"org/base\" only"),
        ("lora_config", json!({"rank": 0}), "lora_config.rank 0: expected a positive number"),
        (
            "lora_config",
            json!({"rank": 1, "train_attn": false, "train_mlp": false}),
            "nothing would be trained",
        ),
        ("optimizer_config", json!({"type": "dimuon", "version": 1}), "optimizer_config of type \"dimuon\""),
    ];
    for (field, value, expected) in refused {
        let error = create(field, value).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    for (field, value) in [("learning_rate", -1.0), ("beta1", 1.0), ("beta2", -0.1), ("eps", -1.0)] {
        let call = json!({"model_id": "m", "adam_params": {field: value}});
        let error = serde_json::from_value::<OptimStepCall>(call).unwrap().step().unwrap_err().to_string();
        assert!(error.starts_with(&format!("adam_params.{field}: expected a number")), "{error}");
    }
    let load = json!({"path": "p", "optimizer": true, "model_id": "m", "session_id": "s", "model_seq_id": 0});
    let load: LoadWeights = serde_json::from_value(load).unwrap();
    assert_eq!(load.target(&defaults), Err(CallError::LoadAddress));
    let save: SaveWeightsForSampler = serde_json::from_value(json!({"model_id": "m"})).unwrap();
    assert_eq!(save.target(), Err(CallError::SamplerSave));
    assert_eq!((ttl(None), ttl(Some(0))), (Ok(None), Err(CallError::Ttl(0))));
}

/// A body with some bytes replaced, left out or put in.
fn broken(body: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..6);
    changes.prop_map(move |changes| {
        let mut body = body.clone();
        for (at, byte, kind) in changes {
            let at = at.index(body.len());
            match kind {
                0 => body[at] = byte,
                1 => body.insert(at, byte),
                _ if body.len() > 1 => drop(body.remove(at)),
                _ => {}
            }
        }
        body
    })
}

/// A pass within the limits, or a refusal with a text.
fn check(read: Result<PassCall, impl std::fmt::Display>) -> Result<(), TestCaseError> {
    match read {
        Err(refused) => prop_assert!(!refused.to_string().is_empty()),
        Ok(call) => {
            prop_assert!((1..=LIMITS.data).contains(&call.pass.data.len()));
            prop_assert_eq!(call.columns.len(), call.pass.data.len());
            for datum in &call.pass.data {
                prop_assert!((1..=LIMITS.tokens).contains(&datum.ids.len()));
                prop_assert!(datum.ids.iter().all(|id| (0..100).contains(id)));
                prop_assert_eq!(datum.targets.len(), datum.ids.len() * datum.k);
                let lengths = [datum.ids.len(), datum.targets.len()];
                prop_assert!(datum.inputs.values().all(|values| lengths.contains(&values.len())));
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn broken_protobuf_is_read_or_refused(body in broken(request().encode_to_vec())) {
        check(PassCall::from_protobuf(body.into(), &LIMITS))?;
    }

    #[test]
    fn broken_json_is_read_or_refused(body in broken(json_request().to_string().into_bytes())) {
        check(PassCall::from_json(&body, &LIMITS))?;
    }

    #[test]
    fn any_bytes_are_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..200)) {
        check(PassCall::from_protobuf(body.clone().into(), &LIMITS))?;
        check(PassCall::from_json(&body, &LIMITS))?;
    }
}
