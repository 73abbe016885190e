//! Greedy decoding. Each rank continues its own prompts; all ranks gather the same layers, so a rank that is done, or
//! that has no prompt, keeps step with the others.

use super::cache::{KvCache, NextTokens, Prefill};
use crate::{
    comm::{Communicator, Reduce},
    lora::Adapter,
    model::transformer::{Batch, Transformer},
    shard::ShardError,
};
use tch::Tensor;

/// Sequences that a rank decodes at a time: enough for the GEMMs to pay for a gather of the layers.
const SEQUENCES: usize = 64;

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
) -> Result<Vec<Vec<i64>>, ShardError> {
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
) -> Result<Vec<Vec<i64>>, ShardError> {
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
        let next = Vec::<i64>::try_from(logits.argmax(-1, false))?;
        for ((&id, ended), continuation) in next.iter().zip(&mut ended).zip(&mut continuations) {
            *ended |= limits.eos_token_ids.contains(&id);
            if !*ended {
                continuation.push(id);
            }
        }
        let mut going = [f64::from(u8::from(ended.contains(&false) && new + 1 < limits.max_new_tokens))];
        world.all_reduce_host(&mut going, Reduce::Max)?;
        if going[0] == 0.0 {
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
