//! `training_state/` of a step or of a server's save: what goes on from it besides the adapter. `trainer_state.json`
//! says how the adapter is cut ([`AdapterState`]), and of a step where the run stands ([`TrainerState`]). The values
//! are in [`pieces`](super::pieces).

use super::{
    CheckpointError, io,
    pieces::optimizer_file,
    publish::{MANIFEST, Manifest},
    reshard::{self, Cut},
    steps,
};
use crate::{
    config::{MetricForBest, Optimizer},
    data::schedule::DataCursor,
    lora::LoraShapes,
    model::quantized::{self, Quantization},
    optim::Schedule,
    regular_file,
    shard::FlatRegion,
    weights::{SourceError, WeightSource},
};
use fail::fail_point;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs, path::Path};

/// The folder in a step.
pub const FOLDER: &str = "training_state";
pub(super) const STATE_FILE: &str = "training_state/trainer_state.json";
/// The format that is written. It changes when older programs could not read it; see [`upgrade`].
const FORMAT: u32 = 4;

/// An adapter that is trained, as its pieces are stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterState {
    pub world: usize,
    /// Ranks that own a piece and have a file: the first of `world`.
    pub shards: usize,
    pub optimizer: OptimizerState,
    /// Ranks and scales of the adapter.
    pub lora: LoraShapes,
    /// Digest of the base: [`quantized::digest`].
    pub base: String,
    /// The base of training lacks what the adapter starts with: see [`crate::lora::pissa`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pissa: bool,
    /// Storage of the base, if it is quantised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
    /// The regions of the adapter, as they are cut.
    pub regions: Vec<FlatRegion>,
    /// Present where the pieces have the gradient of passes since the last update.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accumulated: Option<Accumulated>,
}

/// Passes with backward since the last update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accumulated {
    pub passes: u64,
    /// Their targets that count.
    pub valid: u64,
}

/// Progress of a run after a step, and the identity of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    pub format: u32,
    pub run_id: String,
    /// Steps made.
    pub step: usize,
    pub total_steps: usize,
    /// The epoch of the last step made.
    pub epoch: usize,
    /// Place in the data at which the next step begins.
    pub position: DataCursor,
    pub global_batch_size: usize,
    pub seed: u64,
    /// `lora.lora_dropout`; 0 in steps that do not say.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lora_dropout: f64,
    /// SHA-256 of the adapter of the reference, where the loss compares with a base with an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Merges of adapters into the base so far. Where there is one, the base is the step's `model/`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub merges: u64,
    /// Evaluations so far, in runs with such.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluations: Option<EvaluationState>,
    /// The step is to be evaluated before the next one: a signal came before that was done.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub evaluation_due: bool,
    #[serde(flatten)]
    pub adapter: AdapterState,
    pub schedule: Schedule,
    pub data: DataIdentity,
}

/// Evaluations of a run, as the choice of the best step and early stopping go on from them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationState {
    pub metric: MetricForBest,
    /// [`crate::data::Dataset::validation_fingerprint`]: values on other data are not compared.
    pub data: String,
    /// The best step with its value; `None` as long as no value was finite.
    pub best: Option<BestStep>,
    /// Evaluations in a row that were not better.
    pub since: usize,
}

/// The step of a run with the lowest value.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestStep {
    pub step: usize,
    pub value: f64,
}

fn is_zero<T: Default + PartialEq>(number: &T) -> bool {
    *number == T::default()
}

/// The base that an adapter was trained on, as its training state says.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainedBase {
    pub digest: String,
    /// Merges that have changed it during training: without that base the adapter is worth little.
    pub merges: u64,
    pub quantization: Option<Quantization>,
}

impl TrainedBase {
    /// That of the adapter in `folder`; `None` without training state.
    ///
    /// # Errors
    /// Training state that cannot be read.
    pub fn of(folder: &Path) -> Result<Option<Self>, CheckpointError> {
        if !folder.join(MANIFEST).is_file() {
            return Ok(None);
        }
        let Some(state) = read_json(folder, &Manifest::read(folder)?)? else { return Ok(None) };
        let quantization = serde_json::from_value(state["quantization"].clone()).map_err(|error| {
            CheckpointError::Format { path: folder.join(STATE_FILE), reason: error.to_string() }
        })?;
        let digest = state["base"].as_str().map(str::to_owned);
        let merges = state["merges"].as_u64().unwrap_or(0);
        Ok(digest.map(|digest| Self { digest, merges, quantization }))
    }

