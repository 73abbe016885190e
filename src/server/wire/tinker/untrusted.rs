//! A body as every call of this wire would read it.

use super::{
    calls::{
        Address, CopyWeights, CreateModel, CreateSamplingSession, CreateSession, LoadWeights, ModelCall,
        ModelDefaults, OptimStepCall, RetrieveFuture, RetrieveFutures, SamplingWeights, SaveWeights,
        SaveWeightsForSampler, SessionHeartbeat, SetTtl, WeightsInfoCall, ttl,
    },
    data::{Limits, PassCall},
    sample::SampleCall,
};
use axum::body::Bytes;
use serde::de::DeserializeOwned;

const LIMITS: Limits = Limits { data: 64, tokens: 1 << 16, bytes: 1 << 20, vocabulary: 100 };

fn read<T: DeserializeOwned>(body: &[u8]) -> Option<T> {
    serde_json::from_slice(body).ok()
}

/// Reads `body` as that of each call. Returns the number of calls that would take it.
pub fn read_as_all(body: &[u8]) -> usize {
    let defaults = ModelDefaults { base_model: "base".to_owned(), lora_rank: 8, lora_alpha: 16.0, seed: 0 };
    Address::of(body);
    Address::of_start(body);
    [
        PassCall::from_protobuf(Bytes::copy_from_slice(body), &LIMITS).is_ok(),
        PassCall::from_json(body, &LIMITS).is_ok(),
        read::<SampleCall>(body).is_some_and(|call| call.reads(LIMITS.vocabulary)),
        read::<CreateModel>(body).is_some_and(|call| call.spec(&defaults).is_ok()),
        read::<OptimStepCall>(body).is_some_and(|call| call.step().is_ok()),
        read::<LoadWeights>(body).is_some_and(|call| call.target(&defaults).is_ok()),
        read::<SaveWeightsForSampler>(body).is_some_and(|call| call.target().is_ok()),
        read::<CreateSamplingSession>(body).is_some_and(|call| {
            SamplingWeights::of(call.base_model.as_deref(), call.model_path.as_deref()).is_ok()
        }),
        read::<SetTtl>(body).is_some_and(|call| ttl(call.ttl_seconds).is_ok()),
        read::<SaveWeights>(body).is_some(),
        read::<CreateSession>(body).is_some(),
        read::<SessionHeartbeat>(body).is_some(),
        read::<ModelCall>(body).is_some(),
        read::<CopyWeights>(body).is_some(),
        read::<WeightsInfoCall>(body).is_some(),
        read::<RetrieveFuture>(body).is_some(),
        read::<RetrieveFutures>(body).is_some(),
    ]
    .into_iter()
    .filter(|&takes| takes)
    .count()
}
