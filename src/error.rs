//! The one error type of the crate. Every room has its own typed error; this one joins them and knows the
//! exit code: 2 when the user's input is wrong (nothing was written), 1 for any other failure.

use crate::{
    checkpoint::CheckpointError,
    comm::{CommError, Communicator},
    config::ConfigError,
    console::StdoutError,
    data::DataError,
    device::DeviceError,
    lora::TargetError,
    mesh::MeshError,
    model::hf_config,
    server::{engine::EngineError, kept::KeptError},
    shard::ShardError,
    trace::TraceError,
    weights::SourceError,
};

/// Errors that end a command.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Mesh(#[from] MeshError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Comm(#[from] CommError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    HfConfig(#[from] hf_config::ConfigError),
    #[error(transparent)]
    Kept(#[from] KeptError),
    #[error(transparent)]
    Shard(#[from] ShardError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Stdout(#[from] StdoutError),
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Trace(#[from] TraceError),
    #[error("{0}")]
    Input(String),
    #[error("{0}")]
    Failure(String),
    /// Another rank failed and says why, or this one has said so: nothing to add, only the code to end with.
    #[error("another rank has failed")]
    Elsewhere { code: i32 },
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The error for the user: `before` each of its lines, of which a configuration may have several.
    pub fn lines(&self, before: &str) -> String {
        self.to_string().lines().map(|line| format!("{before}{line}")).collect::<Vec<_>>().join("\n")
    }

    /// The exit code of a rank that ends with this error.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Config(_) | Error::Mesh(_) | Error::Input(_) | Error::HfConfig(_) => 2,
            Error::Source(_) | Error::Target(_) => 2,
            Error::Data(error) => {
                if error.is_input() {
                    2
                } else {
                    1
                }
            }
            Error::Checkpoint(error) => error.exit_code(),
            Error::Comm(error) => error.exit_code(),
            Error::Device(error) => error.exit_code(),
            Error::Kept(error) => error.exit_code(),
            Error::Engine(_) | Error::Shard(_) | Error::Stdout(_) | Error::Trace(_) | Error::Failure(_) => 1,
            Error::Elsewhere { code } => *code,
        }
    }
}

/// Whether all ranks could: every rank's own result where they all succeeded. Otherwise the first rank that failed
/// gets its error back, to say it, and the others [`Error::Elsewhere`]. Collective: what follows is entered by all
/// ranks or by none.
pub fn agree<T>(world: &dyn Communicator, own: Result<T>) -> Result<T> {
    let code = match &own {
        Ok(_) => None,
        // Whoever failed is heard elsewhere in this same exchange.
        Err(Error::Elsewhere { .. }) => None,
        Err(error) => Some(error.exit_code()),
    };
    let all = world.all_gather_host(&code.map_or(Vec::new(), |code| vec![code as u8]))?;
    match all.iter().position(|said| !said.is_empty()) {
        None => own,
        Some(first) if first == world.rank() => own,
        Some(first) => Err(Error::Elsewhere { code: i32::from(all[first][0]) }),
    }
}

/// Text of rank 0, on every rank. Collective.
pub fn broadcast_from_root(world: &dyn Communicator, text: &str) -> Result<String> {
    let own: &[u8] = if world.rank() == 0 { text.as_bytes() } else { &[] };
    let all = world.all_gather_host(own)?;
    Ok(all.first().map(|said| String::from_utf8_lossy(said).into_owned()).unwrap_or_default())
}