    /// True if the files of `source` are this base.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn is(&self, source: &dyn WeightSource) -> Result<bool, SourceError> {
        Ok(self.digest == quantized::digest(source, self.quantization.as_ref())?)
    }
}

/// The optimizer besides its state tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerState {
    pub kind: Optimizer,
    /// Updates that the state tensors have seen; skipped steps are none.
    pub updates: u64,
    /// Its numbers by field of section `train`; see [`crate::optim::Number`].
    pub numbers: BTreeMap<String, f64>,
}

/// The data that positions refer to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataIdentity {
    pub rows: usize,
    /// [`crate::data::Dataset::fingerprint`]
    pub fingerprint: String,
}

impl TrainerState {
    /// The format that this program writes.
    pub const FORMAT: u32 = FORMAT;

    /// Writes `trainer_state.json` into the step directory `step`.
    pub fn write(&self, step: &Path) -> Result<(), CheckpointError> {
        let mut json = json!(self);
        // The order in which files of this format have always been written.
        for field in ["lora", "base", "regions"] {
            if let Some(object) = json.as_object_mut()
                && let Some(value) = object.shift_remove(field)
            {
                object.insert(field.to_owned(), value);
            }
        }
        write_json(&json, step)
    }

    /// Reads and checks the state of the whole step `step`. Afterwards its account of pieces can be relied on, and
    /// every file that it needs is in the step.
    ///
    /// # Errors
    /// A step without training state, a file that is no state, or one that contradicts itself.
    pub fn read(step: &Path) -> Result<Self, CheckpointError> {
        let (path, manifest) = (step.join(STATE_FILE), Manifest::read(step)?);
        let format = |reason: String| CheckpointError::Format { path: path.clone(), reason };
        let unfit = |reason: String| CheckpointError::Unfit { path: step.to_owned(), reason };
        let from_adapter = "start from its adapter with lora.adapter_path";
        let json = read_json(step, &manifest)?;
        let json = json.ok_or_else(|| unfit(format!("it has no {STATE_FILE}; {from_adapter}")))?;
        if json.get("run_id").is_none() {
            return Err(unfit(format!("it is a save of a server, not a step of a run; {from_adapter}")));
        }
        let state: Self = serde_json::from_value(json).map_err(|error| format(error.to_string()))?;
        check_place(step, state.step)?;
        if state.global_batch_size == 0 {
            return Err(format("global_batch_size is 0".into()));
        }
        state.adapter.check(&manifest).map_err(format)?;
        fail_point!("load.state");
        Ok(state)
    }
}

/// Checks that the state of step `made` is in the folder `step` of that step, if in a step's folder at all.
///
/// # Errors
/// It is that of another step.
pub(super) fn check_place(step: &Path, made: usize) -> Result<(), CheckpointError> {
    match steps::number(step).filter(|&number| number != made) {
        Some(_) => Err(CheckpointError::Format {
            path: step.join(STATE_FILE),
            reason: format!("it is the state of step {made}"),
        }),
        None => Ok(()),
    }
}

/// The steps made and those of the whole run, as the training state of the folder `step` says. Nothing is checked.
pub fn progress_of(step: &Path) -> Option<(usize, usize)> {
    let json: Value = serde_json::from_slice(&regular_file::read(&step.join(STATE_FILE)).ok()?).ok()?;
    let count = |key: &str| json[key].as_u64().and_then(|count| usize::try_from(count).ok());
    Some((count("step")?, count("total_steps")?))
}

impl AdapterState {
    /// Writes `trainer_state.json` into `folder`, a save that belongs to no run.
    pub fn write(&self, folder: &Path) -> Result<(), CheckpointError> {
        let mut json = json!({"format": FORMAT});
        if let (Value::Object(all), Value::Object(own)) = (&mut json, json!(self)) {
            all.extend(own);
        }
        write_json(&json, folder)
    }

