//! Files of a run's output directory.

use super::{Folder, files};
use std::{cell::OnceCell, path::Path};
use xorl_dist::{
    checkpoint::{
        TrainerState,
        adapter_config::read_config,
        peft::AdapterFolder,
        pieces::read_pieces,
        publish::{Manifest, verify},
        reshard::Cut,
        saves,
        state::{AdapterState, TrainedBase, progress_of},
    },
    config::TrainArgs,
    lora::targets::Projection,
    model::{base_plan::all_projections, hf_config::HfModel},
    report,
    server::journal,
    train::metrics::{Logging, METRICS_FILE, Metrics},
};

/// The linear layers of a small model with experts.
fn with_projections(folder: &Folder, read: impl FnOnce(&[Projection])) {
    thread_local! {
        static ALL: OnceCell<Vec<Projection>> = const { OnceCell::new() };
    }
    let model = || {
        let bytes = include_bytes!("../../fixtures/steps/mixture/config.json");
        all_projections(&HfModel::open(&folder.put("model/config.json", Some(bytes))).expect("a model").spec)
    };
    ALL.with(|all| read(all.get_or_init(model)));
}

/// `adapter_config.json` and `adapter_model.safetensors`.
pub fn adapter(input: &[u8], folder: &Folder) {
    let [config, tensors] = files(input);
    folder.put("adapter/adapter_config.json", config);
    folder.put("adapter/adapter_model.safetensors", tensors);
    let path = folder.path().join("adapter");
    let _ = read_config(&path).map(|config| config.patterns().is_ok());
    let Ok(stored) = AdapterFolder::open(&path) else { return };
    with_projections(folder, |projections| drop(stored.adapter(projections)));
}

/// `manifest.json`, `trainer_state.json`, and the pieces of one rank, which stand for those of both.
pub fn state(input: &[u8], folder: &Folder) {
    let [manifest, state, pieces] = files(input);
    folder.put("run/step_6/manifest.json", manifest);
    folder.put("run/step_6/training_state/trainer_state.json", state);
    for rank in 0..2 {
        folder.put(&format!("run/step_6/training_state/optimizer-{rank}-of-2.safetensors"), pieces);
    }
    let step = folder.path().join("run/step_6");
    let _ = Manifest::read(&step).map(|manifest| (manifest.bytes(), manifest.has_entry("model")));
    let _ = verify(&step);
    let _ = progress_of(&step);
    let _ = TrainedBase::of(&step);
    let _ = saves::describe(&step);
    let _ = AdapterState::read(&step);
    let Ok(state) = TrainerState::read(&step) else { return };
    restored(&step, &state.adapter);
}

/// Reads the pieces of `state` as two worlds would.
fn restored(step: &Path, state: &AdapterState) {
    // The run that resumes has regions of its own, which a file cannot make larger than its model.
    let elements: usize = state.regions.iter().map(|region| region.piece).fold(0, usize::saturating_add);
    if elements.saturating_mul(state.shards) > 1 << 16 {
        return;
    }
    let mut whole = state.regions.clone();
    for region in &mut whole {
        (region.piece, region.expert_groups) = (region.piece * state.shards, 1);
    }
    let _ = read_pieces(step, state, state.cut(), state.shards - 1, &["exp_avg", "exp_avg_sq"]);
    let _ = read_pieces(step, state, Cut { regions: &whole, shards: 1 }, 0, &["exp_avg"]);
}

/// `metrics.jsonl`, `config.yaml`, `training_metrics.json`, and the journal of a server.
pub fn metrics(input: &[u8], folder: &Folder) {
    let [lines, config, summary, states] = files(input);
    let journal = folder.put("journal", states);
    let _ = journal::read(&journal);
    folder.put("out/config.yaml", config);
    folder.put("out/training_metrics.json", summary);
    folder.put(&format!("out/{METRICS_FILE}"), lines);
    let output = folder.path().join("out");
    let runs = report::runs_of(&output).expect("files that can be read");
    let names = report::names(&runs);
    report::html(&runs, &names, 0).expect("files that can be read");
    report::table(&runs, &names, 0);
    let logging = Logging { tensorboard: None, ..Logging::from(&TrainArgs::default()) };
    drop(Metrics::open(&output, 5, Some(2), &logging));
    report::read_rows(&output).expect("files that can be read");
}
