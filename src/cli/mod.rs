//! The command line: `train` (default), `check`, `eval`, `generate`, `merge`, `serve`, `runs`, `verify`, `report`,
//! `completions`, `man`, and `--section.field value` overrides.
//!
//! [`parse`] is a pure function from arguments to an [`Invocation`]; [`run`] carries one out. A command is a file with
//! one type: clap parses its fields, and its `Runnable` runs it. A new one also gets its `mod` line and its line in
//! `commands!` here.

pub mod check;
pub mod completions;
pub mod eval;
pub mod generate;
pub mod man;
pub mod merge;
mod models;
mod ranks;
pub mod report;
pub mod runs;
pub mod serve;
pub mod train;
pub mod verify;
mod version;

use crate::buffers;
use crate::checkpoint::failpoints;
use crate::comm;
use crate::config::{self, FieldInfo, Override};
use crate::console;
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use clap::builder::PossibleValuesParser;
use clap::error::ErrorKind;
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

pub use version::version_report;

/// A command: its type's doc comment is its line in the help, its fields are its arguments.
trait Runnable: clap::Args {
    /// Usage without the program and overrides: `check --config <FILE>`.
    const USAGE: &'static str;
    /// The configuration that the command reads and `--section.field` overrides. `None`: such words are text.
    const FIELDS: Option<Fields>;

    /// Checks what clap cannot.
    ///
    /// # Errors
    /// [`Error::Input`] for arguments that do not go together.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Carries the command out on this rank.
    ///
    /// # Errors
    /// The reason why it was not carried out.
    fn run(&self, common: &Common) -> Result<ExitCode>;
}

/// The fields of a configuration that a command reads.
#[derive(Clone, Copy)]
struct Fields {
    /// The configuration's usual name.
    file: &'static str,
    /// An override in the usage.
    usage: &'static str,
    /// All fields, for the long help.
    help: fn() -> String,
    /// Each field with its section.
    schema: fn() -> Vec<(&'static str, FieldInfo)>,
}

/// The fields of `run.yaml`.
const RUN_FIELDS: Fields = Fields {
    file: "run.yaml",
    usage: "[--section.field <VALUE>]...",
    help: config::help,
    schema: config::schema,
};

/// Options of every command.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Common {
    /// In the order of the command line; of a repeated field the last counts.
    pub overrides: Vec<Override>,
    pub device: DeviceChoice,
    /// See `--debug`.
    pub debug: bool,
}

/// A command by name.
struct Known {
    name: &'static str,
    usage: &'static str,
    fields: Option<Fields>,
}

impl Known {
    const fn new<R: Runnable>(name: &'static str) -> Self {
        Self { name, usage: R::USAGE, fields: R::FIELDS }
    }
}

macro_rules! commands {
    ($($module:ident::$name:ident),+ $(,)?) => {
        /// A command with its arguments.
        #[derive(Clone, Debug, PartialEq, Subcommand)]
        pub enum Command {
            $($name(Box<$module::$name>),)+
        }

        const COMMANDS: &[Known] = &[$(Known::new::<$module::$name>(stringify!($module)),)+];

        impl Command {
            fn known(&self) -> Known {
                match self {
                    $(Self::$name(_) => Known::new::<$module::$name>(stringify!($module)),)+
                }
            }

            fn check(&self) -> Result<()> {
                match self {
                    $(Self::$name(command) => command.check(),)+
                }
            }

            fn run(&self, common: &Common) -> Result<ExitCode> {
                match self {
                    $(Self::$name(command) => command.run(common),)+
                }
            }
        }
    };
}

commands! {
    train::Train,
    check::Check,
    eval::Eval,
    generate::Generate,
    merge::Merge,
    serve::Serve,
    runs::Runs,
    verify::Verify,
    report::Report,
    completions::Completions,
    man::Man,
}

/// A parsed command line.
#[derive(Clone, Debug, PartialEq)]
pub enum Invocation {
    Command(Command, Common),
    /// The text to print.
    Help(String),
    Version,
}

