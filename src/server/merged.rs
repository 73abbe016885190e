//! Saves of the base with an adapter merged into it, as the engine carries them out. Values of the base are read from
//! its files once more, a part at a time, and all ranks share the tensors; the adapter is only read.

use super::{
    request::Save,
    store::{Base, publish, same_outcome},
};
use crate::{
    checkpoint::{
        FolderWriter,
        merged::{self, Merged},
        model_files::SHARD_BYTES,
        publish::publish_together,
        saves,
    },
    comm::{Communicator, Reduce},
    dtype::DType,
    error::{Error, Result},
    lora::{Adapter, LoraShapes, Site, Survival, merge::MUCH_LOST},
    model::{ModelSpec, quantized, stored_base},
    quant::Format,
    shard::ProcessGroups,
    weights::{AsPacked, RandomSource, WeightSource},
};
use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

/// Bytes of texts that are written anew: headers, config.json, index and manifest.
const TEXT: u64 = 256 << 10;

/// The base's files, opened.
struct Opened {
    source: Box<dyn WeightSource>,
    /// The format of each matrix that is packed in training, or in the files.
    formats: BTreeMap<String, Format>,
}

impl Opened {
    /// # Errors
    /// The files cannot be read, or are not those that the server has loaded.
    fn new(base: &Base, spec: &ModelSpec) -> Result<Self> {
        let mut spec = spec.clone();
        // A client has no part in any of these.
        let failed = |error| Error::Failure(format!("the base of this server: {error}"));
        let source: Box<dyn WeightSource> = match &base.files.weights {
            Some(directory) => Box::new(stored_base::open(directory, &mut spec).map_err(failed)?),
            None => Box::new(RandomSource::new(spec.tensors(), spec.initializer_range, base.seed)),
        };
        let packed = base.quantization.as_ref();
        if quantized::digest(&*source, packed).map_err(failed)? != base.digest {
            return Err(Error::Failure(format!(
                "the files of {} are not those that this server has loaded: put those back, or restart the server",
                base.name
            )));
        }
        let formats = quantized::formats(packed, &spec, &*source);
        Ok(Self { source, formats })
    }
}

/// Bytes of the files of a merged model, about. `dtype`: as of [`Contents::Merged`](super::request::Contents).
///
/// # Errors
/// The base's files cannot be read or have changed; files cannot hold the weights packed.
pub fn bytes(base: &Base, spec: &ModelSpec, dtype: Option<DType>) -> Result<u64> {
    let packed = base.quantization.as_ref().filter(|_| dtype.is_none());
    if let Some(reason) = packed.and_then(|packed| packed.unwritable(spec)) {
        return Err(Error::Input(format!("dtype base: {reason}; bfloat16 writes plain numbers")));
    }
    let Opened { source, formats } = Opened::new(base, spec)?;
    let beside = base.files.side_files();
    let beside: u64 = beside.values().filter_map(|path| fs::metadata(path).ok()).map(|data| data.len()).sum();
    Ok(merged::files(&*source, dtype, &formats, SHARD_BYTES).bytes() + beside + TEXT)
}

/// Saves `base`, a model of `spec`, with `adapter` merged into it. Returns the folder and the bytes of its files on
/// rank 0, `None` elsewhere. Collective; nothing of the adapter changes.
///
/// # Errors
/// The same on every rank: `save.folder` is a save already and is not to be overwritten, or is no save; a merged value
/// is not finite; the base's files cannot be read or have changed; a disk fails. An earlier save of the name is
/// untouched then.
pub fn save(
    adapter: &Adapter,
    groups: &ProcessGroups,
    base: &Base,
    spec: &ModelSpec,
    dtype: Option<DType>,
    save: &Save,
) -> Result<Option<(PathBuf, u64)>> {
    let world = &*groups.world;
    let sites = adapter.plan().sites();
    let shapes = LoraShapes::of_sites(&sites)
        .ok_or_else(|| Error::Input("the adapter has no module that could be merged".into()))?;
    if shapes.use_dora() {
        let reason = "the adapter has magnitudes (DoRA), and a merge that scales whole rows is not built";
        return Err(Error::Input(reason.into()));
    }
    let sites: Vec<Site> = sites.into_iter().map(|(site, _)| site.clone()).collect();
    let values: HashMap<String, Vec<f32>> =
        adapter.whole()?.into_iter().map(|(parameter, values)| (parameter.name, values)).collect();
    let Opened { source, formats } = same_outcome(world, Opened::new(base, spec))?;
    let source = AsPacked::new(&*source, formats.clone());
    let merged = Merged::new(&source, &sites, &shapes, &values, dtype, &formats, SHARD_BYTES);
    let merged = same_outcome(world, merged.map_err(Error::from))?;
    let opened = if groups.rank == 0 { open(&merged, base, save).map(Some) } else { Ok(None) };
    let mut kept = Survival::default();
    let write_own = |hidden: &Path| {
        for (_, survival) in merged.write(hidden, groups.rank, groups.mesh.world())? {
            kept += survival;
        }
        Ok(())
    };
    let saved = publish_together(world, |own| same_outcome(world, own), opened, write_own, publish)?;
    tell(world, kept, &save.folder)?;
    Ok(saved)
}

/// Rank 0's files of a merged model, still hidden.
fn open(merged: &Merged, base: &Base, save: &Save) -> Result<FolderWriter> {
    let writer = saves::begin(&save.folder, save.overwrite)?;
    merged.create(writer.directory(), &base.files)?;
    saves::write_metadata(&writer, &save.metadata)?;
    Ok(writer)
}

/// Says in the log how much of the adapter rounding has lost; `kept`: of this rank's tensors. Collective.
fn tell(world: &dyn Communicator, kept: Survival, folder: &Path) -> Result<()> {
    let mut sums = [kept.delta, kept.lost];
    world.all_reduce_host(&mut sums, Reduce::Sum)?;
    let (lost, folder) = (Survival { delta: sums[0], lost: sums[1] }.lost_share(), folder.display());
    if world.rank() == 0 {
        tracing::info!("{folder}: merged; {lost:.3} of the adapter was lost by rounding");
        if lost > MUCH_LOST {
            tracing::warn!(
                "{folder}: rounding lost more than half of the adapter, so the merged model answers otherwise than base \
                 and adapter do; dtype float32 keeps all"
            );
        }
    }
    Ok(())
}