    /// Reads and checks the state of the whole save or step `folder`; `None`: it has no training state. Afterwards its
    /// account of pieces can be relied on, and every file that it needs is there.
    ///
    /// # Errors
    /// A file that is no state, or one that contradicts itself.
    pub fn read(folder: &Path) -> Result<Option<Self>, CheckpointError> {
        let manifest = Manifest::read(folder)?;
        let Some(json) = read_json(folder, &manifest)? else { return Ok(None) };
        let format = |reason: String| CheckpointError::Format { path: folder.join(STATE_FILE), reason };
        let state: Self = serde_json::from_value(json).map_err(|error| format(error.to_string()))?;
        state.check(&manifest).map_err(format)?;
        Ok(Some(state))
    }

    fn check(&self, manifest: &Manifest) -> Result<(), String> {
        if self.shards > self.world {
            return Err(format!("{} shards of {} ranks", self.shards, self.world));
        }
        reshard::check(self.cut())?;
        match self.piece_files().find(|file| !manifest.lists(file)) {
            Some(file) => Err(format!("it needs {file}, which is not in the step")),
            None => Ok(()),
        }
    }

    /// Its regions, as they are cut.
    pub fn cut(&self) -> Cut<'_> {
        Cut { regions: &self.regions, shards: self.shards }
    }

    /// The files with the pieces of all shards, in a step.
    pub fn piece_files(&self) -> impl Iterator<Item = String> {
        (0..self.shards).map(|rank| optimizer_file(rank, self.world))
    }
}

/// The adapter in the state of the whole step or save `folder`, after all checks of a resume or a load; `None`: it has
/// no training state.
///
/// # Errors
/// Those of [`TrainerState::read`] for a step, of [`AdapterState::read`] for a save.
pub(super) fn checked(folder: &Path) -> Result<Option<AdapterState>, CheckpointError> {
    match read_json(folder, &Manifest::read(folder)?)? {
        Some(json) if json.get("run_id").is_some() => {
            TrainerState::read(folder).map(|state| Some(state.adapter))
        }
        _ => AdapterState::read(folder),
    }
}

/// True if the folder that has `manifest` has training state.
pub fn is_in(manifest: &Manifest) -> bool {
    manifest.lists(STATE_FILE)
}

fn write_json(json: &Value, folder: &Path) -> Result<(), CheckpointError> {
    let path = folder.join(STATE_FILE);
    let text = serde_json::to_string_pretty(json).unwrap_or_default();
    fs::write(&path, text + "\n").map_err(io(&path))?;
    fail_point!("state.written");
    Ok(())
}

/// The JSON of the state of `folder`, brought to the present format; `None`: it has none.
fn read_json(folder: &Path, manifest: &Manifest) -> Result<Option<Value>, CheckpointError> {
    if !is_in(manifest) {
        return Ok(None);
    }
    let format = |reason: String| CheckpointError::Format { path: folder.join(STATE_FILE), reason };
    let text =
        regular_file::read_to_string(&folder.join(STATE_FILE)).map_err(|error| format(error.to_string()))?;
    let mut json: Value = serde_json::from_str(&text).map_err(|error| format(error.to_string()))?;
    match json["format"].as_u64() {
        Some(known) if (1..=u64::from(FORMAT)).contains(&known) => upgrade(&mut json, known),
        Some(other) => return Err(format(format!("format {other} is not known here, only 1 to {FORMAT}"))),
        None => return Err(format("it has no format".into())),
    }
    Ok(Some(json))
}

