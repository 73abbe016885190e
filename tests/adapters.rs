//! Adapters as other programs write them: computed as PEFT computes them, or refused in one line; and the steps of runs
//! that start from them.

use crate::common::{failed, floats, metrics, python, succeeded, xorl};
use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};
use tch::{Device, Tensor};
use xorl_dist::{
    checkpoint::{
        CheckpointError,
        adapter_config::harmless_fields,
        peft::{AdapterFolder, StoredAdapter},
        state::Accumulated,
    },
    comm::World,
    config::{BaseFiles, TrainArgs},
    lora::Adapter,
    model::{
        base_plan::{Options, all_projections},
        hf_config::HfModel,
        transformer::{Batch, Transformer},
    },
    optim::{Optimizer, Settings},
    server::{
        request::{Contents, Save},
        store::{self, Base},
    },
    session::Session,
    shard::ProcessGroups,
    weights::SafetensorsSource,
};

/// An adapter that `adapters.py` made, and what PEFT does with it.
#[derive(Deserialize)]
struct Case {
    kind: String,
    name: String,
    field: String,
    model: PathBuf,
    path: PathBuf,
    /// True if it has to be computed, false if it has to be refused; null for fields.
    accept: Option<bool>,
    /// PEFT loads it, and leaves its logits beside it.
    loads: bool,
    /// PEFT's logits are those of the adapter before the change.
    same: bool,
}

#[derive(Deserialize)]
struct Cases {
    ids: Vec<i64>,
    cases: Vec<Case>,
}

/// Models and their logits, in this process.
struct Ours {
    groups: ProcessGroups,
    models: BTreeMap<PathBuf, Transformer>,
    ids: Vec<i64>,
}

impl Ours {
    fn new(ids: Vec<i64>) -> Self {
        Self { groups: ProcessGroups::one_block(&World::start().unwrap()), models: BTreeMap::new(), ids }
    }

    /// The model in `model`, with the adapter in `path`.
    fn adapted(&mut self, model: &Path, path: &Path) -> Result<(&mut Transformer, Adapter), CheckpointError> {
        let open = || {
            let options = Options { slots: 1, vocab_chunk_rows: 100, ..Options::default() };
            let spec = HfModel::open(model).unwrap().spec;
            let mut loaded = Transformer::new(spec, options, &self.groups).unwrap();
            loaded.load(&SafetensorsSource::open(model).unwrap()).unwrap();
            loaded
        };
        let model = self.models.entry(model.to_owned()).or_insert_with(open);
        let StoredAdapter { sites, shapes, values } =
            AdapterFolder::open(path)?.adapter(&all_projections(model.spec()))?;
        let mut adapter = model.new_adapter(&sites, shapes);
        adapter.set(|parameter, range| values[&parameter.name][range].to_vec()).unwrap();
        Ok((model, adapter))
    }

    /// Saves the adapter in `path` to `folder` as the server does.
    fn save(&mut self, model: &Path, path: &Path, folder: PathBuf) {
        let (_, adapter) = self.adapted(model, path).unwrap();
        let optimizer = Optimizer::new(&Settings::from(&TrainArgs::default()), adapter.pieces());
        let session = Session { name: "policy".into(), adapter, optimizer, max_grad_norm: 0.0 };
        let base = Base {
            name: model.display().to_string(),
            digest: "digest".into(),
            quantization: None,
            files: BaseFiles::default(),
            seed: 1,
        };
        let save =
            Save { folder, contents: Contents::Training, overwrite: false, metadata: json!({"note": 1}) };
        store::save(&session, &self.groups, &base, Accumulated::default(), &save).unwrap();
    }

    /// The logits of the rows with the adapter in `path`.
    fn logits(&mut self, model: &Path, path: &Path) -> Result<Tensor, CheckpointError> {
        let ids = self.ids.clone();
        let (model, mut adapter) = self.adapted(model, path)?;
        let batch = Batch::new(&ids, &ids, &[ids.len()], Device::Cpu);
        Ok(model.logits(&batch, &mut [&mut adapter]).unwrap())
    }
}

