//! The command `generate`.

use super::{Common, Fields, Runnable, at_least_one, models, ranks::on_all_ranks};
use crate::{
    dtype::DType,
    error::{Error, Result},
    infer::{Generation, Prompts, Request, request::Choice},
};
use std::{path::PathBuf, process::ExitCode};

/// Continue prompts with a model and an adapter; also sharded over the ranks of mpirun
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct Generate {
    /// HF model directory, or model of the hub (owner/name, or owner/name@revision); when absent the base that the
    /// adapter names
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// PEFT adapter directory, such as a published step; the directory of a run (weights/run, or its output_dir) is its
    /// newest step, best in that directory its best
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    #[command(flatten)]
    pub prompt: Prompt,
    /// Message of the system before --chat or --interactive
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// File for the answers to --chat-file, one JSON line each; stdout when absent
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least_one)]
    pub max_new_tokens: usize,
    #[command(flatten)]
    pub sampling: Sampling,
    /// Text that ends the continuation and is not shown; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = some_text)]
    pub stop: Vec<String>,
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
    /// Chat on the terminal: each line of stdin is a message, the answers go to stdout
    #[arg(long)]
    pub interactive: bool,
    /// A jsonl file of chats; one that ends with an answer is continued before it, and the loss of that answer computed
    #[arg(long, value_name = "FILE")]
    pub chat_file: Option<PathBuf>,
}

/// The way tokens are chosen.
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
pub struct Sampling {
    /// Divisor of the logits; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value = "0", allow_negative_numbers = true, value_parser = temperature)]
    pub temperature: f64,
    /// Share of the probability: the most likely tokens that make it up are candidates; 1 when absent
    #[arg(long, value_name = "P", value_parser = share)]
    pub top_p: Option<f64>,
    /// Number of the most likely tokens that are candidates; all when absent
    #[arg(long, value_name = "K", value_parser = at_least_one)]
    pub top_k: Option<usize>,
    /// Seed of the random numbers: the same seed gives the same text; 0 when absent
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

fn temperature(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| "expected a number of at least 0".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| *number > 0.0 && *number <= 1.0);
    number.ok_or_else(|| "expected a number above 0 and at most 1".to_owned())
}

fn some_text(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("expected a text that is not empty".to_owned()) } else { Ok(text.to_owned()) }
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
                                 <--chat <TEXT>|--prompt <TEXT>|--interactive|--chat-file <FILE> [--out <FILE>]>";
    const FIELDS: Option<Fields> = None;

    fn check(&self) -> Result<()> {
        if self.model.is_none() && self.adapter.is_none() {
            return Err(Error::Input("give --model or --adapter: what is to continue the prompt".into()));
        }
        if self.out.is_some() && self.prompt.chat_file.is_none() {
            return Err(Error::Input("--out goes with --chat-file".into()));
        }
        if self.system.is_some() && self.prompt.chat.is_none() && !self.prompt.interactive {
            return Err(Error::Input("--system goes with --chat or --interactive".into()));
        }
        let Sampling { temperature, top_p, top_k, seed } = self.sampling;
        let given = [("--top-p", top_p.is_some()), ("--top-k", top_k.is_some()), ("--seed", seed.is_some())];
        if let Some((name, _)) = given.iter().find(|(_, is_given)| *is_given && temperature == 0.0) {
            return Err(Error::Input(format!("{name} goes with a --temperature above 0")));
        }
        Ok(())
    }

    fn run(&self, common: &Common) -> Result<ExitCode> {
        on_all_ranks(
            common.device,
            false,
            |world| match (self.prompt.interactive, world.size()) {
                (true, 2..) => Err(Error::Input("--interactive takes one rank; leave mpirun out".into())),
                _ => {
                    let (model, adapter) = (self.model.as_deref(), self.adapter.as_deref());
                    models::fetch(world, || models::of_adapter(model, adapter))?;
                    Generation::prepare(self.request())
                }
            },
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
            Prompt { interactive: true, .. } => Prompts::Interactive,
            Prompt { chat_file: Some(chats), .. } => Prompts::File { chats, out: self.out.clone() },
            Prompt { prompt, .. } => Prompts::Text(prompt.unwrap_or_default()),
        };
        Request {
            model_dir: self.model.clone(),
            adapter_dir: self.adapter.clone(),
            prompts,
            system: self.system.clone(),
            choice: Choice {
                temperature: self.sampling.temperature,
                top_p: self.sampling.top_p.unwrap_or(1.0),
                top_k: self.sampling.top_k,
            },
            seed: self.sampling.seed.unwrap_or(0),
            stop: self.stop.clone(),
            max_new_tokens: self.max_new_tokens,
            compute: match self.dtype {
                DtypeChoice::Auto => None,
                DtypeChoice::Float32 => Some(DType::F32),
                DtypeChoice::Bfloat16 => Some(DType::Bf16),
            },
        }
    }
}
