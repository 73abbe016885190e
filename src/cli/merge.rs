//! The command `merge`.

use super::{Common, Fields, Runnable, models, ranks::on_all_ranks};
use crate::{
    checkpoint::{
        CheckpointError, base,
        merged::Merged,
        model_files::SHARD_BYTES,
        peft::{AdapterFolder, StoredAdapter},
        publish::{KnownHashes, publish_together},
        state::TrainedBase,
        steps,
    },
    comm::World,
    config::BaseFiles,
    console::count,
    device::DeviceChoice,
    dtype::DType,
    error::{Error, Result, agree},
    hub,
    lora::{Survival, merge::MUCH_LOST},
    model::{
        base_plan::all_projections,
        hf_config::HfModel,
        quantized::{self, Quantization},
        stored_base,
    },
    quant::Format,
    weights::{self, AsPacked, SafetensorsSource},
};
use serde_json::json;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

/// Tensors that the report names.
const WORST: usize = 5;

/// Write a model with an adapter merged into it, as an HF checkpoint that needs no adapter; the ranks of mpirun share
/// the work
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Merge {
    /// HF model directory, or model of the hub (owner/name, or owner/name@revision); when absent the base that the
    /// adapter names
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// PEFT adapter directory, such as a published step; the directory of a run (weights/run, or its output_dir) is its
    /// newest step, best in that directory its best
    #[arg(long, value_name = "DIR")]
    pub adapter: PathBuf,
    /// Folder to make; when absent that of the adapter, or of the step of a run, with -merged behind its name
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Type of the merged weights, plain unless it is the base's
    #[arg(long, value_enum, default_value_t)]
    pub dtype: MergedDtype,
    /// Weights that the adapter is added to
    #[arg(long, value_enum, default_value_t)]
    pub onto: Onto,
}

/// The dtype of `merge`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum MergedDtype {
    /// That of the base, tensor by tensor: packed where the base is
    #[default]
    Base,
    Float32,
    Bfloat16,
}

/// The weights that an adapter is added to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Onto {
    /// Those that it was trained on: the model/ of a step that has one, else --model; of a quantised base the numbers
    /// that it has packed
    #[default]
    Trained,
    /// Those of --model, even if the adapter was trained on others
    Original,
}

impl Runnable for Merge {
    const USAGE: &'static str = "merge --adapter <DIR> [--model <DIR>] [--out <DIR>]";
    const FIELDS: Option<Fields> = None;

    fn check(&self) -> Result<()> {
        if self.onto == Onto::Original && self.model.is_none() {
            return Err(Error::Input("--onto original goes with --model".into()));
        }
        Ok(())
    }

    /// Merges on the CPU, whatever devices there are: most of the time goes into reading and writing.
    fn run(&self, common: &Common) -> Result<ExitCode> {
        if common.device == DeviceChoice::Cuda {
            return Err(Error::Input("--device: merge computes on the CPU; leave it out".into()));
        }
        on_all_ranks(
            DeviceChoice::Cpu,
            common.debug,
            |world| {
                models::fetch(world, || models::of_adapter(self.model.as_deref(), Some(&self.adapter)))?;
                self.prepare()
            },
            |merge, world| merge.execute(world).map(|()| ExitCode::SUCCESS),
        )
    }
}

/// A merge, read and validated.
struct Prepared {
    /// The base, with words that say which it is.
    base: PathBuf,
    which: &'static str,
    source: SafetensorsSource,
    /// The format of each matrix that is packed in training, or in the base's files.
    formats: BTreeMap<String, Format>,
    adapter: StoredAdapter,
    dtype: Option<DType>,
    out: PathBuf,
}

impl Merge {
    /// Reads everything but the weights. Enters no collective and writes nothing.
    fn prepare(&self) -> Result<Prepared> {
        let adapter = steps::adapter_at(&self.adapter).map_err(Error::Input)?;
        let out = self.out.clone().unwrap_or_else(|| beside(&adapter));
        if out.symlink_metadata().is_ok() {
            return Err(CheckpointError::Exists { path: out }.into());
        }
        let (base, which) = self.base(&adapter)?;
        let mut spec = HfModel::open(&base)?.spec;
        let source = stored_base::open(&base, &mut spec)?;
        let packed = self.check_base(&adapter, &base, &source)?;
        let formats = quantized::formats(packed.as_ref(), &spec, &source);
        // Faults of an adapter that the user named are the user's to mend.
        let stored = AdapterFolder::open(&adapter).and_then(|folder| folder.adapter(&all_projections(&spec)));
        let adapter = stored.map_err(|error| Error::Input(error.to_string()))?;
        if adapter.shapes.use_dora() {
            let reason = "it has magnitudes (DoRA), and a merge that scales whole rows is not built; merge it with PEFT's \
                          merge_and_unload";
            return Err(Error::Input(format!("--adapter: {reason}")));
        }
        let dtype = match self.dtype {
            MergedDtype::Base => None,
            MergedDtype::Float32 => Some(DType::F32),
            MergedDtype::Bfloat16 => Some(DType::Bf16),
        };
        if let Some(reason) = packed.filter(|_| dtype.is_none()).and_then(|packed| packed.unwritable(&spec)) {
            return Err(Error::Input(format!(
                "--dtype base: {reason}; --dtype bfloat16 writes plain numbers"
            )));
        }
        Ok(Prepared { base, which, source, formats, adapter, dtype, out })
    }

