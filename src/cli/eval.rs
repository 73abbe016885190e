//! The command `eval`.

use super::{
    Common, Fields, RUN_FIELDS, Runnable,
    generate::DtypeChoice,
    models::{self, Named},
    ranks::on_all_ranks,
};
use crate::{
    dtype::DType,
    error::{Error, Result, agree},
    train::{EvalRequest, HeldOut},
};
use std::{collections::BTreeSet, path::PathBuf, process::ExitCode};

/// Tell loss, perplexity and exact match of rows that were not trained on, with and without an adapter
#[derive(Clone, Debug, Default, PartialEq, clap::Args)]
pub struct Eval {
    /// The run whose model and validation rows are taken: a .yaml, .yml or .json file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// HF model directory; when absent that of the run, or the base that the adapter names
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// PEFT adapter directory, such as a published step; the directory of a run (weights/run, or its output_dir) is its
    /// newest step, best in that directory its best. When absent the newest step of --config
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Rows to evaluate on; when absent those that validate in the run of --config
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Type of --data as in data.datasets; told by its first row when absent
    #[arg(long = "type", value_name = "TYPE", requires = "data")]
    pub kind: Option<String>,
    /// Names in --data of the fields that its type reads, separated by spaces: prompt=question completion=answer
    #[arg(long, value_name = "FIELD=NAME", num_args = 1.., value_parser = column, requires = "data")]
    pub columns: Vec<(String, String)>,
    /// Also answer each sample greedily, and count the answers that are its last turn
    #[arg(long)]
    pub exact_match: bool,
    /// Print one JSON object in place of the table
    #[arg(long)]
    pub json: bool,
    /// Type to compute in, without --config
    #[arg(long, value_enum, default_value_t)]
    pub dtype: DtypeChoice,
}

/// The field and the name of `FIELD=NAME`.
fn column(text: &str) -> std::result::Result<(String, String), String> {
    let parts = text.split_once('=').filter(|(field, name)| !field.is_empty() && !name.is_empty());
    let (field, name) = parts.ok_or("must be FIELD=NAME, as prompt=question")?;
    Ok((field.to_owned(), name.to_owned()))
}

impl Runnable for Eval {
    const USAGE: &'static str = "eval [--config <FILE>] [--model <DIR>] [--adapter <DIR>] [--data <FILE>] \
         [--columns <FIELD=NAME>...] [--exact-match] [--json]";
    const FIELDS: Option<Fields> = Some(RUN_FIELDS);

    fn check(&self) -> Result<()> {
        let wrong = |words: &str| Err(Error::Input(words.into()));
        let mut named = BTreeSet::new();
        if let Some((field, _)) = self.columns.iter().find(|(field, _)| !named.insert(field)) {
            return wrong(&format!("--columns: {field} has two names"));
        }
        match self {
            Self { config: None, model: None, adapter: None, .. } => {
                wrong("give --config, --model or --adapter: what is to be evaluated")
            }
            Self { config: None, data: None, .. } => wrong("--data is missing, or a --config that has rows"),
            Self { config: Some(_), dtype, .. } if *dtype != DtypeChoice::Auto => {
                wrong("--dtype goes without --config; a run computes as train.enable_mixed_precision says")
            }
            _ => Ok(()),
        }
    }

    /// Computes the scores on all ranks; rank 0 prints them.
    fn run(&self, common: &Common) -> Result<ExitCode> {
        on_all_ranks(
            common.device,
            common.debug,
            |world| {
                models::fetch(world, || self.models(common))?;
                let everyone = world.group("world", 0);
                let held_out = HeldOut::prepare(&self.request(common), world.size());
                let held_out = agree(&*everyone, held_out)?;
                held_out.run().same_on_all_ranks(&*everyone)?;
                Ok(held_out)
            },
            |held_out, world| {
                let outcome = held_out.execute(world)?;
                if world.rank() == 0 {
                    super::print(&if self.json { outcome.json() } else { outcome.table() })?;
                }
                Ok(ExitCode::SUCCESS)
            },
        )
    }
}

impl Eval {
    /// The models and data sets of the hub that these arguments name.
    fn models(&self, common: &Common) -> Vec<Named> {
        let data = self.data.as_deref().and_then(models::of_data_flag);
        let Some(config) = &self.config else {
            return models::of_adapter(self.model.as_deref(), self.adapter.as_deref())
                .into_iter()
                .chain(data)
                .collect();
        };
        let given = models::of_adapter(self.model.as_deref(), None).into_iter().chain(data);
        given.chain(models::of_run(config, &common.overrides)).collect()
    }

    /// The request that these arguments make.
    pub fn request(&self, common: &Common) -> EvalRequest {
        EvalRequest {
            config: self.config.clone(),
            overrides: common.overrides.clone(),
            model: self.model.clone(),
            adapter: self.adapter.clone(),
            data: self.data.clone(),
            kind: self.kind.clone(),
            columns: self.columns.iter().cloned().collect(),
            compute: match self.dtype {
                DtypeChoice::Auto => None,
                DtypeChoice::Float32 => Some(DType::F32),
                DtypeChoice::Bfloat16 => Some(DType::Bf16),
            },
            exact_match: self.exact_match,
        }
    }
}
