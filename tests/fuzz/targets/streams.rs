//! Bytes that are read from memory: control frames, configurations, bodies of requests.

use super::Folder;
use std::path::Path;
use xorl_dist::{
    comm,
    config::{Override, load_server_yaml, load_yaml},
    server::wire,
};

/// The first byte says in reads of how many bytes the rest arrives.
pub fn frames(input: &[u8], _: &Folder) {
    let Some((&chunk, stream)) = input.split_first() else { return };
    let whole = comm::read_stream(stream, stream.len());
    assert_eq!(comm::read_stream(stream, chunk.into()).is_ok(), whole.is_ok(), "{whole:?}");
}

/// A line `--section.field value` behind the first byte 1, else a file; `run.yaml` or, with an odd first byte beyond,
/// `server.yaml`.
pub fn config(input: &[u8], _: &Folder) {
    let Some((&kind, text)) = input.split_first() else { return };
    let text = String::from_utf8_lossy(text);
    let flag = || {
        let mut words = text.split_whitespace().map(str::to_owned);
        let field = words.next()?;
        Some(Override { field, values: words.collect() })
    };
    let (text, flags) = match kind % 4 {
        0 | 1 => (&*text, Vec::new()),
        _ => ("", flag().into_iter().collect()),
    };
    let name = Path::new("a.yaml");
    let refused = match kind % 2 {
        0 => load_yaml(name, text, &flags).map(drop),
        _ => load_server_yaml(name, text, &flags).map(drop),
    };
    if let Err(error) = refused {
        assert!(!error.to_string().is_empty());
    }
}

pub fn bodies(input: &[u8], _: &Folder) {
    wire::read_as_all(input);
}