    /// The weights that `adapter` is added to, and what they are to it.
    fn base(&self, adapter: &Path) -> Result<(PathBuf, &'static str)> {
        const TRAINED: &str = "the base that it was trained on";
        let own = adapter.join(base::FOLDER);
        let place = |model: &Path| {
            let place = hub::locate(model, true);
            place.map_err(|error| Error::Input(format!("--model: {}: {error}", model.display())))
        };
        match (&self.model, self.onto) {
            (Some(model), Onto::Original) => Ok((place(model)?, "the original base")),
            _ if own.is_dir() => Ok((own, TRAINED)),
            (Some(model), Onto::Trained) => Ok((place(model)?, TRAINED)),
            (None, _) => Ok((steps::base_of(adapter).map_err(Error::Input)?, TRAINED)),
        }
    }

    /// Compares the base with what the training state of `adapter` says of it, if there is one. The storage in which it
    /// was trained on, where that is what the adapter is added to.
    fn check_base(
        &self,
        adapter: &Path,
        base: &Path,
        source: &SafetensorsSource,
    ) -> Result<Option<Quantization>> {
        // PEFT's own folders have no manifest, and say nothing of their base's weights.
        let Some(trained) = TrainedBase::of(adapter)? else { return Ok(None) };
        if self.onto == Onto::Trained && trained.is(source)? {
            return Ok(trained.quantization);
        }
        if self.onto == Onto::Original && trained.digest == weights::digest(source)? {
            return Ok(None);
        }
        let packed = trained.quantization.as_ref().map_or_else(String::new, |packed| {
            let format = packed.format;
            format!(" in {format}")
        });
        let (adapter, base) = (adapter.display(), base.display());
        match self.onto {
            Onto::Trained => Err(Error::Input(format!(
                "{adapter} was trained on another base than {base}: name that one, or say --onto original to add it to \
                 this one"
            ))),
            Onto::Original if trained.is(source)? => {
                tracing::warn!(
                    "{adapter} was trained on the numbers that {base} has{packed}; the sum with those of its files was \
                     never trained"
                );
                Ok(None)
            }
            Onto::Original => {
                tracing::warn!(
                    "{adapter} was trained on another base than {base}; the sum was never trained"
                );
                Ok(None)
            }
        }
    }
}

/// The folder beside `adapter` with `-merged` behind its name.
fn beside(adapter: &Path) -> PathBuf {
    let mut name = adapter.canonicalize().unwrap_or_else(|_| adapter.to_owned()).into_os_string();
    name.push("-merged");
    name.into()
}

impl Prepared {
    /// Writes the merged model, divided over the ranks, and prints the report. Collective.
    fn execute(self, world: &World) -> Result<()> {
        let everyone = world.group("world", 0);
        let _writing = world.watcher().slow("merge");
        let StoredAdapter { sites, shapes, values } = &self.adapter;
        let source = AsPacked::new(&self.source, self.formats.clone());
        let merged = Merged::new(&source, sites, shapes, values, self.dtype, &self.formats, SHARD_BYTES)?;
        let files = BaseFiles {
            weights: Some(self.base.clone()),
            config: self.base.clone(),
            tokenizer: self.base.clone(),
        };
        let (rank, ranks) = (world.rank(), world.size());
        let opened = if rank == 0 { merged.begin(&self.out, &files).map(Some) } else { Ok(None) };
        let mut own = Vec::new();
        publish_together(
            &*everyone,
            |outcome| agree(&*everyone, outcome),
            opened.map_err(Error::from),
            |hidden| {
                own = merged.write(hidden, rank, ranks)?;
                Ok(())
            },
            |writer| Ok(writer.publish(&mut KnownHashes::default())?),
        )?;
        let own: Vec<_> = own.iter().map(|(name, kept)| json!([name, kept.delta, kept.lost])).collect();
        let all = everyone.all_gather_host(json!(own).to_string().as_bytes())?;
        if rank == 0 {
            let parts =
                all.iter().filter_map(|part| serde_json::from_slice::<Vec<(String, f64, f64)>>(part).ok());
            let survivals = parts.flatten().map(|(name, delta, lost)| (name, Survival { delta, lost }));
            super::print(&self.report(survivals.collect(), merged.tensors()))?;
        }
        Ok(())
    }

    /// The tensors that were merged, and how much of the adapter rounding has left: `survivals` of those that it
    /// changes, of all `tensors`. Warnings go to the log.
    fn report(&self, mut survivals: Vec<(String, Survival)>, tensors: usize) -> String {
        survivals.sort_by(|(a, x), (b, y)| y.lost_share().total_cmp(&x.lost_share()).then(a.cmp(b)));
        let mut all = Survival::default();
        survivals.iter().for_each(|(_, survival)| all += *survival);
        let packed = self.formats.values().next().map(|format| format.name());
        let dtype = self.dtype.map(DType::name).or(packed).unwrap_or("the base's types");
        let mut text = format!(
            "{}: {} of {tensors} merged onto {}, {}, in {dtype}\n",
            self.out.display(),
            count(survivals.len(), "tensor"),
            self.base.display(),
            self.which,
        );
        if all.delta == 0.0 {
            text += "the adapter is zero: the model is the base\n";
            return text;
        }
        let _ = writeln!(
            text,
            "lost by rounding, |W' - (W + delta)| / |delta|: {:.3} of all deltas together; the most in",
            all.lost_share()
        );
        for (name, survival) in survivals.iter().take(WORST) {
            let _ = writeln!(text, "  {:.3}  {name}", survival.lost_share());
        }
        let over = |limit| survivals.iter().filter(|(_, survival)| survival.lost_share() > limit).count();
        if over(MUCH_LOST) > 0 {
            tracing::warn!(
                "rounding loses more than half of the delta in {}, more than all of it in {}: the merged model answers \
                 otherwise than base and adapter do; --dtype float32 keeps all",
                count(over(MUCH_LOST), "tensor"),
                over(1.0)
            );
        }
        text
    }
}
