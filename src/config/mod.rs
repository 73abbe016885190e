//! Typed `run.yaml`: sections `model`, `data`, `train`, `lora` with xorl's names, defaults and validation.
//!
//! A field is declared once (`model.rs`, `data.rs`, `train.rs`, `lora.rs`); struct, default, help, schema,
//! reading and writing follow from that line. `compat.rs` lists xorl's other fields, `foreign.rs` names of other
//! trainers.

mod compat;
mod data;
mod error;
mod foreign;
mod help;
mod load;
mod lora;
mod loss;
mod model;
mod nearest;
mod paths;
mod section;
mod source;
mod train;
mod validate;
mod value;

pub use data::{DataArgs, DatasetArgs, DatasetType, PackingMethod, Turns};
pub use error::{ConfigError, FieldLocations, Place, Problem};
pub use help::{help, schema_table};
pub use load::{Loaded, Override, load, load_with_paths, load_yaml};
pub use lora::{ExportFormat, LoraArgs};
pub use loss::Param;
pub use model::ModelArgs;
pub use section::FieldInfo;
pub use train::{
    CheckpointingMethod, LoadCheckpoint, LogFormat, LrDecayStyle, Optimizer, ReduceGradients, TrainArgs,
};

use section::Section;

/// The sections of a configuration, in the order of a written file.
const SECTIONS: [&str; 4] = ["model", "data", "train", "lora"];

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

    /// The sections in the order of [`SECTIONS`].
    fn sections(&self) -> [&dyn Section; 4] {
        [&self.model, &self.data, &self.train, &self.lora]
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
}

/// Every field with the name of its section.
pub fn schema() -> Vec<(&'static str, FieldInfo)> {
    let config = RunConfig::default();
    let of = |(name, section): (&&'static str, &dyn Section)| {
        section.fields().into_iter().map(|field| (*name, field)).collect::<Vec<_>>()
    };
    SECTIONS.iter().zip(config.sections()).flat_map(of).collect()
}
