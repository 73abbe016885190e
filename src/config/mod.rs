//! Typed `run.yaml`, in sections `model`, `data`, `train`, `lora`, and typed `server.yaml`, flat, with xorl's names,
//! defaults and validation.
//!
//! A field is declared once (`model.rs`, `data.rs`, `train.rs`, `lora.rs`, `server.rs`, `compute.rs` and `optimizer.rs`
//! for both files);
//! struct, default, help, schema, reading and writing follow from that line. `compat.rs` and `compat_server.rs` list
//! xorl's other fields, `foreign.rs` names of other trainers.

mod bytes;
mod compat;
mod compat_server;
mod compute;
mod data;
mod error;
mod file;
mod foreign;
mod help;
mod load;
mod lora;
mod loss;
mod model;
mod nearest;
mod optimizer;
mod paths;
mod section;
mod server;
mod source;
mod train;
mod validate;
mod value;

pub use bytes::{ByteSize, ByteSizeError};
pub use compute::{CheckpointingMethod, ComputeArgs, ReduceGradients};
pub use data::{DataArgs, DatasetArgs, DatasetType, PackingMethod, SampleBy, Turns};
pub use error::{ConfigError, FieldLocations, Place, Problem};
pub use help::{help, reference, schema_table, server_help, server_reference, server_schema_table};
pub use load::{
    Loaded, Override, load, load_server, load_server_yaml, load_with_paths, load_yaml, load_yaml_with_paths,
};
pub use lora::{ExportFormat, InitLoraWeights, LoraArgs, NoiseArgs, QuantArgs, QuantFormat};
pub use loss::Param;
pub use model::{BaseFiles, HubModel, ModelArgs, NoFiles};
pub use nearest::misspelt;
pub use optimizer::{MuonAdjustLr, Optimizer, OptimizerArgs, OptimizerDtype};
pub use section::FieldInfo;
pub use server::{ServerConfig, is_model_id};
pub use train::{LoadCheckpoint, LogFormat, LrDecayStyle, MetricForBest, OnSaveError, TrainArgs};

use compat::Compat;
use file::{Broken, ConfigFile};
use nearest::Hint;
use paths::NamedPath;
use section::Section;

/// A complete, resolved run configuration.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct RunConfig {
    pub model: ModelArgs,
    pub data: DataArgs,
    pub train: TrainArgs,
    pub lora: LoraArgs,
}

impl RunConfig {
    /// Every field with its value, as YAML that loads to the same configuration.
    pub fn to_yaml(&self) -> String {
        // Plain numbers, texts, lists and maps always have a YAML form.
        serde_yaml::to_string(self).unwrap_or_default()
    }
}

impl ConfigFile for RunConfig {
    const SECTIONS: &'static [&'static str] = &["model", "data", "train", "lora"];
    const IS_FLAT: bool = false;
    const COMPAT: Compat = compat::RUN;

    fn sections(&self) -> Vec<&dyn Section> {
        vec![&self.model, &self.data, &self.train, &self.lora]
    }

    fn section_mut(&mut self, name: &str) -> Option<&mut dyn Section> {
        match name {
            "model" => Some(&mut self.model),
            "data" => Some(&mut self.data),
            "train" => Some(&mut self.train),
            "lora" => Some(&mut self.lora),
            _ => None,
        }
    }

    fn complete(&mut self, places: &FieldLocations) {
        validate::complete_run(self, places);
    }

    fn broken_rules(&self) -> Vec<Broken> {
        validate::broken_of_run(self)
    }

    fn named_paths(&self) -> Vec<NamedPath<'_>> {
        paths::of_run(self)
    }

    fn unknown_field(section: &str, key: &str) -> Hint {
        nearest::field(section, key)
    }

    fn unknown_section(name: &str) -> Hint {
        // Of a dotted field, the section is what is not known.
        nearest::section(name.split('.').next().unwrap_or(name))
    }
}

/// Every field of `run.yaml` with the name of its section.
pub fn schema() -> Vec<(&'static str, FieldInfo)> {
    file::schema::<RunConfig>()
}

/// Every field of `server.yaml`, with the section that it has on the command line.
pub fn server_schema() -> Vec<(&'static str, FieldInfo)> {
    file::schema::<ServerConfig>()
}
