//! Bodies of the tinker wire as real clients send and read them: 0.38 with protobuf, 0.24 with JSON.

use crate::common::client_python;
use serde::Serialize;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, UNIX_EPOCH},
};
use tempfile::TempDir;
use xorl_dist::server::{
    request::{ModelId, PassReply, StepReply},
    wire::{
        iso_time,
        tinker::{
            answers::{
                Capabilities, Checkpoint, CheckpointType, Checkpoints, ClientConfig, CreatedModel,
                CreatedSession, Cursor, Heartbeat, LoadedWeights, ModelData, ModelInfo, SavedSamplerWeights,
                SavedWeights, Session, Sessions, Status, Stepped, SupportedModel, TrainingRun, TrainingRuns,
                UnloadedModel, WeightsInfo, texts,
            },
            calls::{
                CreateModel, CreateSession, LoadTarget, LoadWeights, ModelCall, ModelDefaults, OptimStepCall,
                SamplerSave, SaveWeights, SaveWeightsForSampler, model_id, ttl,
            },
            data::{Limits, PassCall, RefusedPass},
            reply,
        },
    },
};

const LIMITS: Limits = Limits { data: 16, tokens: 64, bytes: 1 << 16, vocabulary: 500 };

/// A client, and how our side speaks to it.
#[derive(Clone, Copy)]
struct Client {
    variable: &'static str,
    venv: &'static str,
    read: fn(Vec<u8>) -> Result<PassCall, RefusedPass>,
    write: fn(&PassReply, &[Option<usize>]) -> Vec<u8>,
}

const CLIENTS: [Client; 2] = [
    Client {
        variable: "XORL_TINKER_PYTHON",
        venv: ".venv-tinker",
        read: |body| PassCall::from_protobuf(body.into(), &LIMITS),
        write: reply::to_protobuf,
    },
    Client {
        variable: "XORL_TINKER_JSON_PYTHON",
        venv: ".venv-tinker-json",
        read: |body| PassCall::from_json(&body, &LIMITS),
        write: |reply, columns| reply::to_json(reply, columns).unwrap(),
    },
];