/// Brings the JSON of an older format to the present one; files of pieces stay as they are.
///
/// - 1: there were no groups of experts.
/// - 2: regions had no names and stood under `units`. Their pieces are stored as `unit.{place in the list}.{tensor}`,
///   so `unit.{place}` becomes the name. AdamW's betas and epsilon were fixed.
/// - 3: all sites had one rank, and the scale was alpha / rank.
fn upgrade(json: &mut Value, format: u64) {
    let Some(state) = json.as_object_mut() else { return };
    if let Some(lora) = state.get_mut("lora").and_then(Value::as_object_mut).filter(|_| format < 4) {
        lora.insert("use_rslora".into(), json!(false));
        lora.insert("by_site".into(), json!({}));
    }
    state.insert("format".into(), json!(FORMAT));
    if format >= 3 {
        return;
    }
    if let Some(mut units) = state.remove("units") {
        for (place, unit) in units.as_array_mut().into_iter().flatten().enumerate() {
            if let Some(unit) = unit.as_object_mut() {
                unit.insert("name".into(), json!(format!("unit.{place}")));
                unit.entry("expert_groups").or_insert(json!(1));
            }
        }
        state.insert("regions".into(), units);
    }
    if let Some(optimizer) = state.get_mut("optimizer").and_then(Value::as_object_mut) {
        let numbers = match optimizer.get("kind") {
            Some(kind) if kind == "adamw" => {
                json!({"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8})
            }
            _ => json!({}),
        };
        optimizer.insert("numbers".into(), numbers);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        FolderWriter,
        pieces::{MASTER, Pieces, read_pieces, write_pieces},
        publish::KnownHashes,
    };
    use super::*;
    use crate::{config::TrainArgs, lora::LoraShape, shard::PlacedParameter};
    use proptest::prelude::*;
    use std::path::PathBuf;

    /// Two regions over `shards`: one of 10 + 6 elements, one without parameters.
    fn regions(shards: usize) -> Vec<FlatRegion> {
        let placed = |name: &str, shape, first| PlacedParameter { name: name.into(), shape, first };
        let parameters = vec![placed("a", [2, 5], 0), placed("b", [3, 2], 12)];
        let piece = 18usize.next_multiple_of(4 * shards) / shards;
        let region = |name: &str, piece, parameters| {
            let name = name.to_owned();
            FlatRegion { name, piece, expert_groups: 1, parameters }
        };
        vec![region("layers.0", piece, parameters), region("layers.1", 0, vec![])]
    }

    const STATE_NAMES: &[&str] = &["exp_avg", "exp_avg_sq"];

    fn state(world: usize) -> TrainerState {
        let numbers = [("adam_beta1", 0.9), ("adam_beta2", 0.95), ("adam_epsilon", 1e-8)];
        TrainerState {
            format: FORMAT,
            run_id: "run".into(),
            step: 10,
            total_steps: 20,
            epoch: 1,
            position: DataCursor { epoch: 1, row: 20 },
            global_batch_size: 5,
            seed: 42,
            lora_dropout: 0.0,
            reference: None,
            merges: 0,
            evaluations: None,
            evaluation_due: false,
            adapter: AdapterState {
                world,
                shards: world,
                optimizer: OptimizerState {
                    kind: Optimizer::Adamw,
                    updates: 9,
                    numbers: numbers.map(|(name, value)| (name.to_owned(), value)).into(),
                },
                lora: LoraShapes {
                    by_site: [(
                        "a".to_owned(),
                        LoraShape { use_rslora: true, ..LoraShape::new(2, 0.1 + 0.2) },
                    )]
                    .into(),
                    ..LoraShape::new(4, 8.0).into()
                },
                base: "b".into(),
                pissa: false,
                quantization: None,
                regions: regions(world),
                accumulated: None,
            },
            schedule: Schedule::new(&TrainArgs { lr: 0.1 + 0.2, ..TrainArgs::default() }, 20),
            data: DataIdentity { rows: 30, fingerprint: "f".into() },
        }
    }

    /// The same on an adapter of one rank and scale.
    fn with_one_shape(world: usize) -> TrainerState {
        let mut state = state(world);
        state.adapter.lora = LoraShape::new(4, 8.0).into();
        state
    }

    /// The pieces of shard `rank`; values say where they belong. Without moments if `names` is empty.
    fn pieces(regions: &[FlatRegion], rank: usize, names: &[&str]) -> Pieces {
        let mut pieces = Pieces::default();
        for region in regions {
            let value = |what: usize, at: usize| {
                let at = rank * region.piece + at;
                let inside = |p: &PlacedParameter| p.elements().unwrap().contains(&at);
                if region.parameters.iter().any(inside) { (what * 1000 + at) as f32 + 0.5 } else { 0.0 }
            };
            for (what, tensor) in [MASTER].iter().chain(names).enumerate() {
                let values = (0..region.piece).map(|at| value(what + 1, at)).collect();
                pieces.insert(&region.name, tensor, values);
            }
        }
        pieces
    }

    fn read_all(
        step: &Path,
        state: &TrainerState,
        own: Cut,
        shard: usize,
    ) -> Result<Pieces, CheckpointError> {
        read_pieces(step, &state.adapter, own, shard, STATE_NAMES)
    }

    /// A published step of `world` ranks; `change` is done to its hidden directory.
    fn step_of(run: &Path, world: usize, change: impl FnOnce(&Path)) -> PathBuf {
        let writer = FolderWriter::of_step(run, 10).unwrap();
        fs::create_dir(writer.directory().join(FOLDER)).unwrap();
        state(world).write(writer.directory()).unwrap();
        for rank in 0..world {
            let own = pieces(&regions(world), rank, STATE_NAMES);
            write_pieces(writer.directory(), rank, world, &own).unwrap();
        }
        change(writer.directory());
        writer.publish(&mut KnownHashes::default()).unwrap()
    }

    #[test]
    fn any_world_takes_over_what_another_stored() {
        for (from, to) in [(1, 1), (2, 2), (2, 1), (1, 3), (3, 2)] {
            let run = tempfile::tempdir().unwrap();
            let step = step_of(run.path(), from, |_| ());
            let read = TrainerState::read(&step).unwrap();
            assert_eq!(read, state(from), "every bit of every number survives the text");
            let text = fs::read_to_string(step.join(STATE_FILE)).unwrap();
            let fields =
                ["seed", "world", "shards", "optimizer", "schedule", "data", "lora", "base", "regions"];
            let at = fields.map(|field| text.find(&format!("\n  \"{field}\": ")).unwrap());
            assert!(at.is_sorted() && !text.contains("accumulated"), "as format 4 always was: {text}");
            for shard in 0..to {
                let own = read_all(&step, &read, Cut { regions: &regions(to), shards: to }, shard).unwrap();
                assert_eq!(own, pieces(&regions(to), shard, STATE_NAMES), "{from} to {to}, shard {shard}");
            }
        }
    }

    #[test]
    fn an_optimizer_without_state_stores_masters_alone() {
        let run = tempfile::tempdir().unwrap();
        let step = step_of(run.path(), 1, |step| {
            write_pieces(step, 0, 1, &pieces(&regions(1), 0, &[])).unwrap();
        });
        let (read, own) = (TrainerState::read(&step).unwrap(), regions(1));
        let own = Cut { regions: &own, shards: 1 };
        assert_eq!(read_pieces(&step, &read.adapter, own, 0, &[]).unwrap(), pieces(&regions(1), 0, &[]));
        let error = read_all(&step, &read, own, 0).unwrap_err().to_string();
        assert!(error.contains("layers.0.exp_avg is missing"), "{error}");
    }

    /// The text and the keys that programs of format 1 and 2 wrote.
    #[test]
    fn older_formats_are_read() {
        for format in [1, 2] {
            let run = tempfile::tempdir().unwrap();
            let step = step_of(run.path(), 2, |step| {
                let parameters = json!([{"name": "a", "shape": [2, 5], "first": 0},
                    {"name": "b", "shape": [3, 2], "first": 12}]);
                let mut units = json!([{"piece": 12, "expert_groups": 1, "parameters": parameters},
                    {"piece": 0, "expert_groups": 1, "parameters": []}]);
                if format == 1 {
                    for unit in units.as_array_mut().unwrap() {
                        unit.as_object_mut().unwrap().remove("expert_groups");
                    }
                }
                let old = json!({"format": format, "run_id": "run", "step": 10, "total_steps": 20, "epoch": 1,
                    "position": {"epoch": 1, "row": 20}, "global_batch_size": 5, "seed": 42, "world": 2, "shards": 2,
                    "optimizer": {"kind": "adamw", "updates": 9}, "schedule": state(2).schedule,
                    "data": {"rows": 30, "fingerprint": "f"}, "lora": {"rank": 4, "alpha": 8.0}, "base": "b",
                    "units": units});
                fs::write(step.join(STATE_FILE), old.to_string()).unwrap();
                for rank in 0..2 {
                    let mut own = pieces(&regions(2), rank, STATE_NAMES);
                    let renamed = ["layers.0", "layers.1"].iter().enumerate();
                    let renamed =
                        renamed.map(|(i, name)| (format!("unit.{i}"), own.0.remove(*name).unwrap()));
                    write_pieces(step, rank, 2, &Pieces(renamed.collect())).unwrap();
                }
            });
            let read = TrainerState::read(&step).unwrap();
            let mut expected = with_one_shape(2);
            for (place, region) in expected.adapter.regions.iter_mut().enumerate() {
                region.name = format!("unit.{place}");
            }
            assert_eq!(read, expected);
            for shard in 0..3 {
                let own = read_all(&step, &read, Cut { regions: &regions(3), shards: 3 }, shard).unwrap();
                assert_eq!(own, pieces(&regions(3), shard, STATE_NAMES), "format {format}, shard {shard}");
            }
        }
    }

    #[test]
    fn format_3_had_one_rank_and_scale() {
        let run = tempfile::tempdir().unwrap();
        let step = step_of(run.path(), 1, |step| {
            let path = step.join(STATE_FILE);
            let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
            (json["format"], json["lora"]) = (json!(3), json!({"rank": 4, "alpha": 8.0}));
            fs::write(&path, json.to_string()).unwrap();
        });
        assert_eq!(TrainerState::read(&step).unwrap(), with_one_shape(1));
    }

    #[test]
    fn states_that_cannot_be_are_refused_with_their_file() {
        let said = |field: &str, value: Value, words: &str| {
            let run = tempfile::tempdir().unwrap();
            let step = step_of(run.path(), 2, |step| {
                let path = step.join(STATE_FILE);
                let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
                *json.pointer_mut(field).unwrap() = value;
                fs::write(&path, json.to_string()).unwrap();
            });
            let error = TrainerState::read(&step).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let message = error.to_string();
            assert!(message.contains("trainer_state.json") && message.contains(words), "{field}: {message}");
            assert_eq!(message.lines().count(), 1);
        };
        said("/format", json!(5), "format 5 is not known");
        said("/regions/0/expert_groups", json!(0), "0 groups of experts over 2 shards");
        said("/format", json!("one"), "no format");
        said("/step", json!(-1), "invalid value");
        said("/step", json!(null), "invalid type");
        said("/step", json!(11), "the state of step 11");
        said("/global_batch_size", json!(0), "global_batch_size is 0");
        said("/shards", json!(0), "0 shards");
        said("/shards", json!(3), "3 shards of 2 ranks");
        said("/world", json!(4), "optimizer-0-of-4.safetensors");
        said("/regions/0/piece", json!(2), "reaches past");
        said("/regions/1/name", json!("layers.0"), "region layers.0 is there twice");
        said("/regions/0/piece", json!(u64::MAX), "larger than memory");
        said("/optimizer/kind", json!("distsignsgd"), "distsignsgd");
        let run = tempfile::tempdir().unwrap();
        let step = step_of(run.path(), 1, |step| fs::remove_file(step.join(STATE_FILE)).unwrap());
        let message = TrainerState::read(&step).unwrap_err().to_string();
        assert!(message.contains("lora.adapter_path"), "{message}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn broken_files_are_errors(
            which in 0usize..2, cut in 0usize..400,
            flips in prop::collection::vec((0usize..2000, any::<u8>()), 0..6),
        ) {
            let run = tempfile::tempdir().unwrap();
            let step = step_of(run.path(), 1, |step| {
                let path = step.join([STATE_FILE, &optimizer_file(0, 1)][which]);
                let mut bytes = fs::read(&path).unwrap();
                for (at, byte) in flips {
                    let at = at % bytes.len();
                    bytes[at] = byte;
                }
                bytes.truncate(bytes.len() - cut.min(bytes.len()));
                fs::write(&path, bytes).unwrap();
            });
            // Values, or one typed error of the user's: never a panic, whatever a file claims.
            let own = regions(1);
            let own = Cut { regions: &own, shards: 1 };
            let read = TrainerState::read(&step).and_then(|state| read_all(&step, &state, own, 0));
            if let Err(error) = read {
                prop_assert_eq!(error.exit_code(), 2);
                prop_assert_eq!(error.to_string().lines().count(), 1);
            }
        }
    }
}
