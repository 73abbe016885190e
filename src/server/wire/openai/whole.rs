//! Answers as one body, once all continuations have ended.

use super::{
    answers::{Answer, Choice, Head, LogProbs, Usage, finish_reason},
    asked::{Asked, Kind},
    fault::Refused,
    generation::{Generation, News},
    tokens::{Entry, Text, log_probs, of_prompt},
};
use crate::{
    infer::request::{Continuation, End, SampleReply},
    server::{app::App, fault::Fault},
};
use std::sync::Arc;

/// The replies of all prompts, in their order.
///
/// # Errors
/// The engine refuses one, or has failed.
pub async fn replies(mut generation: Generation, asked: &Asked) -> Result<Vec<SampleReply>, Refused> {
    let mut replies = vec![None; asked.requests.len()];
    while let Some(news) = generation.next().await? {
        if let News::End(prompt, reply) = news {
            replies[prompt] = Some(reply);
        }
    }
    Ok(replies.into_iter().flatten().collect())
}

/// The body of an answer.
///
/// # Errors
/// The tokenizer fails.
pub fn answer(app: &App, asked: &Asked, head: Head, replies: &[SampleReply]) -> Result<Answer, Fault> {
    let (mut choices, mut completion_tokens) = (Vec::new(), 0);
    for (number, (request, reply)) in asked.requests.iter().zip(replies).enumerate() {
        let stop = Arc::new(request.stop.clone());
        let echo = asked.echo.as_ref().map(|prompts| prompts[number].as_str());
        let prompt = match asked.top.filter(|_| request.wanted.prompt) {
            Some(_) => of_prompt(&app.texts, &request.prompt, &reply.prompt)?,
            None => Vec::new(),
        };
        // A request for no token has the prompt alone.
        let none = Continuation { ids: Vec::new(), log_probs: Vec::new(), top: Vec::new(), end: End::Length };
        for sample in 0..request.count {
            let continuation = reply.continuations.get(sample).unwrap_or(&none);
            completion_tokens += continuation.ids.len();
            let mut text = Text::new(&app.texts, &request.prompt, stop.clone(), asked.top.is_some())?;
            let part = text.whole(continuation);
            let reason = finish_reason(&continuation.end, text.is_cut());
            let scores = asked.top.map(|top| scores(app, asked.kind, top, echo, &prompt, &part.tokens));
            let whole = echo.unwrap_or_default().to_owned() + &part.text;
            choices.push(Choice::whole(asked.kind, choices.len(), whole, scores.transpose()?, reason));
        }
    }
    Ok(Answer { head, choices, usage: Some(Usage::new(asked.prompt_tokens(), completion_tokens)) })
}

/// The log-probabilities of a continuation, behind those of its prompt where it is told.
fn scores(
    app: &App,
    kind: Kind,
    top: usize,
    echo: Option<&str>,
    prompt: &[Entry],
    tokens: &[Entry],
) -> Result<LogProbs, Fault> {
    let before = echo.map_or(0, |text| text.chars().count());
    let scores = log_probs(&app.texts, kind, top, before, tokens)?;
    match (log_probs(&app.texts, kind, top, 0, prompt)?, scores) {
        (LogProbs::Text(all), LogProbs::Text(more)) => Ok(LogProbs::Text(all.and(more))),
        (_, scores) => Ok(scores),
    }
}
