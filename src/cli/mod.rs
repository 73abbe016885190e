//! The command line: `train` (default), `check`, `generate`, and `--section.field value` overrides.
//!
//! [`parse`] is a pure function from arguments to a [`Command`]; [`run`] carries one out.

mod check;
mod generate;
mod ranks;
mod train;
mod version;

use crate::buffers;
use crate::config::{self, Override};
use crate::device::DeviceChoice;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::infer::{Prompts, Request};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

pub use version::version_report;

/// In what `generate` computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DtypeChoice {
    /// As the checkpoint is stored
    #[default]
    Auto,
    Float32,
    Bfloat16,
}

/// A parsed command line.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    Train(RunArgs),
    Check(CheckArgs),
    Generate(GenerateArgs),
    /// The text to print.
    Help(String),
    Version,
}

/// What `train` is given.
#[derive(Clone, Debug, PartialEq)]
pub struct RunArgs {
    pub config_path: PathBuf,
    /// In the order of the command line; of a repeated field the last counts.
    pub overrides: Vec<Override>,
    pub device: DeviceChoice,
    /// Looks at everything: see `--debug`.
    pub debug: bool,
}

/// What `check` is given.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckArgs {
    pub run: RunArgs,
    /// Ranks of the run to be; `None` for as many as have been started.
    pub ranks: Option<usize>,
}

/// What `generate` is given.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateArgs {
    pub request: Request,
    pub device: DeviceChoice,
}

/// FSDP-style sharded LoRA fine-tuning of language models over MPI and NCCL
#[derive(Parser)]
#[command(name = "xorl-dist", disable_version_flag = true, disable_help_subcommand = true)]
#[command(override_usage = "xorl-dist [train] --config <FILE> [--section.field <VALUE>]...\n       \
                            xorl-dist check --config <FILE> [--ranks <N>] [--section.field <VALUE>]...\n       \
                            xorl-dist generate --model <DIR> [--adapter <DIR>] \
                            <--chat <TEXT>|--prompt <TEXT>|--chat-file <FILE> [--out <FILE>]>")]
struct Cli {
    #[command(subcommand)]
    command: Option<Sub>,
    /// The run to train: a .yaml, .yml or .json file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where ranks compute
    #[arg(long, global = true, value_enum, default_value_t)]
    device: DeviceChoice,
    /// Train slowly and look at everything: shapes, sizes and collectives are logged, values of every layer have to be finite,
    /// and a layer's weights are no numbers when it has computed
    #[arg(long, global = true)]
    debug: bool,
    /// Print the versions of xorl-dist, tch, libtorch, MPI, CUDA and NCCL as found
    #[arg(short = 'V', long)]
    version: bool,
}

