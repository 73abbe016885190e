//! Section `model`.

use super::error::Problem;
use super::section::section;
use crate::hub::{self, HubError, HubId};
use std::path::{Path, PathBuf};

section! {
    /// Section `model`: the base model.
    pub struct ModelArgs {
        /// HF model directory (config.json, safetensors), or a model of the Hugging Face hub, such as
        /// `Qwen/Qwen2.5-0.5B` or `Qwen/Qwen2.5-0.5B@main`, which is downloaded once into the hub's cache (HF_HOME).
        /// null: random weights, `config_path` is then needed.
        model_path: Option<PathBuf> = None;
        /// Branch, tag or commit of the model on the hub. null: the one behind `@` in `model_path`, then `main`.
        revision: Option<String> = None;
        /// HF config directory or config.json, when it is not in `model_path`; or a model of the hub.
        config_path: Option<PathBuf> = None;
        /// Directory with tokenizer.json and the chat template, or a model of the hub. null: `config_path`, then
        /// `model_path`.
        tokenizer_path: Option<PathBuf> = None;
        /// Compute q, k, v (and gate, up) as one GEMM. Results and adapter keys are the same either way.
        merge_qkv: bool = true;
    }
}

/// Places of a base's files on this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BaseFiles {
    /// HF directory of the weights; `None`: they are random and have no file.
    pub weights: Option<PathBuf>,
    /// The config.json, or its directory.
    pub config: PathBuf,
    /// Directory of the tokenizer.
    pub tokenizer: PathBuf,
}

/// A model of the hub that a field names.
#[derive(Clone, Debug, PartialEq)]
pub struct HubModel {
    /// Name of the field in its section.
    pub key: &'static str,
    pub id: HubId,
    /// Its weights are read.
    pub weights: bool,
}

/// A model whose files are not where a field says.
#[derive(Debug, thiserror::Error)]
#[error("{}: {error}", path.display())]
pub struct NoFiles {
    /// Name of the field in its section.
    pub key: &'static str,
    /// The path or hub id that the field names.
    pub path: PathBuf,
    pub error: HubError,
}

impl ModelArgs {
    /// The HF config: a config.json, its directory, or a model of the hub.
    fn hf_config(&self) -> PathBuf {
        self.config_path.clone().or(self.model_path.clone()).unwrap_or_default()
    }

    /// The name of the base: a path, or a model of the hub with the revision that is named.
    pub fn name(&self) -> String {
        let path = self.hf_config();
        self.id(&path).map_or_else(|| path.display().to_string(), |id| id.to_string())
    }

    /// The same of the model that has the weights.
    pub fn weights_name(&self) -> Option<String> {
        let path = self.model_path.as_deref()?;
        Some(self.id(path).map_or_else(|| path.display().to_string(), |id| id.to_string()))
    }

    /// The models of the hub that the fields name.
    pub fn of_hub(&self) -> Vec<HubModel> {
        let fields = [
            ("model_path", &self.model_path, true),
            ("config_path", &self.config_path, false),
            ("tokenizer_path", &self.tokenizer_path, false),
        ];
        let id = |path: &Option<PathBuf>| self.id(path.as_deref()?);
        let of = |(key, path, weights)| Some(HubModel { key, id: id(path)?, weights });
        fields.into_iter().filter_map(of).collect()
    }

    /// The files of the model. Of a model of the hub those in the cache.
    ///
    /// # Errors
    /// The cache lacks a file that is needed, or a revision was named of a model that is not of the hub.
    pub fn files(&self) -> Result<BaseFiles, NoFiles> {
        let main = self.model_path.as_ref().or(self.config_path.as_ref());
        if let (Some(_), Some(path)) = (&self.revision, main)
            && self.id(path).is_none()
        {
            return Err(NoFiles { key: "revision", path: path.clone(), error: HubError::NoRevisions });
        }
        let place = |key, path: &Option<PathBuf>, weights| {
            let Some(path) = path else { return Ok(None) };
            let place = self.id(path).map_or(Ok(path.clone()), |id| hub::cached(&id, weights));
            place.map(Some).map_err(|error| NoFiles { key, path: path.clone(), error })
        };
        let weights = place("model_path", &self.model_path, true)?;
        let config = place("config_path", &self.config_path, false)?;
        let config = config.or_else(|| weights.clone()).unwrap_or_default();
        let tokenizer = place("tokenizer_path", &self.tokenizer_path, false)?;
        let tokenizer = tokenizer.unwrap_or_else(|| config.clone());
        Ok(BaseFiles { weights, config, tokenizer })
    }

    /// The id of the model of the hub that `path` of a field is. `revision` is that of the base.
    fn id(&self, path: &Path) -> Option<HubId> {
        let id = HubId::of_path(path)?;
        let is_base = self.model_path.as_deref().or(self.config_path.as_deref()) == Some(path);
        Some(match &self.revision {
            Some(revision) if is_base => id.at(revision),
            _ => id,
        })
    }

    /// The problem of a revision that is none, or is named twice.
    pub(super) fn revision_problem(&self) -> Option<Problem> {
        let revision = self.revision.as_deref()?;
        if !hub::is_revision(revision) {
            let (expected, got) = ("a branch, tag or commit".into(), format!("{revision:?}"));
            return Some(Problem::Expected { expected, got });
        }
        let base = self.model_path.as_ref().or(self.config_path.as_ref())?.to_str()?;
        let twice = HubId::parse(base).is_some_and(|id| id.revision.is_some());
        twice.then(|| Problem::Conflict(format!("{base} names a revision, too; remove one of them")))
    }

    /// The problem of a model that is named nowhere.
    pub(super) fn missing(&self) -> Option<Problem> {
        let needed = "an HF model directory or a model of the hub, or config_path alone for random weights";
        (self.model_path.is_none() && self.config_path.is_none()).then_some(Problem::Missing { needed })
    }
}