/// FSDP-style sharded LoRA fine-tuning of language models over MPI and NCCL
#[derive(Parser)]
#[command(name = "xorl-dist", disable_version_flag = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// The run to train: a .yaml, .yml or .json file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Do what `check` does, and end without training
    #[arg(long, requires = "config")]
    dry_run: bool,
    /// Device of the ranks
    #[arg(long, global = true, value_enum, default_value_t)]
    device: DeviceChoice,
    /// Train slowly and check everything: shapes, sizes and collectives are logged, values of every layer have to be
    /// finite, and a layer's weights are overwritten with NaN after use
    #[arg(long, global = true)]
    debug: bool,
    /// Print the versions of xorl-dist, tch, libtorch, MPI, CUDA and NCCL as found
    #[arg(short = 'V', long)]
    version: bool,
}

/// The parser of a count.
fn at_least_one(text: &str) -> Result<usize, String> {
    const MOST: usize = 1 << 20;
    match text.parse::<usize>() {
        Ok(number @ 1..=MOST) => Ok(number),
        Ok(0) | Err(_) => Err("expected a whole number of at least 1".to_owned()),
        Ok(_) => Err(format!("expected a whole number of at most {MOST}")),
    }
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// [`Error::Input`] in one line when they are no command.
pub fn parse(args: impl IntoIterator<Item = impl Into<OsString>>) -> Result<Invocation> {
    let mut parser = parser();
    let (args, overrides) = split_overrides(args.into_iter().map(Into::into), &parser)?;
    let named = args.iter().find_map(|arg| COMMANDS.iter().find(|known| arg == known.name));
    let fields = named.map_or(Some(RUN_FIELDS), |known| known.fields);
    let program = OsString::from("xorl-dist");
    let matches = match parser.try_get_matches_from_mut(std::iter::once(program).chain(args)) {
        Ok(matches) => matches,
        Err(error) if error.kind() == ErrorKind::DisplayHelp => {
            return Ok(Invocation::Help(error.to_string()));
        }
        Err(error) => return Err(usage_error(&error, fields)),
    };
    let Cli { command, config, dry_run, device, debug, version } =
        Cli::from_arg_matches(&matches).map_err(|error| usage_error(&error, fields))?;
    let command = match (command, config) {
        _ if version => return Ok(Invocation::Version),
        (None, None) => {
            return Err(Error::Input("no run was named: xorl-dist --config run.yaml (see --help)".into()));
        }
        (Some(_), Some(_)) => {
            return Err(Error::Input("--config belongs after the command (see --help)".into()));
        }
        (None, Some(config)) => Command::Train(Box::new(train::Train { config, dry_run })),
        (Some(command), None) => command,
    };
    command.check()?;
    let Known { name, fields, .. } = command.known();
    match overrides.first() {
        Some(Override { field, .. }) if fields.is_none() => {
            Err(Error::Input(format!("--{field}: {name} reads no configuration (see {name} --help)")))
        }
        _ => Ok(Invocation::Command(command, Common { overrides, device, debug })),
    }
}

/// Carries out a command line.
///
/// # Errors
/// The reason why it was not carried out; [`Error::exit_code`] is the exit code of the rank.
pub fn run(invocation: Invocation) -> Result<ExitCode> {
    buffers::return_large_blocks();
    crate::train::outlive_file_limit();
    failpoints::arm(comm::launched_rank().unwrap_or(0));
    match invocation {
        Invocation::Command(command, common) => command.run(&common),
        Invocation::Help(text) => print(&text),
        Invocation::Version => print(&version_report()),
    }
}

/// Prints text; the exit code of a command that ends with it. Errors are those of [`console::tell`].
fn print(text: &str) -> Result<ExitCode> {
    console::tell(text)?;
    Ok(ExitCode::SUCCESS)
}

/// The clap command, with the configuration's fields in the long help of the commands that take them.
fn parser() -> clap::Command {
    let usage = |Known { usage, fields, .. }: &Known| {
        let fields = fields.map_or_else(String::new, |fields| format!(" {}", fields.usage));
        format!("xorl-dist {usage}{fields}")
    };
    let usage = COMMANDS.iter().map(usage).collect::<Vec<_>>().join("\n       ");
    let with = |fields: Fields| move |command: clap::Command| command.after_long_help((fields.help)());
    let parser = with(RUN_FIELDS)(Cli::command().override_usage(usage));
    let taking = COMMANDS.iter().filter_map(|known| Some((known.name, known.fields?)));
    taking.fold(parser, |parser, (name, fields)| parser.mut_subcommand(name, with(fields)))
}

/// True for a value as it is written, which types in angle brackets and numbers with a range are not.
fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))
}

