//! A body as every call of this wire would read it.

use super::{
    bodies::{
        CreateModel, CreateSamplingSession, DeleteCheckpoint, Generate, KillSession, LoadWeights, OptimStep,
        SaveForSampler, SaveFullWeights, SaveWeights, WeightsInfo,
    },
    data::Bounds,
    fields::read,
    passes,
};

/// Reads `body` as that of each call. Returns the number of calls that would take it.
pub fn read_as_all(body: &[u8]) -> usize {
    let bounds = Bounds { vocab_size: 100, max_tokens: 1 << 16 };
    [
        passes::read(body).and_then(|body| passes::data(body, bounds)).is_ok(),
        read::<CreateModel>(body).is_ok(),
        read::<CreateSamplingSession>(body).is_ok(),
        read::<DeleteCheckpoint>(body).is_ok(),
        read::<Generate>(body).is_ok(),
        read::<KillSession>(body).is_ok(),
        read::<LoadWeights>(body).is_ok(),
        read::<OptimStep>(body).is_ok(),
        read::<SaveForSampler>(body).is_ok(),
        read::<SaveFullWeights>(body).is_ok(),
        read::<SaveWeights>(body).is_ok(),
        read::<WeightsInfo>(body).is_ok(),
    ]
    .into_iter()
    .filter(|&takes| takes)
    .count()
}
