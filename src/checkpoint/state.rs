//! `training_state/` of a step: what a resume needs beyond the adapter. `trainer_state.json` says where the run stands,
//! `optimizer-{rank}-of-{world}.safetensors` holds the fp32 masters and moments of one rank's pieces.
//!
//! With replicas only the ranks of the first copy write, which own all pieces between them: as many files as shards.

use super::{
    CheckpointError, io,
    publish::{Manifest, sync},
    reshard::{self, Cut, Move, UnitLayout},
    steps,
};
use crate::{config::Optimizer, data::schedule::DataCursor, optim::Schedule};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
};

/// The folder in a step.
pub const FOLDER: &str = "training_state";
const STATE_FILE: &str = "training_state/trainer_state.json";
/// Changes when older programs could not read it: since 2 experts may be divided over groups.
const FORMAT: u32 = 2;

/// Where a run stands after a step, and what it was, so that another one cannot take it for its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    pub format: u32,
    pub run_id: String,
    /// Steps made.
    pub step: usize,
    pub total_steps: usize,
    /// The epoch of the last step made.
    pub epoch: usize,
    /// Where the next step begins in the data.
    pub position: DataCursor,
    pub global_batch_size: usize,
    pub seed: u64,
    /// Ranks, and how many of them, the first, own a piece and have a file.
    pub world: usize,
    pub shards: usize,
    pub optimizer: OptimizerState,
    pub schedule: Schedule,
    pub data: DataIdentity,
    pub lora: LoraIdentity,
    /// Digest of the base; see `train::save`.
    pub base: String,
    /// By unit: what lies where in its flat space, and how it is cut.
    pub units: Vec<UnitLayout>,
}

/// The optimizer besides its moments.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimizerState {
    pub kind: Optimizer,
    /// Updates that the moments have seen: skipped steps are none.
    pub updates: u64,
}

/// The data that positions refer to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataIdentity {
    pub rows: usize,
    /// [`crate::data::Dataset::fingerprint`]
    pub fingerprint: String,
}

/// Rank and scale of the adapter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraIdentity {
    pub rank: usize,
    pub alpha: f64,
}

/// What one rank owns of one unit: flat fp32 `[piece elements]` each.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UnitPieces {
    pub master: Vec<f32>,
    /// Both empty when the optimizer keeps none.
    pub exp_avg: Vec<f32>,
    pub exp_avg_sq: Vec<f32>,
}

impl UnitPieces {
    fn zeros(elements: usize, moments: bool) -> Self {
        let moment = vec![0.0; if moments { elements } else { 0 }];
        Self { master: vec![0.0; elements], exp_avg: moment.clone(), exp_avg_sq: moment }
    }

