//! The part of a save that needs no other rank: files are written from copies in host memory, on a thread of its own
//! that calls neither MPI nor a device.

use super::super::signals::SavedStep;
use crate::{
    checkpoint::{
        CheckpointError, FolderWriter, TrainerState,
        adapter_store::{Export, write_adapter},
        pieces::{Pieces, write_pieces},
        publish::{KnownHashes, withdraw},
        steps,
    },
    config::ExportFormat,
    lora::{LoraShapes, Parameter, Site, pissa::Values},
};
use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    thread::JoinHandle,
};

/// Work on a thread of its own.
pub(super) struct Job<T>(JoinHandle<T>);

impl<T: Send + 'static> Job<T> {
    /// Starts `work` on files in `folder`.
    ///
    /// # Errors
    /// The system starts no thread.
    pub fn start(folder: &Path, work: impl FnOnce() -> T + Send + 'static) -> Result<Self, CheckpointError> {
        let started = std::thread::Builder::new().name("save".into()).spawn(work);
        started.map(Self).map_err(|error| CheckpointError::Io { path: folder.to_owned(), error })
    }

    pub fn is_done(&self) -> bool {
        self.0.is_finished()
    }

    /// Waits for the result.
    pub fn wait(self) -> T {
        // A panic has ended the process, unless a test runs this.
        self.0.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// The files of a rank, as copies in host memory.
pub(super) struct Files {
    /// The hidden directory of the step.
    pub hidden: PathBuf,
    pub rank: usize,
    pub world: usize,
    /// Its pieces, on ranks of the first copy of the base.
    pub pieces: Option<Pieces>,
    pub root: Option<RootFiles>,
}

/// The files that rank 0 alone writes.
pub(super) struct RootFiles {
    /// Files of metrics: their lines are on the disk before the step is.
    pub lines: Vec<(PathBuf, File)>,
    /// The values of the adapter.
    pub whole: Vec<(Parameter, Vec<f32>)>,
    pub adapter: AdapterFiles,
    pub state: TrainerState,
}

/// See [`Export`].
pub(super) struct AdapterFiles {
    pub sites: Vec<Site>,
    pub shapes: LoraShapes,
    pub base: Option<String>,
    pub format: ExportFormat,
    pub dropout: f64,
    pub subtracted: Option<Arc<Values>>,
}

impl Files {
    /// Writes them. The pieces are on the disk when this returns, the others when the step is published.
    pub fn write(self) -> Result<(), CheckpointError> {
        let Self { hidden, rank, world, pieces, root } = self;
        if let Some(RootFiles { lines, whole, adapter, state }) = root {
            for (path, lines) in lines {
                lines.sync_data().map_err(|error| CheckpointError::Io { path, error })?;
            }
            let AdapterFiles { sites, shapes, base, format, dropout, subtracted } = adapter;
            let subtracted = subtracted.as_deref();
            let export = Export { sites: &sites, shapes: &shapes, base, format, dropout, subtracted };
            write_adapter(&hidden, whole, export)?;
            state.write(&hidden)?;
        }
        pieces.map_or(Ok(()), |pieces| write_pieces(&hidden, rank, world, &pieces))
    }
}

/// The end of a save, on rank 0: the step becomes visible and older ones go.
pub(super) struct Publishing {
    pub writer: FolderWriter,
    pub known: KnownHashes,
    pub run_dir: PathBuf,
    pub step: usize,
    pub best: Option<usize>,
    /// The step that the run resumed from.
    pub resumed: Option<usize>,
    /// `train.save_total_limit`
    pub limit: Option<usize>,
    pub mark: SavedStep,
}

/// The hashes that are known afterwards, and the directory of the step.
pub(super) type Published = (KnownHashes, Result<PathBuf, CheckpointError>);

impl Publishing {
    pub fn publish(self) -> Published {
        let Self { writer, mut known, run_dir, step, best, resumed, limit, mark } = self;
        let publish = || {
            let published = writer.publish(&mut known)?;
            mark.set(step);
            tracing::info!("saved {}", published.display());
            steps::set_best(&run_dir, best)?;
            if let Some(limit) = limit {
                let others: Vec<usize> = resumed.into_iter().chain(best).collect();
                prune(&run_dir, step, limit, &others);
            }
            Ok(published)
        };
        let published = publish();
        (known, published)
    }
}

/// Removes all but the newest `limit` steps up to `newest`, and but `others`.
fn prune(run_dir: &Path, newest: usize, limit: usize, others: &[usize]) {
    for step in steps::surplus(&steps::published(run_dir), limit, newest, others) {
        // The run goes on with a step too many.
        match withdraw(&steps::directory(run_dir, step)) {
            Ok(()) => tracing::info!("removed step {step}: train.save_total_limit is {limit}"),
            Err(error) => tracing::warn!("could not remove step {step}: {error}"),
        }
    }
}