impl Client {
    /// Runs an action of tests/clients/tinker_wire.py on `folder`.
    fn run(self, action: &str, folder: &Path) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/tinker_wire.py");
        let mut python = Command::new(client_python(self.variable, self.venv));
        let output = python.arg(script).arg(action).arg(folder).output().unwrap();
        assert!(
            output.status.success(),
            "{}: {action}: {}",
            self.venv,
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

fn read_json(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A reply with a value of its own at every place.
fn reply_of(call: &PassCall) -> PassReply {
    let log_probs =
        call.pass.data.iter().enumerate().map(|(index, datum)| {
            (0..datum.targets.len()).map(|i| -(index as f32) - i as f32 / 7.0).collect()
        });
    let log_probs: Vec<Vec<f32>> = log_probs.collect();
    let metrics =
        [("ratio:mean", 1.5), ("ratio:max", 2.0), ("bare", 3.0), ("two:ends:sum", 4.0), ("new:kind", 5.0)];
    let metrics = metrics.map(|(name, value)| (name.to_owned(), value));
    PassReply { loss: 12.25, valid: 3, log_probs, metrics: metrics.into() }
}

#[test]
fn python_passes_that_clients_send_are_what_they_meant_and_replies_what_they_read() {
    for client in CLIENTS {
        let folder = TempDir::new().unwrap();
        client.run("requests", folder.path());
        let cases = read_json(folder.path().join("cases.json"));
        let mut replies = BTreeMap::new();
        for case in cases.as_array().unwrap() {
            let name = case["name"].as_str().unwrap();
            let call = (client.read)(std::fs::read(folder.path().join(name)).unwrap());
            let call = call.unwrap_or_else(|refused| panic!("{name}: {refused}"));
            assert_eq!(call.model.as_str(), "sess-1:train:0", "{name}");
            assert_eq!(json!(call.seq_id), case["seq_id"], "{name}");
            assert_eq!(json!(call.pass.backward), case["backward"], "{name}");
            assert_eq!(json!(call.pass.loss.name), case["loss_fn"], "{name}");
            assert_eq!(json!(call.pass.loss.params), case["config"], "{name}");
            let data = call.pass.data.iter().zip(&call.columns).map(|(datum, columns)| {
                assert_eq!(datum.k, columns.unwrap_or(1), "{name}");
                let (ids, targets, inputs) = (&datum.ids, &datum.targets, &datum.inputs);
                json!({"ids": ids, "targets": targets, "columns": columns, "inputs": inputs})
            });
            let data: Vec<Value> = data.collect();
            // As numbers: 1 and 1.0 are alike.
            assert_eq!(as_numbers(&json!(data)), as_numbers(&case["data"]), "{name}");
            let reply = reply_of(&call);
            let body = (client.write)(&reply, &call.columns);
            std::fs::write(folder.path().join(format!("{name}.reply")), body).unwrap();
            replies.insert(name.to_owned(), (call, reply));
        }
        assert!(replies.len() >= 9, "{}", replies.len());

        let not_finite = PassReply {
            loss: f64::NAN,
            valid: 0,
            log_probs: vec![vec![f32::NAN, -0.5]],
            metrics: BTreeMap::new(),
        };
        let body = (client.write)(&not_finite, &[None]);
        std::fs::write(folder.path().join("not_finite.reply"), body).unwrap();

        client.run("replies", folder.path());
        let seen = read_json(folder.path().join("seen.json"));
        let not_finite = &seen["not_finite"];
        assert_eq!(not_finite["outputs"], json!([{"logprobs": {"shape": [2], "data": ["nan", -0.5]}}]));
        assert_eq!(not_finite["metrics"], json!({"loss:sum": "nan"}));
        for (name, (call, reply)) in replies {
            let seen = &seen[&name];
            let outputs = call.pass.data.iter().zip(&call.columns).zip(&reply.log_probs);
            let outputs: Vec<Value> = outputs
                .map(|((datum, columns), log_probs)| {
                    let shape: Vec<usize> = std::iter::once(datum.ids.len()).chain(*columns).collect();
                    let data: Vec<f64> = log_probs.iter().map(|&value| value.into()).collect();
                    json!({"logprobs": {"shape": shape, "data": data}})
                })
                .collect();
            let outputs_seen = narrowed(&seen["outputs"]);
            assert_eq!(outputs_seen, narrowed(&json!(outputs)), "{name}");
            assert_eq!(seen["type"], "ArrayRecord");
            let expected = json!({"loss:sum": 12.25, "ratio:max": 2.0, "ratio:mean": 1.5});
            assert_eq!(seen["metrics"], expected, "{name}");
            let combined = json!({"loss:sum": 24.5, "ratio:max": 2.0, "ratio:mean": 1.5});
            assert_eq!(seen["combined_metrics"], combined, "{name}");
        }
    }
}

/// All numbers as floats.
fn as_numbers(value: &Value) -> Value {
    map_numbers(value, &|number| number)
}

/// All numbers as fp32.
fn narrowed(value: &Value) -> Value {
    map_numbers(value, &|number| (number as f32).into())
}

fn map_numbers(value: &Value, map: &dyn Fn(f64) -> f64) -> Value {
    match value {
        Value::Number(number) => json!(map(number.as_f64().unwrap())),
        Value::Array(values) => values.iter().map(|value| map_numbers(value, map)).collect(),
        Value::Object(fields) => {
            let field = |(name, value): (&String, &Value)| (name.clone(), map_numbers(value, map));
            Value::Object(fields.iter().map(field).collect())
        }
        other => other.clone(),
    }
}

fn defaults() -> ModelDefaults {
    ModelDefaults { base_model: "org/base".to_owned(), lora_rank: 16, lora_alpha: 32.0, seed: 5 }
}

fn parse<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn python_calls_that_clients_send_ask_for_what_they_meant() {
    for client in CLIENTS {
        let folder = TempDir::new().unwrap();
        client.run("calls", folder.path());
        let calls = read_json(folder.path().join("calls.json"));
        let call = |name: &str| &calls[name];

        let session: CreateSession = parse(call("create_session"));
        assert_eq!(session.sdk_version.as_deref(), Some("1"));
        let create: CreateModel = parse(call("create_model"));
        let (spec, warning) = create.spec(&defaults()).unwrap();
        assert_eq!((spec.rank, spec.alpha, spec.seed), (8, 32.0, u64::MAX - 2));
        assert_eq!((spec.train_attn, spec.train_mlp, spec.targets), (true, false, None));
        assert!(warning.unwrap().contains("train_unembed is ignored"));
        assert_eq!(json!(create.user_metadata.as_ref().map(texts)), json!({"r": "x", "n": "3"}));
        assert_eq!(model_id(&create.session_id, create.model_seq_id).unwrap().as_str(), "sess-1:train:2");

        let step: OptimStepCall = parse(call("optim_step"));
        assert_eq!((step.seq_id, step.model_id.as_str()), (Some(7), "m"));
        let step = step.step().unwrap();
        assert_eq!((step.lr, step.betas, step.eps), (0.25, (0.9, 0.95), 1e-12));
        assert_eq!((step.weight_decay, step.max_grad_norm, step.divide), (0.0, 2.0, false));
        let absent = OptimStepCall { adam_params: None, ..parse(call("optim_step_defaults")) };
        assert_eq!(absent.step(), parse::<OptimStepCall>(call("optim_step_defaults")).step());
        if !call("optim_step_dimuon").is_null() {
            let error = parse::<OptimStepCall>(call("optim_step_dimuon")).step().unwrap_err();
            assert_eq!(
                error.to_string(),
                "optimizer_params of type \"dimuon\": server.yaml names the optimizer of all adapters; send adam_params"
            );
        }

        let save: SaveWeights = parse(call("save_weights"));
        assert_eq!(
            (save.path.as_deref(), save.overwrite, ttl(save.ttl_seconds)),
            (Some("a"), false, Ok(Some(3600)))
        );
        let named: SaveWeightsForSampler = parse(call("save_named"));
        assert_eq!(named.target(), Ok(SamplerSave::Named("a")));
        let ephemeral: SaveWeightsForSampler = parse(call("save_ephemeral"));
        assert_eq!(ephemeral.target(), Ok(SamplerSave::Ephemeral { sampling_session_seq_id: 0 }));
        let load: LoadWeights = parse(call("load_new"));
        let new = LoadTarget::New(ModelId::new("sess-1:train:4").unwrap());
        assert_eq!((load.target(&defaults()), load.optimizer), (Ok(new), true));
        let load: LoadWeights = parse(call("load_old"));
        assert_eq!(load.target(&defaults()), Ok(LoadTarget::Existing(ModelId::new("m").unwrap())));
        assert_eq!(parse::<ModelCall>(call("get_info")).model_id, "m");
    }
}

#[test]
fn python_answers_pass_the_checks_of_the_clients() {
    fn value(answer: impl Serialize) -> Value {
        serde_json::to_value(answer).unwrap()
    }
    let model = ModelId::new("sess-1:train:0").unwrap();
    let base = ModelData {
        arch: "llama".to_owned(),
        model_name: "org/base".to_owned(),
        tokenizer_id: "/models/base".to_owned(),
    };
    let time = iso_time(UNIX_EPOCH + Duration::from_secs(1_795_941_000));
    let checkpoint = Checkpoint {
        checkpoint_id: "weights/a".to_owned(),
        checkpoint_type: CheckpointType::Training,
        time: time.clone(),
        tinker_path: "tinker://sess-1:train:0/weights/a".to_owned(),
        size_bytes: 12,
        public: false,
        user_metadata: None,
        expires_at: Some(time.clone()),
    };
    let run = TrainingRun {
        training_run_id: model.to_string(),
        base_model: "org/base".to_owned(),
        model_owner: "key-1".to_owned(),
        is_lora: true,
        lora_rank: Some(8),
        corrupted: false,
        last_request_time: time.clone(),
        last_checkpoint: Some(checkpoint.clone()),
        last_sampler_checkpoint: None,
        user_metadata: Some(BTreeMap::from([("a".to_owned(), "b".to_owned())])),
    };
    let cursor = Cursor { offset: 0, limit: 20, total_count: 1 };
    let stepped = StepReply { step: 3, grad_norm: f64::NAN, non_finite: vec!["q_proj".to_owned()] };
    let path = "tinker://sess-1:train:0/weights/a".to_owned();
    let supported = SupportedModel {
        model_name: "org/base".to_owned(),
        max_context_length: 4096,
        trainable: true,
        sampleable: true,
    };
    let answers = [
        ("client_config", value(ClientConfig::new(&LIMITS))),
        ("created_session", value(CreatedSession::new("sess-1".to_owned(), 32.0))),
        ("heartbeat", value(Heartbeat {})),
        ("telemetry", value(Status::ACCEPTED)),
        ("health", value(Status::OK)),
        ("created_model", value(CreatedModel { model_id: model.to_string(), warning_message: None })),
        ("unloaded_model", value(UnloadedModel { model_id: model.to_string() })),
        ("model_info", value(ModelInfo::new(&model, 8, base))),
        ("stepped", value(Stepped::new(&stepped, 0.5))),
        ("saved_weights", value(SavedWeights { path: path.clone() })),
        (
            "saved_sampler_weights",
            value(SavedSamplerWeights { path: Some(path.clone()), sampling_session_id: None }),
        ),
        ("loaded_weights", value(LoadedWeights { path, model_id: model.to_string() })),
        (
            "weights_info",
            value(WeightsInfo {
                base_model: "org/base".to_owned(),
                is_lora: true,
                lora_rank: 8,
                train_unembed: false,
                train_mlp: true,
                train_attn: true,
            }),
        ),
        ("capabilities", value(Capabilities { supported_models: vec![supported] })),
        ("training_run", value(run.clone())),
        ("training_runs", value(TrainingRuns { training_runs: vec![run], cursor })),
        ("checkpoints", value(Checkpoints { checkpoints: vec![checkpoint], cursor: Some(cursor) })),
        ("sessions", value(Sessions { sessions: vec!["sess-1".to_owned()] })),
        (
            "session",
            value(Session {
                training_run_ids: vec![model.to_string()],
                sampler_ids: vec![],
                user_metadata: None,
                display_name: Some("mine".to_owned()),
            }),
        ),
    ];
    let answers: BTreeMap<_, _> = answers.into();
    for client in CLIENTS {
        let folder = TempDir::new().unwrap();
        std::fs::write(folder.path().join("answers.json"), json!(answers).to_string()).unwrap();
        client.run("answers", folder.path());
        let seen = read_json(folder.path().join("seen.json"));
        assert_eq!(seen.as_object().unwrap().len(), answers.len());
        for (name, answer) in &answers {
            assert_agrees(name, answer, &seen[*name]);
        }
        assert_eq!(seen["training_runs"]["training_runs"][0]["last_checkpoint"]["time"], json!(time));
        assert_eq!(
            seen["stepped"]["metrics"],
            json!({"step": 3.0, "learning_rate": 0.5, "non_finite_parameters": 1.0})
        );
    }
    assert_eq!(time, "2026-11-29T08:30:00Z");
}

/// Every field that the client knows has our value.
fn assert_agrees(place: &str, ours: &Value, theirs: &Value) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let known = ours.iter().filter_map(|(name, value)| Some((name, value, theirs.get(name)?)));
            known.for_each(|(name, ours, theirs)| assert_agrees(&format!("{place}.{name}"), ours, theirs));
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            assert_eq!(ours.len(), theirs.len(), "{place}");
            ours.iter().zip(theirs).for_each(|(ours, theirs)| assert_agrees(place, ours, theirs));
        }
        _ => assert_eq!(ours, theirs, "{place}"),
    }
}
