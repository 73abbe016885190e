//! The forward of a step that samples: a rank's part of it. Every rank computes every step, perhaps without a row.

use super::{
    cache::KvCache,
    choose::{choose, log_sum_exp, top as most_likely},
    request::TokenLogProb,
    step::{Draw, Drawn, RankResult, RankStep, Run, RunResult, Score, Step},
};
use crate::{
    data::IGNORE_INDEX,
    lora::Adapter,
    loss::Targets,
    model::transformer::{Batch, Predicted, Reading, Transformer},
    ops::cpu::{Rows, pool, values},
    shard::ShardError,
};
use std::{iter::repeat_n, ops::Range, sync::OnceLock};
use tch::{Device, Tensor};

/// Computes the work of `step` of the rank with data index `own`. `adapters` are those of [`Step::adapters`], in their
/// order, on every rank. Collective.
pub fn compute<K>(
    model: &mut Transformer,
    adapters: &mut [&mut Adapter],
    cache: &mut KvCache,
    step: &Step<K>,
    own: usize,
) -> Result<RankResult, ShardError> {
    debug_assert_eq!(adapters.len(), step.adapters.len());
    let none = RankStep::default();
    let work = step.ranks.get(own).unwrap_or(&none);
    let _guard = tch::no_grad_guard();
    cache.copy(&work.copies);
    let device = model.device().tensors();
    let batch = batch_of(step, &work.runs, device);
    let reads = Reads::of(&work.runs);
    let [told, scored] = [&reads.told, &reads.scored].map(|rows| Tensor::from_slice(rows).to_device(device));
    let targets = Targets::new(&reads.targets, reads.k, &[reads.scored.len()], device);
    let reading = Reading { logits: &told, scored: &scored, targets: &targets, top: reads.top };
    let attend = cache.attend(work);
    let predicted = model.predict(&batch, adapters, &attend, &reading)?;
    Ok(RankResult {
        runs: results(&work.runs, &predicted.logits.to_device(Device::Cpu), &Outputs::fetch(&predicted)),
    })
}

/// The batch of `runs`. Ranks agree on the pattern of adapters, which they take from the whole step.
fn batch_of<K>(step: &Step<K>, runs: &[Run], device: Device) -> Batch {
    let ids: Vec<i64> = runs.iter().flat_map(|run| run.ids.iter().copied()).collect();
    let parts: Vec<Range<usize>> = runs.iter().map(|run| run.first..run.first + run.ids.len()).collect();
    let batch = Batch::of_parts(&ids, &parts, device);
    // One adapter that has all rows of all ranks costs nothing.
    let mut all = step.ranks.iter().flat_map(|rank| &rank.runs);
    if step.adapters.is_empty() || step.adapters.len() == 1 && all.all(|run| run.adapter.is_some()) {
        return batch;
    }
    let same = runs.chunk_by(|a, b| a.adapter == b.adapter);
    let segments = same.map(|runs| (runs.iter().map(|run| run.ids.len()).sum(), runs[0].adapter));
    batch.with_adapters(&segments.collect::<Vec<_>>(), step.adapters.len())
}

/// The rows of a batch that are read.
#[derive(Default)]
struct Reads {
    /// The last row of each run that draws.
    told: Vec<i64>,
    /// The rows of each run that is scored.
    scored: Vec<i64>,
    /// `[scored × k]`
    targets: Vec<i64>,
    k: usize,
    /// The most that a run wants.
    top: usize,
}

impl Reads {
    fn of(runs: &[Run]) -> Self {
        let scores = || runs.iter().filter_map(|run| run.score.as_ref());
        let k = scores().map(|score| score.k).max().unwrap_or(0).max(1);
        let mut reads =
            Self { k, top: scores().map(|score| score.top).max().unwrap_or(0), ..Self::default() };
        let mut row = 0;
        for run in runs {
            let end = row + run.ids.len() as i64;
            if !run.draws.is_empty() {
                reads.told.push(end - 1);
            }
            if let Some(score) = &run.score {
                reads.scored.extend(row..end);
                for at in 0..run.ids.len() {
                    let own = &score.targets[at * score.k..(at + 1) * score.k];
                    reads.targets.extend(own);
                    reads.targets.extend(repeat_n(IGNORE_INDEX, k - score.k));
                }
            }
            row = end;
        }
        reads
    }
}