/// The logits that PEFT left in `path`.
fn theirs(path: &Path) -> Tensor {
    let bytes = std::fs::read(path.join("logits.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let rows = file.tensor("logits").unwrap().shape()[0] as i64;
    Tensor::from_slice(&floats(&file, "logits")).view([rows, -1])
}

fn furthest(ours: &Tensor, theirs: &Tensor) -> f64 {
    (ours - theirs).abs().max().double_value(&[])
}

fn oracle(arguments: &[&Path]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/adapters.py");
    let output =
        Command::new(python()).arg(script).args(arguments).env("HF_HUB_OFFLINE", "1").output().unwrap();
    succeeded(&output);
}

fn make(folder: &Path) -> Cases {
    oracle(&[Path::new("make"), folder]);
    serde_json::from_str(&std::fs::read_to_string(folder.join("cases.json")).unwrap()).unwrap()
}

/// Fields that change what PEFT computes, or how it trains, and are not built.
const REFUSED: &[&str] = &[
    "peft_type",
    "task_type",
    "bias",
    "fan_in_fan_out",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
];

/// Values of init_lora_weights that say that the base was changed, or the rest of the adapter is not plain.
const STARTS: &[&str] = &["pissa", "olora", "corda", "eva", "loftq", "lora_ga", "mica"];

#[test]
fn python_adapters_are_computed_as_peft_does_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let Cases { ids, cases } = make(folder.path());
    let mut ours = Ours::new(ids);
    let harmless: BTreeSet<&str> = harmless_fields().map(|(field, _)| field).collect();
    let (mut faults, mut computed, mut refused) = (Vec::new(), 0, 0);
    for case in &cases {
        let Case { name, field, .. } = case;
        let found = ours.logits(&case.model, &case.path);
        let has_to_compute = match case.kind.as_str() {
            "input" => case.accept,
            _ if harmless.contains(field.as_str()) => Some(true),
            _ if REFUSED.contains(&field.as_str()) || STARTS.iter().any(|start| name.contains(start)) => {
                Some(false)
            }
            _ => None,
        };
        match found {
            Ok(logits) => {
                computed += 1;
                if has_to_compute == Some(false) || !case.loads {
                    faults.push(format!("{name}: computed; PEFT loads it: {}", case.loads));
                    continue;
                }
                let apart = furthest(&logits, &theirs(&case.path));
                if apart > 1e-4 {
                    faults.push(format!("{name}: {apart} from PEFT"));
                }
                if harmless.contains(field.as_str()) && !case.same {
                    faults.push(format!("{name} is not harmless: PEFT's logits change"));
                }
            }
            Err(error) => {
                refused += 1;
                let message = error.to_string();
                if has_to_compute == Some(true) || error.exit_code() != 2 || message.contains('\n') {
                    faults.push(format!("{name}: {message}"));
                }
                if has_to_compute == Some(false) && !field.is_empty() && !message.contains(field) {
                    faults.push(format!("{name}: the message does not name {field}: {message}"));
                }
                if message.len() - case.path.display().to_string().len() > 500 {
                    faults.push(format!("{name}: too long: {message}"));
                }
            }
        }
    }
    println!("{computed} computed, {refused} refused");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let inputs = cases.iter().filter(|case| case.kind == "input").count();
    assert!(inputs >= 40 && computed > 50 && refused > 40, "{inputs} inputs, {computed}, {refused}");
}

/// Adapters of which sites differ in rank or scale, trained on: one and two ranks save what PEFT loads, and a resumed
/// run saves the same bytes.
#[test]
fn mpi_adapters_of_several_ranks_are_trained_saved_and_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let Cases { ids, cases } = make(folder.path());
    let all = r#"["q_proj","k_proj","v_proj","o_proj","gate_proj","up_proj","down_proj"]"#;
    let by_expression = "ranks by expression, the first counts";
    let table: &[(&str, &str, &[&str])] = &[
        ("ranks by leaf", all, &[]),
        ("ranks and alphas with rslora", all, &["--lora.use_rslora", "true"]),
        (by_expression, all, &["--lora.rank_pattern", r#"{"layers\\.1\\..*v_proj": 6, "v_proj": 3}"#]),
        ("alphas by leaf and by layer", all, &[]),
        ("pickled", all, &[]),
        ("experts of another rank", r#"["q_proj","gate_up_proj","down_proj"]"#, &[]),
        ("experts with rslora", r#"["v_proj","gate_up_proj","down_proj"]"#, &["--lora.use_rslora", "true"]),
    ];
    let rows = folder.path().join("rows.jsonl");
    std::fs::write(&rows, format!("{}\n", json!({"input_ids": ids})).repeat(8)).unwrap();
    let datasets = json!([{"path": rows, "type": "tokenized"}]).to_string();
    let config = folder.path().join("run.yaml");
    std::fs::write(&config, "train:\n  lr: 1e-3\n  enable_mixed_precision: false\n  global_batch_size: 2\n  save_steps: 2\n  \
        lr_decay_style: constant\nlora:\n  lora_rank: 4\n  lora_alpha: 8\ndata:\n  sample_packing_method: none\n").unwrap();
    let arguments = |case: &Case, targets: &str, out: &Path| {
        [
            ["--config", config.to_str().unwrap()],
            ["--model.model_path", case.model.to_str().unwrap()],
            ["--data.datasets", &datasets],
            ["--lora.adapter_path", case.path.to_str().unwrap()],
            ["--lora.lora_target_modules", targets],
            ["--train.output_dir", out.to_str().unwrap()],
        ]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect::<Vec<String>>()
    };
    let mut steps: Vec<(PathBuf, PathBuf)> = Vec::new();
    for (number, (name, targets, more)) in table.iter().enumerate() {
        let case = cases.iter().find(|case| case.name == *name).unwrap();
        let run = |ranks: usize, out: &Path, last: &str, resume: &[&str]| {
            let arguments = arguments(case, targets, out);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let last = ["--train.max_steps", last];
            succeeded(&xorl(ranks, &[&arguments[..], &last, more, resume].concat()));
        };
        let outs = ["whole", "half"].map(|out| folder.path().join(format!("{out}-{number}")));
        let two = folder.path().join(format!("two-{number}"));
        run(1, &outs[0], "4", &[]);
        run(1, &outs[1], "2", &[]);
        run(1, &outs[1], "4", &["--train.load_checkpoint_path", "auto"]);
        run(2, &two, "4", &[]);
        let read = |out: &Path, file: &str| std::fs::read(out.join("weights/run/step_4").join(file)).unwrap();
        for file in ["adapter_model.safetensors", "adapter_config.json"] {
            assert_eq!(read(&outs[0], file), read(&outs[1], file), "{name}: {file} of the resumed run");
        }
        for (one, two) in metrics(&outs[0]).iter().zip(metrics(&two)) {
            let [one, two] = [one, &two].map(|line| line["loss"].as_f64().unwrap());
            assert!((one - two).abs() < 1e-5 * one, "{name}: one rank {one}, two {two}");
        }
        // The first loss is that of the adapter it starts from.
        let log_likelihood = theirs(&case.path).log_softmax(-1, None);
        let next = Tensor::from_slice(&ids[1..]).unsqueeze(1);
        let expected = -log_likelihood.narrow(0, 0, ids.len() as i64 - 1).gather(1, &next, false).mean(None);
        let expected = expected.double_value(&[]);
        let first = metrics(&outs[0])[0]["loss"].as_f64().unwrap();
        assert!((first - expected).abs() < 1e-4, "{name}: {first}, PEFT {expected}");
        steps.extend([&outs[0], &two].map(|out| (case.model.clone(), out.join("weights/run/step_4"))));
    }
    // Independent gate and up are one to PEFT, with √2 of the alpha.
    let moe = &cases.iter().find(|case| case.name == "experts").unwrap().model;
    let fresh = folder.path().join("fresh");
    let of_fresh = [
        ["--config", config.to_str().unwrap()],
        ["--model.model_path", moe.to_str().unwrap()],
        ["--data.datasets", &datasets],
        ["--train.output_dir", fresh.to_str().unwrap()],
        ["--lora.lora_target_modules", r#"["q_proj","gate_proj","up_proj","down_proj"]"#],
        ["--lora.use_rslora", "true"],
        ["--lora.lora_b_init_std", "0.1"],
    ];
    succeeded(&xorl(2, of_fresh.as_flattened()));
    steps.push((moe.clone(), fresh.join("weights/run/step_4")));
    // A fresh adapter by patterns, on whose ranks a resume insists.
    let fresh = folder.path().join("by patterns");
    let patterns = |ranks: &'static str| {
        [["--train.output_dir", fresh.to_str().unwrap()], ["--lora.rank_pattern", ranks]].concat()
    };
    let alphas = ["--lora.alpha_pattern", r#"{"layers.1.*experts.down_proj": 3, "q_proj": 5}"#];
    let with = |ranks: usize, more: &[&str]| xorl(ranks, &[of_fresh.as_flattened(), &alphas, more].concat());
    let ranks = patterns(r#"{"(gate|up)_proj": 2, "layers.0.*_proj": 7}"#);
    succeeded(&with(2, &ranks));
    steps.push((moe.clone(), fresh.join("weights/run/step_4")));
    let on = ["--train.load_checkpoint_path", "auto", "--train.max_steps", "5"];
    succeeded(&with(1, &[&ranks[..], &on].concat()));
    let other = patterns(r#"{"(gate|up)_proj": 3, "layers.0.*_proj": 7}"#);
    let line = failed(&with(1, &[&other[..], &on].concat()), 2);
    assert!(
        line.contains("has rank 2") && line.contains("lora.rank_pattern and alpha_pattern rank 3"),
        "{line}"
    );
    for (pattern, words) in [
        (r#"{"gate_proj": 2}"#, "lora.rank_pattern: model.layers"),
        (r#"{"gate_proj": 2}"#, "set lora.lora_export_format: per_expert"),
        (r#"{"v_proj": 2}"#, "\"v_proj\" matches no target of the adapter"),
    ] {
        let line = failed(&with(1, &[&patterns(pattern)[..], &["--train.overwrite", "true"]].concat()), 2);
        assert!(line.contains(words), "{line}");
    }
    // Saves of the server have the adapters that they were made of.
    let mut ours = Ours::new(ids);
    for (number, (name, ..)) in table.iter().enumerate() {
        let case = cases.iter().find(|case| case.name == *name).unwrap();
        let save = folder.path().join(format!("saves/weights/policy/{number}"));
        ours.save(&case.model, &case.path, save.clone());
        let [was, is] = [&case.path, &save].map(|path| ours.logits(&case.model, path).unwrap());
        assert_eq!(was, is, "{name}");
        steps.push((case.model.clone(), save));
    }
    let pairs: Vec<&Path> = steps.iter().flat_map(|(model, step)| [model.as_path(), step]).collect();
    oracle(&[&[Path::new("reload"), folder.path()], &pairs[..]].concat());
    for (model, step) in &steps {
        let apart = furthest(&ours.logits(model, step).unwrap(), &theirs(step));
        assert!(apart < 1e-4, "{}: {apart} from PEFT", step.display());
    }
    // A rank that is not the adapter's, and targets that it lacks.
    let case = cases.iter().find(|case| case.name == "two layers").unwrap();
    let nowhere = folder.path().join("no");
    let refused = |more: &[&str]| {
        let arguments = arguments(case, all, &nowhere);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        failed(&xorl(1, &[&arguments[..], more].concat()), 2)
    };
    let line = refused(&[]);
    assert!(line.contains(" and 11 more are missing") && line.len() < 700, "{line}");
    let line = refused(&["--lora.use_rslora", "true"]);
    assert!(line.contains("use_rslora false, the run"), "{line}");
}
