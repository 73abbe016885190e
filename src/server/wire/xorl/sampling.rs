//! Sampling as SGLang answers it: `create_sampling_session` names a saved adapter, and `/generate` samples from it.

use super::{
    Call,
    answers::{Generated, Generation, Meta, SamplingSession},
    bodies::{CreateSamplingSession, Generate, SamplingParams},
    fields::read_data,
};
use crate::{
    infer::request::{Continuation, End, SampleReply, Stop, TokenLogProb, Wanted},
    server::{
        app::App,
        checkpoints::StoreError,
        fault::Fault,
        futures::{Body, Look},
        http::failed,
        labels,
        registry::Tenant,
        request::{Reply, Source},
        sampling::{Sample, opened},
        wire::{
            Later,
            bounded::Fields,
            sampling::{Names, Sent, checked},
            scalar::Scalar,
        },
    },
};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::json;
use std::{sync::Arc, time::Duration};

const SCHEME: &str = "xorl";

/// Time for which `/generate` waits. The client gives up after half an hour.
const GENERATE_TIME: Duration = Duration::from_secs(3600);

const NAMES: Names = Names {
    prompt: "input_ids",
    count: "sampling_params.n",
    max_tokens: "sampling_params.max_new_tokens",
    stop: "sampling_params.stop",
    new_top: "top_logprobs_num",
    prompt_top: "top_logprobs_num",
};

/// Fields of SGLang that are refused unless they ask for nothing.
const UNBUILT: [&str; 7] = [
    "stream",
    "return_routed_experts",
    "return_hidden_states",
    "image_data",
    "audio_data",
    "logprob_start_len",
    "token_ids_logprob",
];
const UNBUILT_PARAMS: [&str; 11] = [
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_new_tokens",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "logit_bias",
    "stop_regex",
];

/// Opens a saved adapter under its name. The name stays its own as long as the save is there.
pub fn create_session(call: &Call) -> Result<Later, Fault> {
    let CreateSamplingSession { model_path } = super::fields::read(call.body)?;
    let (app, tenant) = (call.app.clone(), call.tenant.clone());
    let (stored, uri) = app.saved(&tenant, &model_path, SCHEME)?;
    let name = stored.checkpoint.name.clone();
    if let Some(other) = app.samplers().named(&tenant, &name).filter(|other| *other != uri) {
        let found = labels::find(&app.root(&tenant)?, &other, &stored.checkpoint.model);
        if !matches!(found, Err(StoreError::Absent(_))) {
            return Err(Fault::user(format!(
                "model_path {uri}: lora_path {name} is the name of {other}; save under another name, or delete that \
                 checkpoint"
            )));
        }
    }
    let (_, opening) = app.open_path(&tenant, &stored, &uri)?;
    Ok(Box::pin(async move {
        if let Some(opening) = opening {
            opened(opening).await?;
        }
        app.samplers().name(&tenant, &name, uri.clone());
        let message = format!("{uri} is open as lora_path {name}");
        Ok(Body::json(&SamplingSession { success: true, lora_name: name, model_path: uri, message }))
    }))
}

/// The weights that `lora_path` names: the name of a saved adapter that was opened, or a path.
fn source(app: &Arc<App>, tenant: &Tenant, lora_path: Option<&str>) -> Result<(Source, String), Fault> {
    let Some(name) = lora_path else { return Ok((Source::Base, "the base".into())) };
    let named = app.samplers().named(tenant, name);
    let path = match named {
        Some(path) => path,
        None if name.contains('/') => name.to_owned(),
        None => {
            let shown: String = name.chars().take(128).collect();
            return Err(Fault::not_found(format!(
                "lora_path {shown:?} is not open; POST /api/v1/create_sampling_session with its model_path"
            )));
        }
    };
    let (stored, uri) = app.saved(tenant, &path, SCHEME)?;
    let (source, _) = app.open_path(tenant, &stored, &uri)?;
    Ok((source, uri))
}

/// Samples, and answers when all is there. A client that leaves ends it.
pub fn generate(call: &Call) -> Result<Later, Fault> {
    refuse_unbuilt(call.body)?;
    let body: Generate = read_data(call.body)?;
    let Generate { text, input_ids, sampling_params, return_logprob, top_logprobs_num, lora_path } = body;
    let params = sampling_params.unwrap_or_default();
    let (app, tenant) = (call.app.clone(), call.tenant.clone());
    let prompt = match (text, input_ids) {
        (Some(text), None) => app.texts.encode(&text)?,
        (None, Some(ids)) => ids,
        _ => return Err(Fault::user("expected either text or input_ids")),
    };
    let (prompt_tokens, skip_special) = (prompt.len(), params.skip_special_tokens.unwrap_or(true));
    let has_log_probs = return_logprob.unwrap_or(false);
    let new_top = if has_log_probs { top_logprobs_num.unwrap_or(0) } else { 0 };
    let stop = stop(&params, &app.settings.end_token_ids);
    let stop_texts = stop.texts.clone();
    let sent = Sent {
        prompt,
        count: params.n.unwrap_or(1),
        max_tokens: Some(params.max_new_tokens.unwrap_or(128)),
        temperature: params.temperature.unwrap_or(1.0),
        top_p: params.top_p.unwrap_or(1.0),
        top_k: params.top_k.unwrap_or(-1),
        seed: params.sampling_seed.or(params.seed),
        stop,
        wanted: Wanted { new_top, ..Wanted::default() },
    };
    let request = checked(sent, &NAMES, &app.settings).map_err(|error| Fault::user(error.to_string()))?;
    let (source, name) = source(&app, &tenant, lora_path.as_deref())?;
    // Nobody asks for the result by its id.
    let render = Box::new(|_: &Reply, _| Body::json(&json!({})));
    let sample = Sample { tenant: &tenant, source, work: format!("generate of {name}"), request, render };
    let id = app.sample(sample, |_, _| {})?;
    let waiting = Waiting { app, tenant, id };
    Ok(Box::pin(async move {
        let Waiting { app, tenant, id } = &waiting;
        let outcome = match app.futures.wait(id, tenant, Some(GENERATE_TIME)).await {
            Look::Done(outcome) => outcome,
            Look::Pending(place) => {
                return Err(Fault::new(StatusCode::GATEWAY_TIMEOUT, place.reason()));
            }
            Look::Unknown => {
                let detail = "the result is no longer kept; ask for fewer tokens at once";
                return Err(Fault::new(StatusCode::INTERNAL_SERVER_ERROR, detail));
            }
        };
        let (app, id) = (app.clone(), id.clone());
        let written = move || match outcome.answer() {
            Ok(Reply::Sampled(reply)) => {
                let told = Told { has_log_probs, new_top, prompt_tokens, skip_special, stop_texts };
                told.body(&app, &id, reply)
            }
            Ok(other) => Ok(crate::server::app::mismatched(other)),
            Err(refusal) => Err(refusal.clone().into()),
        };
        tokio::task::spawn_blocking(written).await.map_err(failed)?
    }))
}