/// The predictions of the rows that are scored, on the host.
struct Outputs {
    k: usize,
    /// `[scored × k]`
    log_probs: Vec<f32>,
    /// Columns of `top`.
    most: usize,
    /// `[scored × most]`
    top: Vec<TokenLogProb>,
}

impl Outputs {
    fn fetch(predicted: &Predicted) -> Self {
        let host = |tensor: &Tensor| values::<f32>(&tensor.to_device(Device::Cpu));
        let Predicted { log_probs, top: [top, ids], .. } = predicted;
        let ids = values::<i64>(&ids.to_device(Device::Cpu));
        Self {
            k: log_probs.size()[1] as usize,
            log_probs: host(log_probs),
            most: top.size()[1] as usize,
            top: ids.into_iter().zip(host(top)).collect(),
        }
    }

    /// The scores of a run of `tokens` tokens, whose first is row `row` of those that are scored.
    fn score(&self, row: usize, tokens: usize, score: &Score) -> RunResult {
        let mut result = RunResult::default();
        for at in 0..tokens {
            let own = self.log_probs[(row + at) * self.k..].iter();
            let targets = &score.targets[at * score.k..(at + 1) * score.k];
            for (&target, &log_prob) in targets.iter().zip(own) {
                result.is_broken |= target >= 0 && !log_prob.is_finite();
                result.log_probs.push(if target < 0 { f32::NAN } else { log_prob });
            }
            if score.top > 0 {
                let most = &self.top[(row + at) * self.most..(row + at + 1) * self.most];
                let most = &most[..score.top.min(most.len())];
                result.is_broken |= most.iter().any(|(_, log_prob)| !log_prob.is_finite());
                result.top.push(most.to_vec());
            }
        }
        result
    }
}

/// The tokens of `draws` behind a row of logits; `None` where one of these is not finite.
fn draw(logits: &[f32], draws: &[Draw]) -> Option<Vec<Drawn>> {
    let log_sum = log_sum_exp(logits)?;
    let drawn = |&Draw { choice, uniform, top }: &Draw| {
        let chosen = choose(logits, choice, uniform);
        Drawn {
            id: chosen as i64,
            log_prob: (f64::from(logits[chosen]) - log_sum) as f32,
            top: if top > 0 { most_likely(logits, log_sum, top) } else { Vec::new() },
        }
    };
    Some(draws.iter().map(drawn).collect())
}

/// The results of `runs`, in their order, from the logits `[told, vocab]` fp32 on the host and the rest. Threads share
/// the runs: a row of a large vocabulary takes about as long as some of its layers.
fn results(runs: &[Run], logits: &Tensor, outputs: &Outputs) -> Vec<RunResult> {
    let (mut told, mut scored) = (0, 0);
    let places = runs.iter().map(|run| {
        let place = (told, scored);
        told += usize::from(!run.draws.is_empty());
        scored += if run.score.is_some() { run.ids.len() } else { 0 };
        place
    });
    let places: Vec<(usize, usize)> = places.collect();
    let logits = Rows::<f32>::of(logits);
    let results: Vec<OnceLock<RunResult>> = runs.iter().map(|_| OnceLock::new()).collect();
    pool::tasks(runs.len(), |i| {
        let (run, (told, scored)) = (&runs[i], places[i]);
        let score = run.score.as_ref();
        let mut result = score.map(|score| outputs.score(scored, run.ids.len(), score)).unwrap_or_default();
        if !run.draws.is_empty() {
            // SAFETY: nothing writes to the logits, which the caller lends.
            match draw(unsafe { logits.row(told) }, &run.draws) {
                Some(drawn) => result.drawn = drawn,
                None => result.is_broken = true,
            }
        }
        // Each run has one task, so the place is empty.
        let _ = results[i].set(result);
    });
    results.into_iter().map(|result| result.into_inner().unwrap_or_default()).collect()
}
