//! Results of `asample` to bodies that clients read: protobuf, or JSON. Pure.

use super::{
    proto::{self, ABSENT, DType, Encoding, SparseCsr, StopReason, TopkLogprobs},
    sample::Layout,
};
use crate::infer::request::{Continuation, End, SampleReply, TokenLogProb};
use prost::{Message, bytes::Bytes};
use serde::Serialize;
use utoipa::ToSchema;

fn floats(values: impl IntoIterator<Item = f32>) -> Bytes {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// Ids of a vocabulary fit in 32 bits: clients send them so.
fn ids(values: impl IntoIterator<Item = i64>) -> Bytes {
    values.into_iter().flat_map(|id| i32::try_from(id).unwrap_or(i32::MAX).to_le_bytes()).collect()
}

fn stop_reason(end: &End) -> StopReason {
    if *end == End::Length { StopReason::Length } else { StopReason::Stop }
}

/// Rows of `k` tokens. `unscored`: rows at the start that are left empty.
fn topk(rows: &[Vec<TokenLogProb>], k: usize, unscored: usize) -> Option<TopkLogprobs> {
    if k == 0 {
        return None;
    }
    let of_row = |(index, row): (usize, &Vec<TokenLogProb>)| {
        let told = row.iter().copied().filter(move |_| index >= unscored);
        told.chain(std::iter::repeat((0, ABSENT))).take(k).collect::<Vec<_>>()
    };
    let all: Vec<TokenLogProb> = rows.iter().enumerate().flat_map(of_row).collect();
    Some(TopkLogprobs {
        token_ids: ids(all.iter().map(|&(id, _)| id)),
        logprobs: floats(all.iter().map(|&(_, value)| value)),
        k: u32::try_from(k).unwrap_or(u32::MAX),
        length: u32::try_from(rows.len()).unwrap_or(u32::MAX),
    })
}

/// Log-probabilities of the prompt; NaN where a token is not scored.
fn prompt<'a>(reply: &'a SampleReply, layout: &Layout) -> Option<impl Iterator<Item = f32> + use<'a>> {
    let unscored = layout.unscored;
    let scored = move |(index, &value): (usize, &f32)| if index < unscored { f32::NAN } else { value };
    layout.prompt.then(|| reply.prompt.log_probs.iter().enumerate().map(scored))
}

/// Log-probabilities of the targets, 0 where there is none, in the form in which these came.
fn targets(reply: &SampleReply, layout: &Layout) -> Option<proto::Tensor> {
    let (k, csr) = layout.targets.as_ref()?;
    let value = |&value: &f32| if value.is_nan() { 0.0 } else { value };
    let values = &reply.prompt.targets;
    let encoding = match csr {
        None => Encoding::Dense(floats(values.iter().map(value))),
        Some(csr) => {
            let rows = csr.crow_indices.windows(2).enumerate();
            let listed = rows.flat_map(|(row, bounds)| {
                let columns = &csr.col_indices[bounds[0] as usize..bounds[1] as usize];
                columns.iter().map(move |&column| row * k + column as usize)
            });
            let integers =
                |values: &[i64]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Bytes>();
            Encoding::SparseCsr(SparseCsr {
                values: floats(listed.filter_map(|index| values.get(index)).map(value)),
                crow_indices: integers(&csr.crow_indices),
                col_indices: integers(&csr.col_indices),
            })
        }
    };
    let rows = values.len() / k;
    let shape = vec![rows as i64, *k as i64];
    Some(proto::Tensor { encoding: Some(encoding), dtype: DType::Float32.into(), shape })
}

/// A `SampleResponse`.
pub fn to_protobuf(reply: &SampleReply, layout: &Layout) -> Vec<u8> {
    let sequence = |one: &Continuation| proto::SampledSequence {
        stop_reason: stop_reason(&one.end).into(),
        tokens: ids(one.ids.iter().copied()),
        logprobs: Some(floats(one.log_probs.iter().copied())),
        topk_sampled_logprobs: topk(&one.top, layout.new_top, 0),
    };
    let response = proto::SampleResponse {
        sequences: reply.continuations.iter().map(sequence).collect(),
        prompt_logprobs: prompt(reply, layout).map(floats),
        topk_prompt_logprobs: topk(&reply.prompt.top, layout.prompt_top, layout.unscored),
        target_prompt_logprobs: targets(reply, layout),
    };
    response.encode_to_vec()
}

/// The result of `asample`.
#[derive(Debug, Serialize, ToSchema)]
#[serde(tag = "type", rename = "sample")]
pub struct Sampled<'a> {
    sequences: Vec<Sequence<'a>>,
    /// One a token; null where it is not scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<Vec<Option<f32>>>,
    /// Pairs of token and log-probability.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<Vec<(i64, f32)>>>>)]
    topk_prompt_logprobs: Option<Vec<Option<&'a [TokenLogProb]>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_prompt_logprobs: Option<Targets>,
}

/// A continuation.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = tinker::Sequence)]
struct Sequence<'a> {
    /// `stop` or `length`
    stop_reason: &'static str,
    tokens: &'a [i64],
    logprobs: &'a [f32],
    /// Pairs of token and log-probability.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<(i64, f32)>>>)]
    topk_logprobs: Option<&'a [Vec<TokenLogProb>]>,
}

/// Log-probabilities of targets, all of them listed.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = tinker::TargetLogprobs)]
struct Targets {
    data: Vec<f32>,
    dtype: &'static str,
    shape: [usize; 2],
}

/// The same for clients that ask for JSON.
pub fn to_json<'a>(reply: &'a SampleReply, layout: &Layout) -> Sampled<'a> {
    let sequence = |one: &'a Continuation| Sequence {
        stop_reason: one.end.reason(),
        tokens: &one.ids,
        logprobs: &one.log_probs,
        topk_logprobs: (layout.new_top > 0).then_some(&one.top[..]),
    };
    let scored = |value: f32| Some(value).filter(|value| !value.is_nan());
    let row = |(index, row): (usize, &'a Vec<TokenLogProb>)| {
        Some(&row[..]).filter(|row| index >= layout.unscored && !row.is_empty())
    };
    let value = |&value: &f32| if value.is_nan() { 0.0 } else { value };
    let targets = layout.targets.as_ref().map(|(k, _)| Targets {
        data: reply.prompt.targets.iter().map(value).collect(),
        dtype: "float32",
        shape: [reply.prompt.targets.len() / k, *k],
    });
    let top = || reply.prompt.top.iter().enumerate().map(row).collect();
    Sampled {
        sequences: reply.continuations.iter().map(sequence).collect(),
        prompt_logprobs: prompt(reply, layout).map(|values| values.map(scored).collect()),
        topk_prompt_logprobs: (layout.prompt_top > 0).then(top),
        target_prompt_logprobs: targets,
    }
}
