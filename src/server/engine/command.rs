//! Commands of rank 0 to all ranks, and their bytes.
//!
//! Every rank carries out every command, in order, and enters the same collectives. A refusal is decided on rank 0,
//! before there is a command.

use crate::{
    comm::{CommandError, CommandReceiver, CommandSender},
    infer::step::Step,
    loss::{LossError, NamedLoss, Param},
    server::request::{AdapterSpec, Contents, Datum, Load, ModelId, OptimStep, Save},
};
use serde::{Deserialize, Serialize};
use std::{borrow::Cow, collections::BTreeMap, path::PathBuf};

/// Bytes of a command that travel at a time, below what the control mesh takes.
const PART: usize = 64 << 20;

/// Failures between the ranks of the engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("what another rank sent cannot be read: {0}")]
    Encoding(#[from] postcard::Error),
    #[error("a command is for adapter {0}, which this rank does not have")]
    NoAdapter(ModelId),
    #[error("a command is for adapter {0}, which this rank has on disk")]
    OnDisk(ModelId),
    #[error("the loss of a command cannot be computed: {0}")]
    Loss(#[from] LossError),
}

/// An order to all ranks.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub enum Command<'a> {
    Create {
        model: ModelId,
        spec: AdapterSpec,
    },
    MicroBatch(Cow<'a, Rows<'a>>),
    Sample(Cow<'a, Step<ModelId>>),
    /// `factor`: of the accumulated gradient.
    OptimStep {
        model: ModelId,
        step: OptimStep,
        factor: f64,
    },
    Abort {
        model: ModelId,
    },
    Save {
        model: ModelId,
        save: PlainSave,
    },
    Load {
        model: ModelId,
        load: Load,
    },
    /// Move an adapter to disk, to the file of this number.
    Spill {
        model: ModelId,
        number: u64,
    },
    /// Bring an adapter back from disk.
    Restore {
        model: ModelId,
    },
    Unload {
        model: ModelId,
    },
    /// Copy the values of an adapter into a sampler.
    Freeze {
        model: ModelId,
        sampler: ModelId,
    },
    /// Make a sampler of a save.
    OpenSampler {
        model: ModelId,
        folder: PathBuf,
    },
    /// No command follows.
    Stop,
}

/// The data of one micro-batch of all ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rows<'a> {
    pub backward: bool,
    /// Targets a token.
    pub k: usize,
    /// By name.
    pub adapters: Vec<ModelId>,
    pub losses: Vec<PlainLoss>,
    /// The segments of each rank with data of its own, by adapter.
    pub ranks: Vec<Vec<Segment<'a>>>,
    /// The passes with backward that end with it: an index into `adapters`, and valid targets.
    pub ended: Vec<(usize, u64)>,
}

/// Neighbouring data of one adapter and loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Segment<'a> {
    /// Index into [`Rows::adapters`].
    pub adapter: usize,
    /// Index into [`Rows::losses`].
    pub loss: usize,
    pub data: Vec<Cow<'a, Datum>>,
}

/// A [`Save`] in a form that postcard can read: its metadata are text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlainSave {
    folder: PathBuf,
    contents: Contents,
    overwrite: bool,
    metadata: String,
}

impl From<&Save> for PlainSave {
    fn from(save: &Save) -> Self {
        let Save { folder, contents, overwrite, metadata } = save.clone();
        Self { folder, contents, overwrite, metadata: metadata.to_string() }
    }
}

impl From<&PlainSave> for Save {
    fn from(plain: &PlainSave) -> Self {
        let PlainSave { folder, contents, overwrite, metadata } = plain.clone();
        // Rank 0 alone writes them, from the request itself.
        let metadata = serde_json::from_str(&metadata).unwrap_or_default();
        Self { folder, contents, overwrite, metadata }
    }
}

/// A [`NamedLoss`] in a form that postcard can read: its parameters are tagged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlainLoss {
    name: String,
    params: BTreeMap<String, PlainParam>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum PlainParam {
    Number(f64),
    Text(String),
}

impl From<&NamedLoss> for PlainLoss {
    fn from(loss: &NamedLoss) -> Self {
        let plain = |param: &Param| match param {
            Param::Number(number) => PlainParam::Number(*number),
            Param::Text(text) => PlainParam::Text(text.clone()),
        };
        let params = loss.params.iter().map(|(name, param)| (name.clone(), plain(param)));
        Self { name: loss.name.clone(), params: params.collect() }
    }
}

impl From<&PlainLoss> for NamedLoss {
    fn from(loss: &PlainLoss) -> Self {
        let param = |plain: &PlainParam| match plain {
            PlainParam::Number(number) => Param::Number(*number),
            PlainParam::Text(text) => Param::Text(text.clone()),
        };
        let params = loss.params.iter().map(|(name, plain)| (name.clone(), param(plain)));
        Self { name: loss.name.clone(), params: params.collect() }
    }
}

/// Sends `command` to all other ranks.
pub fn send(sender: &CommandSender, command: &Command) -> Result<(), EngineError> {
    let bytes = postcard::to_stdvec(command)?;
    parts(&bytes, PART).try_for_each(|part| sender.send(part).map(drop))?;
    Ok(())
}

/// Sleeps until the next command is whole.
pub fn receive(receiver: &CommandReceiver) -> Result<Command<'static>, EngineError> {
    let bytes = whole(|| Ok(receiver.recv()?.payload))?;
    Ok(postcard::from_bytes(&bytes)?)
}

/// `bytes` in parts of at most `size`; behind each a byte that is 1 in the last one.
fn parts(bytes: &[u8], size: usize) -> impl Iterator<Item = Vec<u8>> {
    let last = bytes.len().div_ceil(size);
    bytes.chunks(size).zip(1..).map(move |(part, number)| [part, &[u8::from(number == last)]].concat())
}

/// The bytes of which `next` gives the parts.
fn whole(mut next: impl FnMut() -> Result<Vec<u8>, EngineError>) -> Result<Vec<u8>, EngineError> {
    let mut bytes = Vec::new();
    loop {
        bytes.extend(next()?);
        if bytes.pop() == Some(1) {
            return Ok(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_of_many_parts_arrives_whole() {
        let datum = Datum {
            ids: (0..100).collect(),
            targets: (0..200).map(|id| id % 7 - 1).collect(),
            k: 2,
            inputs: BTreeMap::from([("weights".into(), vec![0.5; 200])]),
        };
        let params = [("eps".to_owned(), Param::Number(0.2)), ("kind".to_owned(), Param::Text("k3".into()))];
        let loss = NamedLoss { name: "ppo".into(), params: BTreeMap::from(params) };
        let command = Command::MicroBatch(Cow::Owned(Rows {
            backward: true,
            k: 2,
            adapters: vec![ModelId::new("a").unwrap()],
            losses: vec![PlainLoss::from(&loss)],
            ranks: vec![vec![Segment { adapter: 0, loss: 0, data: vec![Cow::Borrowed(&datum)] }], vec![]],
            ended: vec![(0, 200)],
        }));
        for command in [command, Command::Stop] {
            let bytes = postcard::to_stdvec(&command).unwrap();
            for size in [1, 7, bytes.len(), bytes.len() + 1] {
                let mut parts = parts(&bytes, size);
                let arrived = whole(|| Ok(parts.next().unwrap())).unwrap();
                assert!(parts.next().is_none());
                assert_eq!(postcard::from_bytes::<Command>(&arrived).unwrap(), command);
            }
        }
        assert_eq!(NamedLoss::from(&PlainLoss::from(&loss)), loss);
    }
}
