//! Errors of losses by name: one line each, with what would be right.

/// Why a loss cannot be computed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LossError {
    #[error("loss {name:?} is unknown; there are {known}")]
    Unknown { name: String, known: String },
    #[error("loss {name:?} is refused: {reason}")]
    Refused { name: &'static str, reason: &'static str },
    #[error("{loss}: parameter {param:?} is unknown; {known}")]
    UnknownParam { loss: &'static str, param: String, known: String },
    #[error("{loss}: parameter {param}: expected {expected}, got {found}")]
    Param { loss: &'static str, param: &'static str, expected: String, found: String },
    #[error("{loss}: input {input} is missing; there are {found}")]
    MissingInput { loss: &'static str, input: &'static str, found: String },
    #[error("{loss}: input {input}: expected {expected} values, one a target, got {found}")]
    InputLength { loss: &'static str, input: &'static str, expected: usize, found: usize },
    #[error("{loss}: {input}[{index}]: expected a finite number, got {value}")]
    NotFinite { loss: &'static str, input: &'static str, index: usize, value: f32 },
    #[error(
        "{loss}: one target a token is read, got {k}; cross_entropy and importance_sampling read several"
    )]
    ManyTargets { loss: &'static str, k: usize },
    #[error("{loss}: {targets} targets are no multiple of the {k} of a token")]
    Targets { loss: &'static str, targets: usize, k: usize },
    #[error("a loss of pairs needs two answers a pair, got {answers} in all")]
    OddAnswers { answers: usize },
}
