//! Refusals of requests to sample, by the name of the field.

use super::super::request::{MOST_TOP, SampleRequest};

/// Most continuations of a request.
pub const MOST_SAMPLES: usize = 4096;

/// The reason why a request is refused, or ends without a reply.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    #[error("{field}: {value}, expected {expected}")]
    Field { field: String, value: String, expected: String },
    #[error(
        "prompt: {prompt} tokens, and max_new_tokens {new}: the KV cache of a rank has room for {room} tokens; shorten \
         the prompt or lower max_new_tokens"
    )]
    TooLong { prompt: usize, new: usize, room: usize },
    #[error("request {0}: its number is in use")]
    Ticket(u64),
    #[error(
        "the outputs have NaN or infinity: weights of the model or of the adapter are not finite, or too large for the \
         dtype that it computes in"
    )]
    NotFinite,
}

impl SampleError {
    pub(super) fn field(field: impl Into<String>, value: impl ToString, expected: impl Into<String>) -> Self {
        Self::Field { field: field.into(), value: value.to_string(), expected: expected.into() }
    }
}

/// Checks a request against the model: every token below `vocab_size`, and prompt and continuation at most `max_tokens`
/// long.
pub fn check(request: &SampleRequest, vocab_size: usize, max_tokens: usize) -> Result<(), SampleError> {
    let highest = vocab_size as i64 - 1;
    let known = |name: &str, ids: &[i64], lowest: i64| {
        let unknown = ids.iter().position(|&id| id < lowest || id > highest);
        unknown.map_or(Ok(()), |at| {
            let expected = format!("a token of the model, 0 to {highest}");
            Err(SampleError::field(format!("{name}[{at}]"), ids[at], expected))
        })
    };
    known("prompt", &request.prompt, 0)?;
    known("stop.ids", &request.stop.ids, 0)?;
    let targets = request.wanted.prompt_targets.as_ref().map_or(&[][..], |targets| &targets.ids);
    known("wanted.prompt_targets.ids", targets, i64::MIN)?;
    let (prompt, new) = (request.prompt.len(), request.max_new_tokens);
    if prompt > max_tokens {
        let expected = format!("at most {max_tokens} tokens");
        return Err(SampleError::field("prompt", format!("{prompt} tokens"), expected));
    }
    if new > max_tokens - prompt {
        let most = max_tokens - prompt;
        let expected = format!("at most {most}: {max_tokens} tokens with the prompt's {prompt}");
        return Err(SampleError::field("max_new_tokens", new, expected));
    }
    Ok(())
}

