//! A body as every call of this wire would read it, up to where its model is looked for.

use super::{
    bodies::{Chat, Completion, Sampling, check_refused},
    prompts,
};
use crate::server::wire::xorl::fields::{object, read};

/// Reads `body` as that of each call. Returns the number of calls that would take it.
pub fn read_as_all(body: &[u8]) -> usize {
    let is_refused = object(body).map_or(true, |fields| check_refused(&fields).is_err());
    if is_refused || read::<Sampling>(body).is_err() {
        return 0;
    }
    let is_chat = read::<Chat>(body)
        .is_ok_and(|chat| prompts::messages(chat.messages).is_ok_and(|messages| !messages.is_empty()));
    usize::from(is_chat) + usize::from(read::<Completion>(body).is_ok())
}