/// A request that is waited for. Dropped before its result is there, it is ended.
struct Waiting {
    app: Arc<App>,
    tenant: Tenant,
    id: String,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.app.cancel(&self.tenant, &self.id);
    }
}

/// Stop texts and ids; the model's end tokens among these unless `ignore_eos` is true.
fn stop(params: &SamplingParams, end_token_ids: &[i64]) -> Stop {
    let mut ids = params.stop_token_ids.clone().unwrap_or_default();
    if !params.ignore_eos.unwrap_or(false) {
        ids.extend(end_token_ids);
    }
    let texts = params.stop.clone().map_or_else(Vec::new, super::bodies::StopTexts::into_list);
    Stop { ids, texts }
}

/// # Errors
/// A field asks for what is not built.
fn refuse_unbuilt(body: &[u8]) -> Result<(), Fault> {
    #[derive(Deserialize)]
    struct Params {
        sampling_params: Option<Fields<Scalar>>,
    }
    let all: Fields<Scalar> = read_data(body)?;
    let Params { sampling_params } = read_data(body)?;
    let is_asked = |fields: &Fields<Scalar>, name: &str| match fields.get(name) {
        None | Some(Scalar::Null | Scalar::Flag(false)) => false,
        Some(Scalar::Number(number)) => match name {
            "repetition_penalty" => *number != 1.0,
            "logprob_start_len" => *number != -1.0,
            _ => *number != 0.0,
        },
        Some(Scalar::Text(text)) => !text.is_empty(),
        Some(Scalar::Flag(true) | Scalar::Parts) => true,
    };
    let of_params = sampling_params.unwrap_or_default();
    let top = UNBUILT.iter().find(|name| is_asked(&all, name)).map(|name| (*name).to_owned());
    let param = || UNBUILT_PARAMS.iter().find(|name| is_asked(&of_params, name));
    match top.or_else(|| param().map(|name| format!("sampling_params.{name}"))) {
        Some(name) => Err(Fault::user(format!("{name} is not served here; leave it out"))),
        None => Ok(()),
    }
}

/// The parts of a result that are told.
struct Told {
    has_log_probs: bool,
    new_top: usize,
    prompt_tokens: usize,
    skip_special: bool,
    stop_texts: Vec<String>,
}

impl Told {
    /// One object, or a list of several.
    fn body(&self, app: &App, id: &str, reply: &SampleReply) -> Result<Body, Fault> {
        let one = |(index, one): (usize, &Continuation)| self.one(app, format!("{id}-{index}"), one);
        let mut all = reply.continuations.iter().enumerate().map(one).collect::<Result<Vec<_>, _>>()?;
        let only = if all.len() == 1 { all.pop() } else { None };
        Ok(Body::json(&only.map_or_else(|| Generated::Many(all), Generated::One)))
    }

    fn one(&self, app: &App, id: String, one: &Continuation) -> Result<Generation, Fault> {
        // A server without a tokenizer samples from ids, and gives none but ids.
        let text = app.texts.tokenizer().ok().map(|_| self.text(app, one)).transpose()?;
        let pair = |&(id, value): &TokenLogProb| (value, id, ());
        let scored = || one.log_probs.iter().zip(&one.ids).map(|(&value, &id)| (value, id, ())).collect();
        let top = || one.top.iter().map(|row| row.iter().map(pair).collect()).collect();
        let meta_info = Meta {
            id,
            finish_reason: one.end.reason(),
            prompt_tokens: self.prompt_tokens,
            completion_tokens: one.ids.len(),
            output_token_logprobs: self.has_log_probs.then(scored),
            output_top_logprobs: (self.new_top > 0).then(top),
        };
        Ok(Generation { text, output_ids: one.ids.clone(), meta_info })
    }

    /// The text without what ended it.
    fn text(&self, app: &App, one: &Continuation) -> Result<String, Fault> {
        let ids = match one.end {
            End::Id => one.ids.split_last().map_or(&[][..], |(_, before)| before),
            End::Text(_) | End::Length => &one.ids,
        };
        let mut text = app.texts.decode(ids, self.skip_special)?;
        if let End::Text(number) = one.end
            && let Some(at) = self.stop_texts.get(number).and_then(|stop| text.find(stop.as_str()))
        {
            text.truncate(at);
        }
        Ok(text)
    }
}
