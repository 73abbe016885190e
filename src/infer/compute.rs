//! The forward of a step that samples: a rank's part of it. Every rank computes every step, perhaps without a row.

use super::{
    cache::KvCache,
    choose::{choose, top as most_likely},
    request::TokenLogProb,
    step::{Draw, Drawn, RankResult, RankStep, Run, RunResult, Score, Step},
};
use crate::{
    data::IGNORE_INDEX,
    lora::Adapter,
    loss::Targets,
    model::transformer::{Batch, Predicted, Reading, Transformer},
    ops::cpu::values,
    shard::ShardError,
};
use std::{iter::repeat_n, ops::Range};
use tch::{Device, Kind, Tensor};

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
    Ok(RankResult { runs: results(&work.runs, &Outputs::fetch(&predicted)) })
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

/// The predictions of a rank's rows, on the host.
struct Outputs {
    vocab: usize,
    /// `[told × vocab]`
    logits: Vec<f32>,
    /// log Σ exp of each row's logits: `[told]`
    log_sums: Vec<f32>,
    /// True for a row all of whose logits are finite: `[told]`
    is_finite: Vec<bool>,
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
        let Predicted { logits, log_probs, top: [top, ids] } = predicted;
        let finite = logits.isfinite().all_dim(1, false).to_kind(Kind::Int64);
        let ids = values::<i64>(&ids.to_device(Device::Cpu));
        Self {
            vocab: logits.size()[1] as usize,
            logits: host(logits),
            log_sums: host(&logits.logsumexp([1i64], false)),
            is_finite: values::<i64>(&finite.to_device(Device::Cpu)).iter().map(|&all| all != 0).collect(),
            k: log_probs.size()[1] as usize,
            log_probs: host(log_probs),
            most: top.size()[1] as usize,
            top: ids.into_iter().zip(host(top)).collect(),
        }
    }

    /// The tokens of the draws behind row `row` of `logits`.
    fn draw(&self, row: usize, draws: &[Draw]) -> Vec<Drawn> {
        let logits = &self.logits[row * self.vocab..(row + 1) * self.vocab];
        let drawn = |&Draw { choice, uniform, top }: &Draw| {
            let chosen = choose(logits, choice, uniform);
            let most = || most_likely(logits, f64::from(self.log_sums[row]), top);
            Drawn {
                id: chosen as i64,
                log_prob: logits[chosen] - self.log_sums[row],
                top: if top > 0 { most() } else { Vec::new() },
            }
        };
        draws.iter().map(drawn).collect()
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

/// The results of `runs`, in their order.
fn results(runs: &[Run], outputs: &Outputs) -> Vec<RunResult> {
    let (mut told, mut scored) = (0, 0);
    let of_run = |run: &Run| {
        let tokens = run.ids.len();
        let mut result = RunResult::default();
        if let Some(score) = &run.score {
            result = outputs.score(scored, tokens, score);
            scored += tokens;
        }
        if !run.draws.is_empty() {
            result.is_broken |= !outputs.is_finite[told];
            if !result.is_broken {
                result.drawn = outputs.draw(told, &run.draws);
            }
            told += 1;
        }
        result
    };
    runs.iter().map(of_run).collect()
}