    /// The tensors by the last part of their name.
    fn tensors(&self) -> [(&'static str, &Vec<f32>); 3] {
        [("master", &self.master), ("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)]
    }

    fn tensors_mut(&mut self) -> [(&'static str, &mut Vec<f32>); 3] {
        [("master", &mut self.master), ("exp_avg", &mut self.exp_avg), ("exp_avg_sq", &mut self.exp_avg_sq)]
    }
}

impl TrainerState {
    /// The format that this program writes.
    pub const FORMAT: u32 = FORMAT;

    /// Writes `trainer_state.json` into the step directory `step`.
    pub fn write(&self, step: &Path) -> Result<(), CheckpointError> {
        let path = step.join(STATE_FILE);
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        fs::write(&path, text + "\n").map_err(io(&path))
    }

    /// Reads and checks the state of the whole step `step`. What it says of pieces can be relied on afterwards, and
    /// every file that it needs is in the step.
    pub fn read(step: &Path) -> Result<Self, CheckpointError> {
        let (path, manifest) = (step.join(STATE_FILE), Manifest::read(step)?);
        let unfit = |reason: String| CheckpointError::Unfit { path: step.to_owned(), reason };
        if !manifest.lists(STATE_FILE) {
            return Err(unfit(format!(
                "it has no {STATE_FILE}; start from its adapter with lora.adapter_path"
            )));
        }
        let format = |reason: String| CheckpointError::Format { path: path.clone(), reason };
        let text = fs::read_to_string(&path).map_err(|error| format(error.to_string()))?;
        let json: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| format(error.to_string()))?;
        match json["format"].as_u64() {
            Some(known) if (1..=u64::from(FORMAT)).contains(&known) => {}
            Some(other) => {
                return Err(format(format!("format {other} is not known here, only 1 to {FORMAT}")));
            }
            None => return Err(format("it has no format".into())),
        }
        let state: Self = serde_json::from_value(json).map_err(|error| format(error.to_string()))?;
        if steps::number(step).is_some_and(|number| number != state.step) {
            return Err(format(format!("it is the state of step {}", state.step)));
        }
        state.check(&manifest).map_err(format)?;
        Ok(state)
    }

    fn check(&self, manifest: &Manifest) -> Result<(), String> {
        if self.global_batch_size == 0 {
            return Err("global_batch_size is 0".into());
        }
        if self.shards > self.world {
            return Err(format!("{} shards of {} ranks", self.shards, self.world));
        }
        reshard::check(self.cut())?;
        match self.piece_files().find(|file| !manifest.lists(file)) {
            Some(file) => Err(format!("it needs {file}, which is not in the step")),
            None => Ok(()),
        }
    }

    /// Its units, as they are cut.
    pub fn cut(&self) -> Cut<'_> {
        Cut { units: &self.units, shards: self.shards }
    }

    /// The files with the pieces of all shards, in a step.
    pub fn piece_files(&self) -> impl Iterator<Item = String> {
        (0..self.shards).map(|rank| optimizer_file(rank, self.world))
    }

    /// Whether the optimizer keeps moments.
    fn has_moments(&self) -> bool {
        self.optimizer.kind == Optimizer::Adamw
    }
}

/// The file of rank `rank` of `world`, in a step.
fn optimizer_file(rank: usize, world: usize) -> String {
    format!("{FOLDER}/optimizer-{rank}-of-{world}.safetensors")
}

/// Writes what rank `rank` of `world` owns of each unit into the step directory `step`, and waits until it is on the
/// disk: another node's sync would not bring it there.
pub fn write_pieces(
    step: &Path,
    rank: usize,
    world: usize,
    units: &[UnitPieces],
) -> Result<(), CheckpointError> {
    let path = step.join(optimizer_file(rank, world));
    let format = |reason: String| CheckpointError::Format { path: path.clone(), reason };
    let mut views = BTreeMap::new();
    for (unit, pieces) in units.iter().enumerate() {
        for (what, values) in pieces.tensors() {
            let view = TensorView::new(Dtype::F32, vec![values.len()], bytemuck::cast_slice(values));
            views.insert(key(unit, what), view.map_err(|error| format(error.to_string()))?);
        }
    }
    let bytes = safetensors::serialize(views, None).map_err(|error| format(error.to_string()))?;
    fs::write(&path, bytes).map_err(io(&path))?;
    sync(&path)
}

/// What shard `shard` of `own` owns after a resume from `step`, whose state is `state`. Reads the files that hold a
/// part of it, and of those that part.
pub fn read_pieces(
    step: &Path,
    state: &TrainerState,
    own: Cut,
    shard: usize,
) -> Result<Vec<UnitPieces>, CheckpointError> {
    let unfit = |reason| CheckpointError::Unfit { path: step.to_owned(), reason };
    let moves = reshard::plan(state.cut(), own, shard).map_err(unfit)?;
    let mut units: Vec<_> =
        own.units.iter().map(|unit| UnitPieces::zeros(unit.piece, state.has_moments())).collect();
    for stored in 0..state.shards {
        let from_here: Vec<&Move> = moves.iter().filter(|part| part.shard == stored).collect();
        if !from_here.is_empty() {
            PiecesFile::open(step, stored, state)?.copy(&from_here, &mut units)?;
        }
    }
    Ok(units)
}

fn key(unit: usize, what: &str) -> String {
    format!("unit.{unit}.{what}")
}

/// One rank's stored pieces, mapped.
struct PiecesFile<'a> {
    path: PathBuf,
    map: Mmap,
    state: &'a TrainerState,
}

impl<'a> PiecesFile<'a> {
    fn open(step: &Path, rank: usize, state: &'a TrainerState) -> Result<Self, CheckpointError> {
        let path = step.join(optimizer_file(rank, state.world));
        let fault =
            |error: std::io::Error| CheckpointError::Format { path: path.clone(), reason: error.to_string() };
        let file = File::open(&path).map_err(fault)?;
        // SAFETY: published steps are not written to. A file that shrinks under us would end the process with
        // SIGBUS, as it would for every reader of mapped weights.
        let map = unsafe { Mmap::map(&file) }.map_err(fault)?;
        Ok(Self { path, map, state })
    }

