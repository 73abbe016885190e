//! Answers as server-sent events: one whenever a continuation has more text, then `[DONE]`.

use super::{
    answers::{Answer, Choice, Head, Usage, finish_reason},
    asked::{Asked, Kind},
    fault::Refused,
    generation::{Generation, News},
    tokens::{Part, Text, log_probs},
};
use crate::{
    infer::request::{End, SampleReply},
    server::{app::App, fault::Fault},
};
use axum::response::{
    IntoResponse, Response,
    sse::{Event, KeepAlive, Sse},
};
use futures_util::stream::unfold;
use std::{collections::VecDeque, convert::Infallible, sync::Arc};

/// A request that is answered as it is carried out. Dropped with its connection, which cancels it.
struct Stream {
    app: Arc<App>,
    asked: Asked,
    head: Head,
    generation: Generation,
    /// One a choice.
    texts: Vec<Text>,
    completion_tokens: usize,
    events: VecDeque<Event>,
    is_done: bool,
}

/// Answers by a stream, which begins with `first`: a refusal in its place had a status.
///
/// # Errors
/// There is no tokenizer.
pub fn respond(
    app: Arc<App>,
    asked: Asked,
    head: Head,
    generation: Generation,
    first: Option<News>,
) -> Result<Response, Fault> {
    let mut texts = Vec::new();
    for request in &asked.requests {
        let stop = Arc::new(request.stop.clone());
        let text = || Text::new(&app.texts, &request.prompt, stop.clone(), asked.top.is_some());
        for text in std::iter::repeat_with(text).take(request.count) {
            texts.push(text?);
        }
    }
    let mut stream = Stream {
        texts,
        app,
        asked,
        head,
        generation,
        completion_tokens: 0,
        events: VecDeque::new(),
        is_done: false,
    };
    stream.open();
    stream.hear(Ok(first));
    let events = unfold(stream, |mut stream| async move {
        let event = stream.next().await?;
        Some((Ok::<_, Infallible>(event), stream))
    });
    // A client that is gone while its request waits is noticed by what is sent to it.
    Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
}

impl Stream {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            if self.is_done {
                return None;
            }
            let news = self.generation.next().await;
            self.hear(news);
        }
    }

    /// The role of each message, or the prompt of each text that begins with it.
    fn open(&mut self) {
        let (kind, count) = (self.asked.kind, self.asked.count());
        let choices: Vec<Choice> = match (kind, &self.asked.echo) {
            (Kind::Chat, _) => (0..self.texts.len()).map(Choice::role).collect(),
            (Kind::Text, Some(prompts)) => {
                let prompt = |index: usize| Choice::more(kind, index, prompts[index / count].clone(), None);
                (0..self.texts.len()).map(prompt).collect()
            }
            (Kind::Text, None) => Vec::new(),
        };
        choices.into_iter().for_each(|choice| self.send(vec![choice], None));
    }

    fn hear(&mut self, news: Result<Option<News>, Refused>) {
        let heard = news.and_then(|news| match news {
            Some(News::Token(prompt, token)) => {
                let index = prompt * self.asked.count() + token.sample;
                self.completion_tokens += 1;
                let part = self.texts[index].push(token.id, Some(token.log_prob), &token.top);
                Ok(self.tell(index, part)?)
            }
            Some(News::End(prompt, reply)) => Ok(self.end(prompt, &reply)?),
            None => {
                self.finish();
                Ok(())
            }
        });
        if let Err(refused) = heard {
            // The status is sent; clients raise an event of this form.
            self.events.extend(Event::default().json_data(refused.error()));
            self.is_done = true;
        }
    }

    /// Sends more of a text.
    fn tell(&mut self, index: usize, Part { text, tokens }: Part) -> Result<(), Fault> {
        if text.is_empty() && tokens.is_empty() {
            return Ok(());
        }
        let kind = self.asked.kind;
        let scores = self.asked.top.map(|top| log_probs(&self.app.texts, kind, top, 0, &tokens));
        self.send(vec![Choice::more(kind, index, text, scores.transpose()?)], None);
        Ok(())
    }

    /// Ends the texts of a prompt. A request that asks for no token has none in its reply.
    fn end(&mut self, prompt: usize, reply: &SampleReply) -> Result<(), Fault> {
        for sample in 0..self.asked.count() {
            let index = prompt * self.asked.count() + sample;
            let part = self.texts[index].end();
            self.tell(index, part)?;
            let end = reply.continuations.get(sample).map_or(&End::Length, |continuation| &continuation.end);
            let reason = finish_reason(end, self.texts[index].is_cut());
            self.send(vec![Choice::end(self.asked.kind, index, reason)], None);
        }
        Ok(())
    }

    fn finish(&mut self) {
        if self.asked.tells_usage {
            self.send(Vec::new(), Some(Usage::new(self.asked.prompt_tokens(), self.completion_tokens)));
        }
        self.events.push_back(Event::default().data("[DONE]"));
        self.is_done = true;
    }

    fn send(&mut self, choices: Vec<Choice>, usage: Option<Usage>) {
        // Plain data is always written.
        self.events.extend(Event::default().json_data(Answer { head: self.head.clone(), choices, usage }));
    }
}
