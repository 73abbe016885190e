//! Requests to sample, beside the tasks of adapters.

use super::{ModelId, Refusal};
use crate::infer::request::{NewToken, SampleReply};

/// The weights that continue a prompt.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// The base alone.
    Base,
    /// An adapter, with the values that it has when the engine gets the request; or a sampler, which has no others.
    Adapter(ModelId),
}

/// Names a request to sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// The answer to a request to sample.
pub type SampleAnswer = Result<SampleReply, Refusal>;

/// Hears of a request to sample, from a thread of the engine; it must not block.
pub trait Listener: Send {
    /// A token was chosen.
    fn token(&mut self, token: &NewToken);

    /// The request has ended: once, after its last token.
    fn end(self: Box<Self>, answer: SampleAnswer);
}

/// A function hears of the end alone.
impl<F: FnOnce(SampleAnswer) + Send> Listener for F {
    fn token(&mut self, _: &NewToken) {}

    fn end(self: Box<Self>, answer: SampleAnswer) {
        self(answer);
    }
}
