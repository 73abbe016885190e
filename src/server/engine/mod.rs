//! The engine: carries out the requests for all adapters on all ranks.
//!
//! One thread of rank 0, which alone touches MPI and tensors there, takes requests from an [`EngineHandle`], decides
//! what comes next (`plan`, pure) and whether it can be done (`check`, pure), sends a command to all ranks (`command`)
//! and carries it out like every other rank (`models`). Without requests all ranks sleep.
//!
//! Requests to sample wait in `plan` for the tasks of their adapter before them, then run in an
//! [`infer::sampler`](crate::infer::sampler), which plans one step of the model at a time. Steps and training take
//! turns (`shares`, pure). An adapter that is updated while it is sampled from is copied first (`versions`, pure).

mod check;
mod command;
mod driver;
mod handle;
mod loss;
mod models;
mod plan;
mod residence;
mod room;
mod shares;
mod versions;

pub use command::EngineError;
pub use handle::EngineHandle;

use crate::{
    Error, Result,
    comm::{Commands, Watcher, World},
    infer::stops::SharedDecode,
    model::transformer::Transformer,
    optim::Settings,
    server::{request::AdapterSpec, spill, store::Base},
    shard::ProcessGroups,
};
use command::Command;
use driver::{Driver, Ranks};
use models::Models;
use room::Room;
use std::{path::PathBuf, sync::Arc, time::Duration};

/// Phase of a rank that waits for commands.
const IDLE: &str = "waiting for requests";
/// Phases of all ranks that move whole adapters or models, and may take longer than a collective.
const SAVING: &str = "save";
const LOADING: &str = "load";

/// Settings that all adapters have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterDefaults {
    /// Targets of an adapter that is created without.
    pub targets: Vec<String>,
    /// Scale by alpha / √rank.
    pub use_rslora: bool,
    /// Experts share one factor: see [`Site::hybrid`](crate::lora::Site::hybrid).
    pub hybrid: bool,
    /// Standard deviation of the initial B.
    pub b_init_std: f64,
    /// Largest rank of an adapter; `None`: what memory holds.
    pub max_rank: Option<usize>,
    /// Rank of an adapter that is created without.
    pub rank: usize,
    /// The optimizer of every adapter; its weight decay, betas and ε are those of an update.
    pub optimizer: Settings,
}

impl AdapterDefaults {
    /// The adapter by which memory is told.
    fn spec(&self) -> AdapterSpec {
        AdapterSpec { rank: self.rank, alpha: 1.0, targets: None, train_attn: true, train_mlp: true, seed: 0 }
    }
}

/// Settings of the engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    pub defaults: AdapterDefaults,
    /// The base, as saves name it.
    pub base: Base,
    /// Tokens of a rank and micro-batch, at most; no datum may be longer.
    pub max_tokens_per_pass: usize,
    /// Requests that may wait.
    pub max_waiting: usize,
    /// Time for which an idle engine that gets a pass waits for those of other adapters, to compute all together.
    pub gather: Duration,
    /// Folder of everything that the server leaves behind.
    pub output_dir: PathBuf,
    /// Bytes of a rank's memory for adapters; `None`: what the base and a pass leave.
    pub adapter_memory: Option<u64>,
    /// Bytes of a rank's memory for keys and values; `None`: a share of what the base and a pass leave.
    pub sampling_memory: Option<u64>,
    /// Tokens of the longest sequence that the model was made for; `None`: any.
    pub max_positions: Option<usize>,
    /// Bytes that `output_dir` may have after a save; `None`: any.
    pub storage_limit: Option<u64>,
    /// Recompute is chosen by the memory that is free.
    pub fits_recompute: bool,
}

/// Runs the engine over the ranks of `groups`. `decode`: the text of tokens, which rank 0 needs for stop texts. `front`
/// runs on a thread of rank 0 and submits requests. When it has returned and every request is answered, the engine
/// ends, and rank 0 gets what `front` returned. Collective.
///
/// # Errors
/// A rank has failed. The caller ends all ranks: `front` may still run.
pub fn serve<T: Send + 'static>(
    world: &World,
    groups: ProcessGroups,
    model: Transformer,
    options: EngineOptions,
    decode: Option<SharedDecode>,
    front: impl FnOnce(Arc<EngineHandle>) -> T + Send + 'static,
) -> Result<Option<T>> {
    let watcher = world.watcher();
    let mut models = Models::new(model, groups, &options);
    let room = Room::new(&mut models, &options)?;
    models.open_cache(room.pages as usize);
    // Commands have deadlines; the wait for one has none.
    watcher.step(0);
    match world.commands().map_err(EngineError::from)? {
        Commands::Receiver(commands) => {
            follow(models, &watcher, || command::receive(&commands)).map(|()| None)
        }
        Commands::Sender(commands) => {
            spill::clear(&options.output_dir).map_err(|error| Error::Failure(error.to_string()))?;
            if options.fits_recompute {
                tracing::info!("{}", models.told_of_recompute());
            }
            tracing::info!("{}", room.told(options.defaults.rank, options.max_tokens_per_pass));
            tracing::info!("{}", room.told_of_sampling());
            let (handle, requests) = EngineHandle::new(options.max_waiting);
            let failing = handle.clone();
            watcher.on_end(move || failing.fail());
            let ranks = Ranks::new(commands, watcher, models.groups().world.size());
            let mut driver = Driver::new(models, options, room, ranks, requests, handle.clone(), decode);
            let front = with_front(handle.clone(), front)?;
            driver.run().inspect_err(|_| handle.fail())?;
            front.join().map(Some).map_err(|_| Error::Failure("the front of the server has panicked".into()))
        }
    }
}

/// Starts `front` on a thread of its own. When it ends, the engine takes no more requests.
fn with_front<T: Send + 'static>(
    handle: Arc<EngineHandle>,
    front: impl FnOnce(Arc<EngineHandle>) -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<T>> {
    let run = move || {
        let _stopping = handle::StopOnDrop(handle.clone());
        front(handle)
    };
    let thread = std::thread::Builder::new().name("front".into()).spawn(run);
    thread.map_err(|error| Error::Failure(format!("the thread of the server's front: {error}")))
}

/// Carries out the commands of rank 0 until it says stop.
fn follow(
    mut models: Models,
    watcher: &Watcher,
    mut receive: impl FnMut() -> Result<Command<'static>, EngineError>,
) -> Result<()> {
    for number in 1.. {
        let idle = watcher.slow(IDLE);
        let command = receive()?;
        drop(idle);
        watcher.step(number);
        if command == Command::Stop {
            break;
        }
        let phase = match &command {
            Command::Save { .. } => Some(SAVING),
            Command::Load { .. } => Some(LOADING),
            _ => None,
        };
        let _slow = phase.map(|phase| watcher.slow(phase));
        models.execute(&command)?;
    }
    Ok(())
}
