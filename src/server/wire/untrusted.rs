//! A body as every call would read it, without a server: tests of broken bodies call this.

use super::{openai, tinker, xorl};

/// Reads `body` as that of each call of all wires. Returns the number of calls that would take it.
pub fn read_as_all(body: &[u8]) -> usize {
    xorl::read_as_all(body) + openai::read_as_all(body) + tinker::read_as_all(body)
}