    /// Copies what `moves` take from this file into `units`.
    fn copy(&self, moves: &[&Move], units: &mut [UnitPieces]) -> Result<(), CheckpointError> {
        let format = |reason: String| CheckpointError::Format { path: self.path.clone(), reason };
        let file = SafeTensors::deserialize(&self.map).map_err(|error| format(error.to_string()))?;
        for Move { stored_unit, from, unit, to, .. } in moves {
            let piece = self.state.units[*stored_unit].piece;
            for (what, target) in units[*unit].tensors_mut() {
                if target.is_empty() {
                    continue;
                }
                let key = key(*stored_unit, what);
                let view = file.tensor(&key).map_err(|_| format(format!("{key} is missing")))?;
                if view.dtype() != Dtype::F32 || view.shape() != [piece] {
                    let (dtype, shape) = (view.dtype(), view.shape());
                    return Err(format(format!("{key} is {dtype:?} {shape:?}, expected F32 [{piece}]")));
                }
                let bytes = &view.data()[from.start * 4..from.end * 4];
                let values = bytes.as_chunks().0.iter().map(|&word| f32::from_le_bytes(word));
                target[*to..to + from.len()].iter_mut().zip(values).for_each(|(own, value)| *own = value);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{StepWriter, publish::KnownHashes, reshard::PlacedParameter};
    use super::*;
    use crate::config::TrainArgs;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// Two units over `shards`: one of 10 + 6 elements, one without parameters.
    fn units(shards: usize) -> Vec<UnitLayout> {
        let placed = |name: &str, shape, first| PlacedParameter { name: name.into(), shape, first };
        let parameters = vec![placed("a", [2, 5], 0), placed("b", [3, 2], 12)];
        let piece = 18usize.next_multiple_of(4 * shards) / shards;
        let unit = |piece, parameters| UnitLayout { piece, expert_groups: 1, parameters };
        vec![unit(piece, parameters), unit(0, vec![])]
    }

    fn state(world: usize) -> TrainerState {
        TrainerState {
            format: FORMAT,
            run_id: "run".into(),
            step: 10,
            total_steps: 20,
            epoch: 1,
            position: DataCursor { epoch: 1, row: 20 },
            global_batch_size: 5,
            seed: 42,
            world,
            shards: world,
            optimizer: OptimizerState { kind: Optimizer::Adamw, updates: 9 },
            schedule: Schedule::new(&TrainArgs { lr: 0.1 + 0.2, ..TrainArgs::default() }, 20),
            data: DataIdentity { rows: 30, fingerprint: "f".into() },
            lora: LoraIdentity { rank: 4, alpha: 8.0 },
            base: "b".into(),
            units: units(world),
        }
    }

    /// What shard `rank` owns; values say where they belong.
    fn pieces(layout: &[UnitLayout], rank: usize) -> Vec<UnitPieces> {
        let unit = |unit: &UnitLayout| {
            let value = |what: usize, at: usize| {
                let at = rank * unit.piece + at;
                let inside = |p: &PlacedParameter| p.elements().unwrap().contains(&at);
                if unit.parameters.iter().any(inside) { (what * 1000 + at) as f32 + 0.5 } else { 0.0 }
            };
            let of = |what| (0..unit.piece).map(|at| value(what, at)).collect();
            UnitPieces { master: of(1), exp_avg: of(2), exp_avg_sq: of(3) }
        };
        layout.iter().map(unit).collect()
    }

    /// A published step of `world` ranks; `change` is done to its hidden directory.
    fn step_of(run: &Path, world: usize, change: impl FnOnce(&Path)) -> PathBuf {
        let writer = StepWriter::begin(run, 10).unwrap();
        fs::create_dir(writer.directory().join(FOLDER)).unwrap();
        state(world).write(writer.directory()).unwrap();
        for rank in 0..world {
            write_pieces(writer.directory(), rank, world, &pieces(&units(world), rank)).unwrap();
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
            for shard in 0..to {
                let own = read_pieces(&step, &read, Cut { units: &units(to), shards: to }, shard).unwrap();
                assert_eq!(own, pieces(&units(to), shard), "{from} to {to}, shard {shard}");
            }
        }
    }

    #[test]
    fn sgd_has_no_moments() {
        let run = tempfile::tempdir().unwrap();
        let mut sgd = state(1);
        sgd.optimizer.kind = Optimizer::Sgd;
        let masters = |mut units: Vec<UnitPieces>| {
            units.iter_mut().for_each(|unit| (unit.exp_avg, unit.exp_avg_sq) = (vec![], vec![]));
            units
        };
        let step = step_of(run.path(), 1, |step| {
            sgd.write(step).unwrap();
            write_pieces(step, 0, 1, &masters(pieces(&units(1), 0))).unwrap();
        });
        let read = TrainerState::read(&step).unwrap();
        let own = read_pieces(&step, &read, Cut { units: &units(1), shards: 1 }, 0).unwrap();
        assert_eq!(own, masters(pieces(&units(1), 0)));
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
        said("/format", json!(3), "format 3 is not known");
        said("/units/0/expert_groups", json!(0), "0 groups of experts over 2 shards");
        said("/format", json!("one"), "no format");
        said("/step", json!(-1), "invalid value");
        said("/step", json!(null), "invalid type");
        said("/step", json!(11), "the state of step 11");
        said("/global_batch_size", json!(0), "global_batch_size is 0");
        said("/shards", json!(0), "0 shards");
        said("/shards", json!(3), "3 shards of 2 ranks");
        said("/world", json!(4), "optimizer-0-of-4.safetensors");
        said("/units/0/piece", json!(2), "reaches past");
        said("/units/0/piece", json!(u64::MAX), "larger than memory");
        said("/optimizer/kind", json!("muon"), "muon");
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
            let read = TrainerState::read(&step).and_then(|state| read_pieces(&step, &state, Cut { units: &units(1), shards: 1 }, 0));
            if let Err(error) = read {
                prop_assert_eq!(error.exit_code(), 2);
                prop_assert_eq!(error.to_string().lines().count(), 1);
            }
        }
    }
}
