//! Greedy decoding. Each rank continues its own prompts; all ranks gather the same layers, so a rank that is done, or
//! that has no prompt, keeps step with the others.

use super::cache::{KvCache, NextTokens, Prefill};
use crate::{
    comm::{Communicator, Reduce},
    error::{Error, Result, agree},
    lora::Adapter,
    model::transformer::{Batch, Transformer},
    shard::ShardError,
};
use tch::Tensor;

/// Sequences that a rank decodes at a time: enough for the GEMMs to pay for a gather of the layers.
const SEQUENCES: usize = 64;

/// Said of a model or adapter whose outputs are no numbers.
pub(super) const NOT_FINITE: &str = "the outputs have NaN or infinity: weights of the model or of the adapter are \
                                     not finite, or too large for --dtype";

/// When a continuation ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    pub max_new_tokens: usize,
    /// Any of these ends it, and is not part of it.
    pub eos_token_ids: Vec<i64>,
}

/// The most likely continuation, token by token, of each of this rank's `prompts` (token ids, at least one each).
/// Collective over `world`.
pub fn greedy(
    model: &mut Transformer,
    adapters: &mut [&mut Adapter],
    world: &dyn Communicator,
    prompts: &[&[i64]],
    limits: &Limits,
) -> Result<Vec<Vec<i64>>> {
    let mut rounds = [prompts.len().div_ceil(SEQUENCES) as f64];
    world.all_reduce_host(&mut rounds, Reduce::Max)?;
    let mut continuations = Vec::with_capacity(prompts.len());
    for round in 0..rounds[0] as usize {
        let first = (round * SEQUENCES).min(prompts.len());
        let last = (first + SEQUENCES).min(prompts.len());
        continuations.extend(greedy_round(model, adapters, world, &prompts[first..last], limits)?);
    }
    Ok(continuations)
}

fn greedy_round(
    model: &mut Transformer,
    adapters: &mut [&mut Adapter],
    world: &dyn Communicator,
    prompts: &[&[i64]],
    limits: &Limits,
) -> Result<Vec<Vec<i64>>> {
    let device = model.device().tensors();
    let lengths: Vec<usize> = prompts.iter().map(|prompt| prompt.len()).collect();
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let kind = model.options().compute.kind();
    let cache = KvCache::new(model.spec(), prompts.len(), longest + limits.max_new_tokens, kind, device);

    let ids = prompts.concat();
    let batch = Batch::new(&ids, &vec![crate::data::IGNORE_INDEX; ids.len()], &lengths, device);
    let tokens = lengths.iter().enumerate().flat_map(|(i, &length)| (0..length).map(move |at| (i, at)));
    let places = cache.places(tokens, device);
    let ends = lengths.iter().scan(-1, |end, &length| {
        *end += length as i64;
        Some(*end)
    });
    let ends = Tensor::from_slice(&ends.collect::<Vec<i64>>()).to_device(device);
    let prefill = Prefill { cache: &cache, places, documents: batch.documents() };
    let mut logits = model.logits_of(&batch, adapters, Some(&ends), &prefill)?;

    let mut continuations = vec![Vec::new(); prompts.len()];
    let mut ended = vec![false; prompts.len()];
    for new in 0..limits.max_new_tokens {
        let is_broken = !bool::try_from(logits.isfinite().all()).map_err(ShardError::from)?;
        let next = Vec::<i64>::try_from(logits.argmax(-1, false)).map_err(ShardError::from)?;
        for ((&id, ended), continuation) in next.iter().zip(&mut ended).zip(&mut continuations) {
            *ended |= limits.eos_token_ids.contains(&id);
            if !*ended {
                continuation.push(id);
            }
        }
        let goes_on = ended.contains(&false) && new + 1 < limits.max_new_tokens;
        let mut any = [goes_on, is_broken].map(|is_so| f64::from(u8::from(is_so)));
        world.all_reduce_host(&mut any, Reduce::Max)?;
        let [goes_on, is_broken_somewhere] = any.map(|is_so| is_so > 0.0);
        if is_broken_somewhere {
            agree(world, if is_broken { Err(Error::Failure(NOT_FINITE.into())) } else { Ok(()) })?;
        }
        if !goes_on {
            break;
        }
        // Sequences that have ended go on with the others: nobody reads what comes of them.
        let positions: Vec<i64> = lengths.iter().map(|&length| (length + new) as i64).collect();
        let batch = Batch::of_single_tokens(&next, &positions, device);
        let places = cache.places(lengths.iter().map(|&length| length + new).enumerate(), device);
        let lengths = Tensor::from_slice(&positions).to_device(device) + 1;
        let attend = NextTokens { cache: &cache, places, lengths, longest: longest + new + 1 };
        logits = model.logits_of(&batch, adapters, None, &attend)?;
    }
    Ok(continuations)
}
