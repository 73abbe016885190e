//! A body as what it asks of the engine: checked, with prompts as token ids.

use super::{
    bodies::{Chat, Completion, OneOrMore, Sampling, check_refused},
    fault::Refused,
    models, prompts,
};
use crate::{
    infer::request::{SampleRequest, Stop, Wanted},
    server::{
        app::App,
        registry::Tenant,
        request::Source,
        wire::{
            sampling::{MOST_CONTINUATIONS, MOST_RESULTS, Names, SampleError, Sent, check_ids, checked},
            xorl::fields,
        },
    },
};
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeSet;

/// Continuations of a prompt, at most.
const MOST_OF_PROMPT: usize = 128;
/// Tokens that are named at each position, at most.
const MOST_TOP: usize = 20;
/// Tokens of a completion where the request does not say.
const COMPLETION_TOKENS: usize = 16;

/// The call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Text,
}

/// A request to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub kind: Kind,
    /// The name of the model, as it was sent.
    pub model: String,
    pub source: Source,
    /// One a prompt, all alike but for the prompt and the seed.
    pub requests: Vec<SampleRequest>,
    /// The texts of the prompts, where each answer begins with its own.
    pub echo: Option<Vec<String>>,
    /// Log-probabilities are told, and this number of the most likely tokens at each position.
    pub top: Option<usize>,
    pub is_stream: bool,
    /// A stream ends with the counts of tokens.
    pub tells_usage: bool,
}

impl Asked {
    /// Continuations of each prompt.
    pub fn count(&self) -> usize {
        self.requests.first().map_or(1, |request| request.count)
    }

    pub fn prompt_tokens(&self) -> usize {
        self.requests.iter().map(|request| request.prompt.len()).sum()
    }
}

/// Reads the body of a call. A model that the client cannot ask is refused before its prompt is looked at.
///
/// # Errors
/// A field is wrong or not built, or there is no such model.
pub fn read(app: &App, tenant: &Tenant, kind: Kind, body: &[u8]) -> Result<Asked, Refused> {
    check_refused(&fields::object(body)?)?;
    let sampling: Sampling = part(body)?;
    match kind {
        Kind::Chat => {
            let body = part(body)?;
            chat(app, models::source(app, tenant, &sampling.model)?, sampling, body)
        }
        Kind::Text => {
            let body = part(body)?;
            completion(app, models::source(app, tenant, &sampling.model)?, sampling, body)
        }
    }
}

fn part<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refused> {
    Ok(fields::read(body)?)
}

fn chat(app: &App, source: Source, sampling: Sampling, body: Chat) -> Result<Asked, Refused> {
    let Chat { messages, tools, tool_choice, max_completion_tokens, logprobs, top_logprobs } = body;
    let top = match (logprobs.unwrap_or(false), top_logprobs.unwrap_or(0)) {
        (false, 0) => None,
        (false, _) => return Err(Refused::field("top_logprobs", "needs logprobs: true")),
        (true, top) => Some(checked_top("top_logprobs", top)?),
    };
    let has_tools = match &tool_choice {
        None => true,
        Some(Value::String(choice)) if choice == "auto" => true,
        Some(Value::String(choice)) if choice == "none" => false,
        Some(other) => {
            let reason = format!("calls are not forced here; expected \"auto\" or \"none\", got {other}");
            return Err(Refused::field("tool_choice", reason));
        }
    };
    let tools = tools.filter(|tools| has_tools && !tools.is_empty());
    let tools = tools.map(|tools| Value::Array(tools.into_iter().map(Value::Object).collect()));
    let (field, most) = match (max_completion_tokens, sampling.max_tokens) {
        (Some(most), _) => ("max_completion_tokens", Some(most)),
        (None, most) => ("max_tokens", most),
    };
    let ids = prompts::of_chat(app, messages, tools)?;
    let names = Names {
        prompt: "messages",
        count: "n",
        max_tokens: field,
        stop: "stop",
        new_top: "top_logprobs",
        prompt_top: "top_logprobs",
    };
    let wanted = Wanted { new_top: top.unwrap_or(0), ..Wanted::default() };
    let requests = requests(app, &sampling, &names, vec![ids], most, &wanted)?;
    Ok(asked(Kind::Chat, source, sampling, requests, None, top))
}