/// Checks a request by itself; stop texts need the text of tokens, which `has_decode` says there is.
pub(super) fn check_alone(request: &SampleRequest, has_decode: bool) -> Result<(), SampleError> {
    let refuse = |field: &str, value: &dyn ToString, expected: &str| {
        Err(SampleError::field(field, value.to_string(), expected))
    };
    let SampleRequest { prompt, count, max_new_tokens: _, choice, seed: _, stop, wanted } = request;
    if prompt.is_empty() {
        return refuse("prompt", &"no token", "at least one");
    }
    if !(1..=MOST_SAMPLES).contains(count) {
        return refuse("count", count, &format!("1 to {MOST_SAMPLES}"));
    }
    if !(choice.temperature.is_finite() && choice.temperature >= 0.0) {
        return refuse("choice.temperature", &choice.temperature, "0 or more, 0 for the most likely token");
    }
    if !(choice.top_p > 0.0 && choice.top_p <= 1.0) {
        return refuse("choice.top_p", &choice.top_p, "above 0, at most 1");
    }
    if choice.top_k == Some(0) {
        return refuse("choice.top_k", &0, "at least 1, or none for all tokens");
    }
    if let Some(at) = stop.texts.iter().position(String::is_empty) {
        return refuse(&format!("stop.texts[{at}]"), &"\"\"", "a text that is not empty");
    }
    if !stop.texts.is_empty() && !has_decode {
        return refuse("stop.texts", &format!("{:?}", stop.texts), "none, for the model has no tokenizer");
    }
    for (name, top) in [("wanted.prompt_top", wanted.prompt_top), ("wanted.new_top", wanted.new_top)] {
        if top > MOST_TOP {
            return refuse(name, &top, &format!("at most {MOST_TOP}"));
        }
    }
    if let Some(targets) = &wanted.prompt_targets {
        let rows = prompt.len() - 1;
        if rows.checked_mul(targets.k) != Some(targets.ids.len()) {
            let value = format!("{} tokens", targets.ids.len());
            let expected =
                format!("{rows}×{}: {} for each token but the prompt's last", targets.k, targets.k);
            return refuse("wanted.prompt_targets.ids", &value, &expected);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{
        super::super::request::{Choice, PromptTargets, Stop, Wanted},
        *,
    };

    fn request() -> SampleRequest {
        SampleRequest {
            prompt: vec![1, 2, 3],
            count: 1,
            max_new_tokens: 4,
            choice: Choice { temperature: 1.0, top_p: 1.0, top_k: None },
            seed: 0,
            stop: Stop::default(),
            wanted: Wanted::default(),
        }
    }

    fn changed(change: impl FnOnce(&mut SampleRequest)) -> SampleRequest {
        let mut request = request();
        change(&mut request);
        request
    }

    #[test]
    fn a_refusal_names_the_field_its_value_and_the_range() {
        let targets = |ids: &[i64], k| Some(PromptTargets { ids: ids.into(), k });
        let cases: [(SampleRequest, &str); 14] = [
            (changed(|r| r.prompt.clear()), "prompt: no token, expected at least one"),
            (changed(|r| r.count = 0), "count: 0, expected 1 to 4096"),
            (changed(|r| r.count = 4097), "count: 4097, expected 1 to 4096"),
            (
                changed(|r| r.choice.temperature = -0.5),
                "choice.temperature: -0.5, expected 0 or more, 0 for the most likely token",
            ),
            (
                changed(|r| r.choice.temperature = f64::NAN),
                "choice.temperature: NaN, expected 0 or more, 0 for the most likely token",
            ),
            (
                changed(|r| r.choice.temperature = f64::INFINITY),
                "choice.temperature: inf, expected 0 or more, 0 for the most likely token",
            ),
            (changed(|r| r.choice.top_p = 0.0), "choice.top_p: 0, expected above 0, at most 1"),
            (changed(|r| r.choice.top_p = 1.5), "choice.top_p: 1.5, expected above 0, at most 1"),
            (
                changed(|r| r.choice.top_k = Some(0)),
                "choice.top_k: 0, expected at least 1, or none for all tokens",
            ),
            (
                changed(|r| r.stop.texts = vec!["a".into(), "".into()]),
                "stop.texts[1]: \"\", expected a text that is not empty",
            ),
            (
                changed(|r| r.stop.texts = vec!["a".into()]),
                "stop.texts: [\"a\"], expected none, for the model has no tokenizer",
            ),
            (changed(|r| r.wanted.prompt_top = 129), "wanted.prompt_top: 129, expected at most 128"),
            (changed(|r| r.wanted.new_top = 200), "wanted.new_top: 200, expected at most 128"),
            (
                changed(|r| r.wanted.prompt_targets = targets(&[1, 2, 3], 2)),
                "wanted.prompt_targets.ids: 3 tokens, expected 2×2: 2 for each token but the prompt's last",
            ),
        ];
        for (request, message) in cases {
            assert_eq!(check_alone(&request, false).unwrap_err().to_string(), message);
        }
        let whole = changed(|r| {
            r.stop.texts = vec!["a".into()];
            r.wanted.prompt_targets = targets(&[1, -1, 3, 4], 2);
        });
        assert_eq!(check_alone(&whole, true), Ok(()));
    }

    #[test]
    fn a_request_beyond_the_model_is_refused() {
        let cases = [
            (changed(|r| r.prompt[1] = 9), "prompt[1]: 9, expected a token of the model, 0 to 8"),
            (changed(|r| r.prompt[0] = -1), "prompt[0]: -1, expected a token of the model, 0 to 8"),
            (changed(|r| r.stop.ids = vec![9]), "stop.ids[0]: 9, expected a token of the model, 0 to 8"),
            (
                changed(|r| r.wanted.prompt_targets = Some(PromptTargets { ids: vec![-1, 9], k: 1 })),
                "wanted.prompt_targets.ids[1]: 9, expected a token of the model, 0 to 8",
            ),
            (changed(|r| r.prompt = vec![0; 11]), "prompt: 11 tokens, expected at most 10 tokens"),
            (
                changed(|r| r.max_new_tokens = 8),
                "max_new_tokens: 8, expected at most 7: 10 tokens with the prompt's 3",
            ),
        ];
        for (request, message) in cases {
            assert_eq!(check(&request, 9, 10).unwrap_err().to_string(), message);
        }
        assert_eq!(check(&changed(|r| r.max_new_tokens = 7), 9, 10), Ok(()));
    }
}
