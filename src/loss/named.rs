//! Losses by the names that clients and configurations use.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A number or a text of a loss's parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Param {
    Number(f64),
    Text(String),
}

/// A loss by name, with its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NamedLoss {
    pub name: String,
    pub params: BTreeMap<String, Param>,
}