fn completion(app: &App, source: Source, sampling: Sampling, body: Completion) -> Result<Asked, Refused> {
    let Completion { prompt, echo, logprobs, best_of } = body;
    let echo = echo.unwrap_or(false);
    if best_of.is_some_and(|best_of| ![1, sampling.n.unwrap_or(1)].contains(&best_of)) {
        return Err(Refused::field(
            "best_of",
            "all continuations are given here; leave it out and choose among n",
        ));
    }
    let top = logprobs.map(|top| checked_top("logprobs", top)).transpose()?;
    if echo && top.is_some() && sampling.stream == Some(true) {
        return Err(Refused::field(
            "echo",
            "log-probabilities of a prompt are not streamed; leave out stream or echo",
        ));
    }
    let most = sampling.max_tokens.unwrap_or(COMPLETION_TOKENS);
    if most == 0 && !echo {
        return Err(Refused::field("max_tokens", "expected at least 1, or 0 with echo, got 0"));
    }
    let read = prompts::of_completion(app, prompt)?;
    let (ids, texts): (Vec<_>, Vec<_>) = read.into_iter().map(|read| (read.ids, read.text)).unzip();
    let tells_prompt = echo && top.is_some();
    let wanted = Wanted {
        prompt: tells_prompt,
        prompt_top: top.filter(|_| tells_prompt).unwrap_or(0),
        new_top: top.unwrap_or(0),
        prompt_targets: None,
    };
    let names = Names {
        prompt: "prompt",
        count: "n",
        max_tokens: "max_tokens",
        stop: "stop",
        new_top: "logprobs",
        prompt_top: "logprobs",
    };
    let mut requests = requests(app, &sampling, &names, ids, Some(most.max(1)), &wanted)?;
    if most == 0 {
        // The prompts are scored alone.
        requests.iter_mut().for_each(|request| request.max_new_tokens = 0);
    }
    Ok(asked(Kind::Text, source, sampling, requests, echo.then_some(texts), top))
}

fn asked(
    kind: Kind,
    source: Source,
    sampling: Sampling,
    requests: Vec<SampleRequest>,
    echo: Option<Vec<String>>,
    top: Option<usize>,
) -> Asked {
    let Sampling { model, stream, stream_options, .. } = sampling;
    let is_stream = stream.unwrap_or(false);
    let tells_usage = stream_options.and_then(|options| options.include_usage).unwrap_or(false);
    Asked { kind, model, source, requests, echo, top, is_stream, tells_usage }
}

fn checked_top(field: &str, top: usize) -> Result<usize, Refused> {
    if top <= MOST_TOP {
        Ok(top)
    } else {
        Err(Refused::field(field, format!("expected at most {MOST_TOP}, got {top}")))
    }
}

/// The requests to the engine, one a prompt.
fn requests(
    app: &App,
    sampling: &Sampling,
    names: &Names,
    prompts: Vec<Vec<i64>>,
    max_tokens: Option<usize>,
    wanted: &Wanted,
) -> Result<Vec<SampleRequest>, Refused> {
    let count = sampling.n.unwrap_or(1);
    if !(1..=MOST_OF_PROMPT).contains(&count) {
        return Err(Refused::field("n", format!("expected 1 to {MOST_OF_PROMPT}, got {count}")));
    }
    let all = count.saturating_mul(prompts.len());
    if all > MOST_CONTINUATIONS {
        let reason = format!("expected {MOST_CONTINUATIONS} continuations of all prompts at most, got {all}");
        return Err(Refused::field("n", reason));
    }
    let more = sampling.stop_token_ids.as_deref().unwrap_or_default();
    check_ids("stop_token_ids", more, app.settings.vocab_size)?;
    let ids: BTreeSet<i64> = app.settings.end_token_ids.iter().chain(more).copied().collect();
    let texts = sampling.stop.clone().map(OneOrMore::into_texts).unwrap_or_default();
    let stop = Stop { ids: ids.into_iter().collect(), texts };
    let request = |(number, prompt): (usize, Vec<i64>)| {
        let sent = Sent {
            prompt,
            count: count as i64,
            max_tokens: max_tokens.map(|most| i64::try_from(most).unwrap_or(i64::MAX)),
            temperature: sampling.temperature.unwrap_or(1.0),
            top_p: sampling.top_p.unwrap_or(1.0),
            top_k: sampling.top_k.unwrap_or(-1),
            // Equal prompts of one request are not continued alike.
            seed: sampling.seed.map(|seed| seed.wrapping_add(number as i64)),
            stop: stop.clone(),
            wanted: wanted.clone(),
        };
        checked(sent, names, &app.settings).map_err(|error| {
            let is_long = match &error {
                SampleError::Long { .. } => true,
                SampleError::Value { name, .. } => *name == names.max_tokens && max_tokens != Some(0),
                _ => false,
            };
            let refused = Refused::from(error);
            if is_long { refused.with_code("context_length_exceeded") } else { refused }
        })
    };
    let requests = prompts.into_iter().enumerate().map(request).collect::<Result<Vec<_>, _>>()?;
    let results = |request: &SampleRequest| count * request.max_new_tokens * (1 + wanted.new_top);
    if requests.iter().map(results).sum::<usize>() > MOST_RESULTS {
        let reason =
            format!("all prompts together may get {MOST_RESULTS} tokens, likely ones beside them included");
        return Err(Refused::field(names.max_tokens, reason));
    }
    Ok(requests)
}
