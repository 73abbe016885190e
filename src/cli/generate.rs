//! The command `generate`.

use super::{Common, Fields, Runnable, at_least_one, ranks::on_all_ranks};
use crate::{
    dtype::DType,
    error::{Error, Result},
    infer::{Generation, Prompts, Request},
};
use std::{path::PathBuf, process::ExitCode};

/// Continue prompts with a model and an adapter, greedily; also sharded over the ranks of mpirun
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Generate {
    /// HF model directory; when absent the base that the adapter names
    #[arg(long, value_name = "DIR", required_unless_present = "adapter")]
    pub model: Option<PathBuf>,
    /// PEFT adapter directory, such as a published step; the directory of a run (weights/run, or its output_dir) is its
    /// newest step
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    #[command(flatten)]
    pub prompt: Prompt,
    /// File for the answers to --chat-file, one JSON line each; stdout when absent
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least_one)]
    pub max_new_tokens: usize,
    /// Type to compute in
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeChoice,
}

/// One of these, and no more.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Prompt {
    /// One user message, rendered by the model's chat template
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub chat: Option<String>,
    /// Text to continue as it is
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// A jsonl file of chats; one that ends with an answer is continued before it, and the loss of that answer computed
    #[arg(long, value_name = "FILE")]
    pub chat_file: Option<PathBuf>,
}

/// The dtype of `generate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DtypeChoice {
    /// As the checkpoint is stored
    #[default]
    Auto,
    Float32,
    Bfloat16,
}

impl Runnable for Generate {
    const USAGE: &'static str = "generate [--model <DIR>] [--adapter <DIR>] \
                                 <--chat <TEXT>|--prompt <TEXT>|--chat-file <FILE> [--out <FILE>]>";
    const FIELDS: Option<Fields> = None;

    fn check(&self) -> Result<()> {
        if self.out.is_some() && self.prompt.chat_file.is_none() {
            return Err(Error::Input("--out goes with --chat-file".into()));
        }
        Ok(())
    }

    fn run(&self, common: &Common) -> Result<ExitCode> {
        on_all_ranks(
            common.device,
            false,
            |_| Generation::prepare(self.request()),
            |generation, world| generation.execute(world).map(|()| ExitCode::SUCCESS),
        )
    }
}

impl Generate {
    /// The request that these arguments make.
    pub fn request(&self) -> Request {
        // clap's group has made sure that exactly one is there.
        let prompts = match self.prompt.clone() {
            Prompt { chat: Some(text), .. } => Prompts::Chat(text),
            Prompt { chat_file: Some(chats), .. } => Prompts::File { chats, out: self.out.clone() },
            Prompt { prompt, .. } => Prompts::Text(prompt.unwrap_or_default()),
        };
        Request {
            model_dir: self.model.clone(),
            adapter_dir: self.adapter.clone(),
            prompts,
            max_new_tokens: self.max_new_tokens,
            compute: match self.dtype {
                DtypeChoice::Auto => None,
                DtypeChoice::Float32 => Some(DType::F32),
                DtypeChoice::Bfloat16 => Some(DType::Bf16),
            },
        }
    }
}