#[derive(Args)]
struct ConfigArg {
    /// The run: a .yaml, .yml or .json file
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

#[derive(Args)]
struct CheckCli {
    #[command(flatten)]
    config: ConfigArg,
    /// Ranks of the run to be; those that have been started when absent
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    ranks: Option<usize>,
}

#[derive(Subcommand)]
enum Sub {
    /// Train an adapter (the default)
    Train(ConfigArg),
    /// Validate config, model and data without training; print the resolved run, mesh, memory and traffic
    Check(CheckCli),
    /// Continue prompts with a model and an adapter, greedily; also sharded over the ranks of mpirun
    Generate(GenerateCli),
}

#[derive(Args)]
struct GenerateCli {
    /// HF model directory
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// PEFT adapter directory, such as a published step
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    prompt: PromptCli,
    /// Where the answers to --chat-file go, one JSON line each; stdout when absent
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least_one)]
    max_new_tokens: usize,
    /// In what to compute
    #[arg(long, value_enum, default_value_t)]
    dtype: DtypeChoice,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct PromptCli {
    /// One user message, rendered by the model's chat template
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    chat: Option<String>,
    /// Text to continue as it is
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// A jsonl file of chats; one that ends with an answer is continued before it, and the loss of that answer computed
    #[arg(long, value_name = "FILE")]
    chat_file: Option<PathBuf>,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number >= 1);
    number.ok_or_else(|| "expected a whole number of at least 1".to_owned())
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// [`Error::Input`] in one line when they are no command.
pub fn parse(args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Command> {
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    let (args, overrides) = if is_generate(&args) { (args, Vec::new()) } else { split_overrides(args)? };
    let program = OsString::from("xorl-dist");
    let matches = match command().try_get_matches_from(std::iter::once(program).chain(args)) {
        Ok(matches) => matches,
        Err(error) if error.kind() == ErrorKind::DisplayHelp => return Ok(Command::Help(error.to_string())),
        Err(error) => return Err(usage(&error)),
    };
    let Cli { command, config, device, debug, version } =
        Cli::from_arg_matches(&matches).map_err(|e| usage(&e))?;
    let run_args = |config_path| RunArgs { config_path, overrides, device, debug };
    match (command, config) {
        _ if version => Ok(Command::Version),
        (None, None) => {
            Err(Error::Input("no run was named: xorl-dist --config run.yaml (see --help)".into()))
        }
        (Some(_), Some(_)) => Err(Error::Input("--config belongs after the command (see --help)".into())),
        (None, Some(path)) => Ok(Command::Train(run_args(path))),
        (Some(Sub::Train(arg)), None) => Ok(Command::Train(run_args(arg.config))),
        (Some(Sub::Check(arg)), None) => {
            Ok(Command::Check(CheckArgs { run: run_args(arg.config.config), ranks: arg.ranks }))
        }
        (Some(Sub::Generate(arg)), None) if arg.out.is_some() && arg.prompt.chat_file.is_none() => {
            Err(Error::Input("--out goes with --chat-file".into()))
        }
        (Some(Sub::Generate(arg)), None) => {
            Ok(Command::Generate(GenerateArgs { request: arg.request(), device }))
        }
    }
}

impl GenerateCli {
    fn request(self) -> Request {
        // clap's group has made sure that exactly one is there.
        let prompts = match self.prompt {
            PromptCli { chat: Some(text), .. } => Prompts::Chat(text),
            PromptCli { chat_file: Some(chats), .. } => Prompts::File { chats, out: self.out },
            PromptCli { prompt, .. } => Prompts::Text(prompt.unwrap_or_default()),
        };
        Request {
            model_dir: self.model,
            adapter_dir: self.adapter,
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

/// Carries out a command.
///
/// # Errors
/// Whatever stopped it; [`Error::exit_code`] is the exit code of the rank.
pub fn run(command: Command) -> Result<ExitCode> {
    buffers::return_large_blocks();
    match command {
        Command::Train(args) => train::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Help(text) => Ok(print(&text)),
        Command::Version => Ok(print(&version_report())),
    }
}

/// Prints text; a reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> ExitCode {
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}

/// The clap command with the configuration's fields in its long help.
fn command() -> clap::Command {
    let fields = config::help();
    let with_fields = |command: clap::Command| command.after_long_help(fields.clone());
    with_fields(Cli::command()).mut_subcommand("train", with_fields).mut_subcommand("check", with_fields)
}

/// Whether the command is `generate`, whose texts may look like overrides.
fn is_generate(args: &[OsString]) -> bool {
    let mut words = args.iter();
    while let Some(word) = words.next() {
        if word == "--device" {
            words.next();
        } else if !word.to_string_lossy().starts_with('-') {
            return word == "generate";
        }
    }
    false
}

/// Takes `--section.field value…` and `--section.field=value` out of the arguments.
fn split_overrides(args: Vec<OsString>) -> Result<(Vec<OsString>, Vec<Override>)> {
    let mut rest = Vec::new();
    let mut overrides: Vec<Override> = Vec::new();
    let mut open = false;
    for arg in args {
        let text = arg.to_string_lossy();
        match text.strip_prefix("--") {
            Some(flag) => {
                let (name, value) =
                    flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
                open = false;
                if name.contains('.') {
                    text_of(&arg)?;
                    open = value.is_none();
                    overrides.push(Override {
                        field: name.to_owned(),
                        values: value.map(str::to_owned).into_iter().collect(),
                    });
                    continue;
                }
            }
            // Negative numbers are values, -h and -V are not.
            None => {
                if let (true, Some(last), false) = (open, overrides.last_mut(), arg == "-h" || arg == "-V") {
                    last.values.push(text_of(&arg)?.to_owned());
                    continue;
                }
            }
        }
        rest.push(arg);
    }
    Ok((rest, overrides))
}

fn text_of(arg: &OsString) -> Result<&str> {
    arg.to_str().ok_or_else(|| Error::Input(format!("{}: expected UTF-8 text", arg.to_string_lossy())))
}

/// clap's message in one line.
fn usage(error: &clap::Error) -> Error {
    let text = error.to_string();
    let message: Vec<_> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let message = message.join(" ");
    let message = message.strip_prefix("error: ").unwrap_or(&message);
    let is_file = |word: &str| [".yaml'", ".yml'", ".json'"].iter().any(|end| word.ends_with(end));
    let hint =
        message.split_whitespace().find(|word| is_file(word)).filter(|_| !message.contains("--config"));
    match hint {
        Some(file) => Error::Input(format!("{message}; write --config {}", file.trim_matches('\''))),
        None => Error::Input(format!("{message} (see --help)")),
    }
}
