//! Parameters of a request to sample as all wires have them, checked by the names of the one that sent them. Pure.

use crate::{
    infer::request::{Choice, MOST_TOP, SampleRequest, Stop, Wanted},
    server::app::Settings,
};
use std::hash::{BuildHasher, RandomState};

/// Continuations of a request, at most.
pub const MOST_CONTINUATIONS: usize = 1024;

/// Stop texts of a request, and bytes of one, at most.
const MOST_TEXTS: usize = 64;
const LONGEST_TEXT: usize = 1024;

/// Stop ids of a request, at most.
const MOST_IDS: usize = 1024;

/// Tokens that a request may get, with the most likely ones that are told beside each: its result then takes some
/// hundred MB.
pub const MOST_RESULTS: usize = 1 << 24;

/// Parameters as a client sent them; what is absent has the value of the wire's clients.
#[derive(Clone, Debug, PartialEq)]
pub struct Sent {
    pub prompt: Vec<i64>,
    pub count: i64,
    /// `None`: as many as the context leaves.
    pub max_tokens: Option<i64>,
    pub temperature: f64,
    pub top_p: f64,
    /// -1 and 0: all.
    pub top_k: i64,
    /// `None`: another one at each request.
    pub seed: Option<i64>,
    pub stop: Stop,
    pub wanted: Wanted,
}

/// Names of the wire's fields, for texts of refusals.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    pub prompt: &'static str,
    pub count: &'static str,
    pub max_tokens: &'static str,
    pub stop: &'static str,
    pub new_top: &'static str,
    pub prompt_top: &'static str,
}

/// A parameter that is refused. Permanent: to be answered by 400 with this text.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    #[error("{name}: expected {expected}, got {got}")]
    Value { name: &'static str, expected: String, got: String },
    #[error("{name}: {got} tokens and one to sample are more than the {most} of this model's context")]
    Long { name: &'static str, got: usize, most: usize },
    #[error("{name}: token {index} is {id}: the vocabulary has {vocabulary} ids, 0 and up")]
    Id { name: &'static str, index: usize, id: i64, vocabulary: usize },
    #[error(
        "{count} of {max_tokens} {got}, each with {top} likely tokens beside it, are more than the {most} tokens of \
         one result: ask for fewer, or in several requests"
    )]
    Large { count: &'static str, max_tokens: &'static str, got: usize, top: usize, most: usize },
}

fn value(name: &'static str, expected: impl Into<String>, got: impl ToString) -> SampleError {
    SampleError::Value { name, expected: expected.into(), got: got.to_string() }
}

/// # Errors
/// The first id that is none of the vocabulary.
pub fn check_ids(name: &'static str, ids: &[i64], vocabulary: usize) -> Result<(), SampleError> {
    match ids.iter().position(|&id| id < 0 || id >= vocabulary as i64) {
        Some(index) => Err(SampleError::Id { name, index, id: ids[index], vocabulary }),
        None => Ok(()),
    }
}

/// A number that no other request has.
pub fn fresh_number() -> u64 {
    RandomState::new().hash_one(0)
}

/// Checks what a client sent.
///
/// # Errors
/// The first parameter that is out of its range.
pub fn checked(sent: Sent, names: &Names, settings: &Settings) -> Result<SampleRequest, SampleError> {
    let Sent { prompt, count, max_tokens, temperature, top_p, top_k, seed, stop, wanted } = sent;
    let most = settings.max_context;
    if prompt.is_empty() {
        return Err(value(names.prompt, "at least one token", "none"));
    }
    if prompt.len() >= most {
        return Err(SampleError::Long { name: names.prompt, got: prompt.len(), most });
    }
    check_ids(names.prompt, &prompt, settings.vocab_size)?;
    let Some(continuations) = usize::try_from(count).ok().filter(|n| (1..=MOST_CONTINUATIONS).contains(n))
    else {
        return Err(value(names.count, format!("1 to {MOST_CONTINUATIONS}"), count));
    };
    let left = most - prompt.len();
    let max_new_tokens = match max_tokens {
        None => left,
        Some(got) => usize::try_from(got).ok().filter(|n| (1..=left).contains(n)).ok_or_else(|| {
            let of_prompt = prompt.len();
            let expected =
                format!("1 to {left}, since the prompt has {of_prompt} tokens of the context's {most}");
            value(names.max_tokens, expected, got)
        })?,
    };
    if !(temperature >= 0.0 && temperature.is_finite()) {
        return Err(value("temperature", "a number, 0 or more", temperature));
    }
    if !(top_p > 0.0 && top_p <= 1.0) {
        return Err(value("top_p", "a number above 0, at most 1", top_p));
    }
    if top_k < -1 {
        return Err(value("top_k", "a positive number, or -1 for all tokens", top_k));
    }
    let top_k = usize::try_from(top_k).ok().filter(|&top_k| top_k > 0);
    check_stop(&stop, names.stop, settings.vocab_size)?;
    for (name, got) in [(names.new_top, wanted.new_top), (names.prompt_top, wanted.prompt_top)] {
        if got > MOST_TOP {
            return Err(value(name, format!("at most {MOST_TOP}"), got));
        }
    }
    let results = continuations.saturating_mul(max_new_tokens).saturating_mul(1 + wanted.new_top);
    if results > MOST_RESULTS {
        return Err(SampleError::Large {
            count: names.count,
            max_tokens: names.max_tokens,
            got: max_new_tokens,
            top: wanted.new_top,
            most: MOST_RESULTS,
        });
    }
    Ok(SampleRequest {
        prompt,
        count: continuations,
        max_new_tokens,
        choice: Choice { temperature, top_p, top_k },
        seed: seed.map_or_else(fresh_number, i64::cast_unsigned),
        stop,
        wanted,
    })
}

fn check_stop(stop: &Stop, name: &'static str, vocabulary: usize) -> Result<(), SampleError> {
    if stop.texts.len() > MOST_TEXTS || stop.ids.len() > MOST_IDS {
        let got = stop.texts.len() + stop.ids.len();
        return Err(value(name, format!("at most {MOST_TEXTS} texts or {MOST_IDS} ids"), got));
    }
    if let Some(text) = stop.texts.iter().find(|text| text.is_empty() || text.len() > LONGEST_TEXT) {
        return Err(value(
            name,
            format!("texts of 1 to {LONGEST_TEXT} bytes"),
            format!("{} bytes", text.len()),
        ));
    }
    check_ids(name, &stop.ids, vocabulary)
}
