//! A request while the engine carries it out. Dropped before its end, as when its client is gone, it is cancelled.

use super::{asked::Asked, fault::Refused};
use crate::{
    infer::request::{NewToken, SampleReply, SampleRequest},
    server::{
        app::App,
        fault::Fault,
        futures::Reserved,
        registry::Tenant,
        request::{Engine, Listener, SampleAnswer, Ticket},
    },
};
use axum::http::StatusCode;
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// News of a prompt, which is known by its number.
#[derive(Debug)]
pub enum News {
    Token(usize, NewToken),
    /// It has ended, and this is all of it.
    End(usize, SampleReply),
}

/// Tells of one prompt.
struct Teller {
    prompt: usize,
    tells_tokens: bool,
    sender: UnboundedSender<Told>,
}

enum Told {
    Token(usize, NewToken),
    End(usize, SampleAnswer),
}

impl Listener for Teller {
    fn token(&mut self, token: &NewToken) {
        if self.tells_tokens {
            // Whoever no longer hears has cancelled.
            let _ = self.sender.send(Told::Token(self.prompt, token.clone()));
        }
    }

    fn end(self: Box<Self>, answer: SampleAnswer) {
        let _ = self.sender.send(Told::End(self.prompt, answer));
    }
}

/// The prompts of a request in the engine.
pub struct Generation {
    engine: Arc<dyn Engine>,
    /// Those that have not ended, each with its place in the queue.
    open: BTreeMap<usize, (Ticket, Reserved)>,
    /// Without bound, for the engine must not wait; a request has a largest number of tokens.
    receiver: UnboundedReceiver<Told>,
}

impl Generation {
    /// Hands all prompts to the engine.
    ///
    /// # Errors
    /// The queue is full, or the server takes no request now.
    pub fn start(app: &App, tenant: &Tenant, asked: &Asked) -> Result<Self, Refused> {
        let work = format!("sample of {}", asked.model);
        let reserve =
            |request: &SampleRequest| app.futures.reserve(tenant.clone(), work.clone(), request.bytes());
        let places = asked.requests.iter().map(reserve).collect::<Result<Vec<_>, _>>()?;
        // The server begins to stop under this lock: it waits for what was taken before.
        let _registry = app.registry();
        app.check_open()?;
        let (sender, receiver) = unbounded_channel();
        let open = asked.requests.iter().zip(places).enumerate().map(|(prompt, (request, place))| {
            let teller = Teller { prompt, tells_tokens: asked.is_stream, sender: sender.clone() };
            (prompt, (app.engine.sample(asked.source.clone(), request.clone(), Box::new(teller)), place))
        });
        Ok(Self { engine: app.engine.clone(), open: open.collect(), receiver })
    }

    /// The next token or end; `None` once all prompts have ended.
    ///
    /// # Errors
    /// The engine refuses a prompt, or has failed.
    pub async fn next(&mut self) -> Result<Option<News>, Refused> {
        if self.open.is_empty() {
            return Ok(None);
        }
        match self.receiver.recv().await {
            Some(Told::Token(prompt, token)) => Ok(Some(News::Token(prompt, token))),
            Some(Told::End(prompt, answer)) => {
                self.open.remove(&prompt);
                Ok(Some(News::End(prompt, answer?)))
            }
            None => {
                self.open.clear();
                let detail =
                    "the engine ended before it carried this out; look at the server's log, and restart it";
                Err(Fault::new(StatusCode::INTERNAL_SERVER_ERROR, detail).into())
            }
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.open.values().for_each(|(ticket, _)| self.engine.cancel(*ticket));
    }
}