/// The clap command with every field of a configuration as an option of the commands that take it. These are not
/// clap's to parse ([`split_overrides`]), but a shell completes them.
fn parser_with_fields() -> clap::Command {
    let with = |fields: Fields| {
        move |command: clap::Command| {
            let option = |(section, field): (&str, FieldInfo)| {
                let name = format!("{section}.{}", field.key);
                let meaning = field.meaning.split(". ").next().unwrap_or_default().to_owned();
                let option = Arg::new(name.clone()).long(name).value_name("VALUE").help(meaning);
                let words: Vec<String> =
                    field.type_name.trim_end_matches(" or null").split(" | ").map(str::to_owned).collect();
                let are_words = words.len() > 1 && words.iter().all(|word| is_word(word));
                if are_words { option.value_parser(PossibleValuesParser::new(words)) } else { option }
            };
            command.args((fields.schema)().into_iter().map(option))
        }
    };
    let taking = COMMANDS.iter().filter_map(|known| Some((known.name, known.fields?)));
    taking
        .fold(with(RUN_FIELDS)(parser()), |parser, (name, fields)| parser.mut_subcommand(name, with(fields)))
}

/// Takes `--section.field value…` and `--section.field=value` out of the arguments, up to a command that takes no
/// fields: its texts may look like them.
fn split_overrides(
    args: impl Iterator<Item = OsString>,
    parser: &clap::Command,
) -> Result<(Vec<OsString>, Vec<Override>)> {
    let takes_value = |flag: &str| {
        let mut known = parser.get_arguments();
        known.any(|known| known.get_long() == Some(flag) && known.get_action().takes_values())
    };
    let takes_no_fields =
        |word: &str| COMMANDS.iter().any(|known| known.name == word && known.fields.is_none());
    let (mut args, mut rest, mut overrides) = (args, Vec::new(), Vec::<Override>::new());
    // The word before is an override, or another flag, and a value may follow.
    let (mut open, mut value_follows) = (false, false);
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy();
        match text.strip_prefix("--") {
            Some(flag) => {
                let (name, value) =
                    flag.split_once('=').map_or((flag, None), |(name, value)| (name, Some(value)));
                open = false;
                value_follows = value.is_none() && takes_value(name);
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
                if !std::mem::take(&mut value_follows) && takes_no_fields(&text) {
                    rest.push(arg);
                    rest.extend(args);
                    break;
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

/// True if `message` quotes another program's name for a GPU.
fn names_gpu(message: &str) -> bool {
    let message = message.to_ascii_lowercase();
    ["'gpu", "'cuda:", "'nvidia", "'nccl"].iter().any(|name| message.contains(name))
}

/// clap's message in one line. `fields`: those of the command.
fn usage_error(error: &clap::Error, fields: Option<Fields>) -> Error {
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
    let argument = message.split_once("argument '--").and_then(|(_, rest)| rest.split_once('\''));
    if let (Some((name, _)), Some(fields)) = (argument, fields)
        && error.kind() == ErrorKind::UnknownArgument
        && let Some((section, _)) = (fields.schema)().into_iter().find(|(_, field)| field.key == name)
    {
        let file = fields.file;
        return Error::Input(format!("{message}; fields of {file} are written --{section}.{name}"));
    }
    let hint =
        message.split_whitespace().find(|word| is_file(word)).filter(|_| !message.contains("--config"));
    match hint {
        Some(file) => Error::Input(format!("{message}; write --config {}", file.trim_matches('\''))),
        None if message.contains("'--device") && names_gpu(message) => Error::Input(format!(
            "{message}; write --device cuda: each rank of a host takes a GPU of CUDA_VISIBLE_DEVICES"
        )),
        None => Error::Input(format!("{message} (see --help)")),
    }
}
