//! The one error type of the crate. Every room has its own typed error; this one joins them and knows the
//! exit code: 2 when the user's input is wrong (nothing was written), 1 for any other failure.

use crate::config::ConfigError;
use crate::mesh::MeshError;

/// What a command ends with when it does not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Mesh(#[from] MeshError),
    #[error("{0}")]
    Input(String),
    #[error("{0}")]
    Failure(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The exit code of a rank that ends with this error.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Config(_) | Error::Mesh(_) | Error::Input(_) => 2,
            Error::Failure(_) => 1,
        }
    }
}
