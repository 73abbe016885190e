//! Reads an HF `config.json` into a [`ModelSpec`]. A field that changes the maths and is not built is refused unless it
//! holds its neutral value. An unknown field is refused too, because it might change the maths.

use super::{
    family::{Decoder, FAMILIES, Family},
    spec::{ModelSpec, RopeScaling, RopeSpec},
};
use crate::dtype::DType;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Reasons to refuse a config; all are user errors (exit 2).
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{path}: not JSON: {error}")]
    Json { path: PathBuf, error: serde_json::Error },
    #[error("{path}: model_type is {found}; built are {}", known())]
    Family { path: PathBuf, found: String },
    #[error("{path}: {field} is missing")]
    Missing { path: PathBuf, field: String },
    #[error("{path}: {field}: expected {expected}, got {found}")]
    Value { path: PathBuf, field: String, expected: String, found: String },
    #[error("{path}: {fields}: not known for {family}; a field that may change the maths is refused")]
    Unknown { path: PathBuf, family: &'static str, fields: String },
}

fn known() -> String {
    FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ")
}

/// A model as its config describes it.
#[derive(Clone, Debug)]
pub struct HfModel {
    pub family: &'static Family,
    pub spec: ModelSpec,
    /// Dtype of the checkpoint, if the config has one.
    pub dtype: Option<DType>,
    /// Tokens that end a generation, those of a generation_config.json beside the config included.
    pub eos_token_ids: Vec<i64>,
    pub pad_token_id: Option<i64>,
    /// Tokens of the longest sequence that the model was made for, if the config has it.
    pub max_positions: Option<usize>,
}

/// Fields of HF files that no computation reads.
const HARMLESS: &[&str] = &[
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "label2id",
    "max_position_embeddings",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "rope_interleaved",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "use_cache",
    "_attn_implementation_autoset",
    "_attn_implementation",
];

/// Fields that all families share.
const SIZES: &[&str] = &[
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
];

/// Fields that change the maths and are not built, with the value at which they have no effect.
const NEUTRAL: &[(&str, &str)] = &[
    ("attention_dropout", "0.0"),
    ("chunk_size_feed_forward", "0"),
    ("hidden_act", "\"silu\""),
    ("is_encoder_decoder", "false"),
    ("partial_rotary_factor", "1.0"),
    ("pretraining_tp", "1"),
    ("quantization_config", "null"),
    ("use_mrope", "false"),
];

/// The fields of one config.json, with errors that name file and field.
pub struct Fields {
    path: PathBuf,
    map: Map<String, Value>,
}

impl Fields {
    pub(super) fn fault(&self, field: &str, expected: impl Into<String>, found: &Value) -> ConfigError {
        let (field, found) = (field.to_owned(), found.to_string());
        ConfigError::Value { path: self.path.clone(), field, expected: expected.into(), found }
    }

    /// The value of `field`, `None` if absent or null.
    fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// A required positive integer.
    pub fn size(&self, field: &str) -> Result<usize, ConfigError> {
        let missing = || ConfigError::Missing { path: self.path.clone(), field: field.to_owned() };
        self.optional_size(field)?.ok_or_else(missing)
    }

    /// A positive integer, or `None` when absent or null.
    pub fn optional_size(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let size = value.as_u64().filter(|&n| n > 0 && n < 1 << 40);
        size.map(|n| Some(n as usize)).ok_or_else(|| self.fault(field, "a positive integer", value))
    }

    /// True if `field` is present and not null.
    pub fn has(&self, field: &str) -> bool {
        self.get(field).is_some()
    }

    /// A list of numbers from 0 up, empty when absent or null.
    pub fn indices(&self, field: &str) -> Result<Vec<usize>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let numbers = value.as_array().map(|values| values.iter().map(|n| n.as_u64().map(|n| n as usize)));
        let numbers = numbers.and_then(|numbers| numbers.collect::<Option<_>>());
        numbers.ok_or_else(|| self.fault(field, "a list of layer numbers", value))
    }

    /// A positive number, or `None` when absent or null.
    pub fn optional_positive(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        self.positive(&self.map, field)
    }

    /// Refuses `field` unless it is absent, null or `neutral`.
    pub fn neutral(&self, field: &str, neutral: f64) -> Result<(), ConfigError> {
        match self.get(field) {
            Some(value) if value.as_f64() != Some(neutral) => {
                Err(self.fault(field, format!("{neutral:?} (anything else is not built)"), value))
            }
            _ => Ok(()),
        }
    }

    /// A boolean, `default` when absent or null.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.fault(field, "true or false", value))
    }

    fn positive(&self, map: &Map<String, Value>, field: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = map.get(field).filter(|value| !value.is_null()) else { return Ok(None) };
        let number = value.as_f64().filter(|&x| x > 0.0 && x.is_finite());
        number.map(Some).ok_or_else(|| self.fault(field, "a positive number", value))
    }

    /// Windows of the layers from `layer_types` (v5), or from `max_window_layers`, the first layer with a window.
    pub fn windows(&self, layers: usize, window: Option<usize>) -> Result<Vec<Option<usize>>, ConfigError> {
        let Some(types) = self.get("layer_types") else {
            let first = self.optional_size("max_window_layers")?.unwrap_or(0);
            return Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect());
        };
        let fault =
            || self.fault("layer_types", format!("{layers} of full_attention, sliding_attention"), types);
        let names = types.as_array().filter(|names| names.len() == layers).ok_or_else(fault)?;
        let of = |name: &Value| match name.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(window),
            _ => Err(fault()),
        };
        names.iter().map(of).collect()
    }

    /// Rotary parameters of `dim` columns, in the forms of transformers v4 (`rope_theta`, `rope_scaling`) and v5
    /// (`rope_parameters`).
    pub fn rope(&self, dim: usize) -> Result<RopeSpec, ConfigError> {
        let empty = Map::new();
        let table = |field: &str| match self.get(field) {
            None => Ok(&empty),
            Some(value) => value.as_object().ok_or_else(|| self.fault(field, "an object", value)),
        };
        let parameters = table("rope_parameters")?;
        let scaling = if parameters.is_empty() { table("rope_scaling")? } else { parameters };
        let theta = self.positive(parameters, "rope_theta")?.or(self.positive(&self.map, "rope_theta")?);
        let kind = scaling.get("rope_type").or(scaling.get("type"));
        let scaling = match kind.map(|kind| kind.as_str()) {
            None | Some(Some("default")) => RopeScaling::None,
            Some(Some("llama3")) => {
                let field = |name: &str| {
                    let field = format!("rope {name}");
                    let missing = || ConfigError::Missing { path: self.path.clone(), field };
                    self.positive(scaling, name)?.ok_or_else(missing)
                };
                RopeScaling::Llama3 {
                    factor: field("factor")?,
                    low_freq_factor: field("low_freq_factor")?,
                    high_freq_factor: field("high_freq_factor")?,
                    original_max_position_embeddings: field("original_max_position_embeddings")?,
                }
            }
            Some(_) => {
                let found = kind.unwrap_or(&Value::Null);
                return Err(self.fault("rope type", "default or llama3", found));
            }
        };
        if let Some(partial) = scaling_partial(parameters) {
            return Err(self.fault("rope_parameters.partial_rotary_factor", "1.0", partial));
        }
        Ok(RopeSpec { theta: theta.unwrap_or(10_000.0), scaling, dim })
    }

    /// Refuses fields that are not neutral and fields that `family` does not know.
    fn check(&self, family: &Family) -> Result<(), ConfigError> {
        for &(field, neutral) in NEUTRAL {
            let Some(value) = self.get(field) else { continue };
            let neutral_value: Value = serde_json::from_str(neutral).unwrap_or(Value::Null);
            let same = match (value.as_f64(), neutral_value.as_f64()) {
                (Some(a), Some(b)) => a == b,
                _ => *value == neutral_value,
            };
            if !same {
                return Err(self.fault(field, format!("{neutral} (anything else is not built)"), value));
            }
        }
        let known = |field: &str| {
            let neutral = NEUTRAL.iter().map(|(name, _)| *name);
            neutral
                .chain(HARMLESS.iter().chain(SIZES).chain(family.fields).copied())
                .any(|name| name == field)
        };
        let unknown: Vec<&str> = self.map.keys().map(String::as_str).filter(|field| !known(field)).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let (path, fields) = (self.path.clone(), unknown.join(", "));
        Err(ConfigError::Unknown { path, family: family.model_type, fields })
    }
}

fn scaling_partial(parameters: &Map<String, Value>) -> Option<&Value> {
    parameters.get("partial_rotary_factor").filter(|value| value.as_f64() != Some(1.0))
}

impl HfModel {
    /// Reads `path`: a config.json, or a directory that has one.
    pub fn open(path: &Path) -> Result<Self, ConfigError> {
        let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        let fields = Fields { map: read_object(&path)?, path };
        let mut model = Self::from_fields(&fields)?;
        let generation = fields.path.with_file_name("generation_config.json");
        if generation.is_file() {
            for id in token_ids(read_object(&generation)?.get("eos_token_id")) {
                if !model.eos_token_ids.contains(&id) {
                    model.eos_token_ids.push(id);
                }
            }
        }
        Ok(model)
    }

    fn from_fields(fields: &Fields) -> Result<Self, ConfigError> {
        let named = fields.get("model_type").and_then(Value::as_str).unwrap_or("missing");
        let family = FAMILIES
            .iter()
            .find(|family| family.model_type == named)
            .ok_or_else(|| ConfigError::Family { path: fields.path.clone(), found: named.to_owned() })?;
        fields.check(family)?;
        let rms_norm_eps = fields.optional_positive("rms_norm_eps")?.unwrap_or(1e-6);
        let decoder = Decoder { num_layers: fields.size("num_hidden_layers")?, rms_norm_eps };
        let layers = (family.layers)(fields, &decoder)?;
        for moe in layers.iter().filter_map(|layer| layer.ffn.moe()) {
            if moe.top_k > moe.experts {
                let expected = format!("at most the {} experts", moe.experts);
                return Err(fields.fault("num_experts_per_tok", expected, &Value::from(moe.top_k)));
            }
        }
        let spec = ModelSpec {
            vocab_size: fields.size("vocab_size")?,
            hidden_size: fields.size("hidden_size")?,
            layers,
            rms_norm_eps,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            initializer_range: fields.optional_positive("initializer_range")?.unwrap_or(0.02),
        };
        let dtype = match fields.get("dtype").or(fields.get("torch_dtype")).and_then(Value::as_str) {
            Some("float32") => Some(DType::F32),
            Some("bfloat16") => Some(DType::Bf16),
            Some("float16") => Some(DType::F16),
            _ => None,
        };
        let eos_token_ids = token_ids(fields.get("eos_token_id"));
        Ok(Self {
            family,
            spec,
            dtype,
            eos_token_ids,
            pad_token_id: fields.get("pad_token_id").and_then(Value::as_i64),
            max_positions: fields.optional_size("max_position_embeddings")?,
        })
    }
}

/// One id or a list of them.
fn token_ids(value: Option<&Value>) -> Vec<i64> {
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_i64).collect(),
        Some(value) => value.as_i64().into_iter().collect(),
        None => Vec::new(),
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|error| ConfigError::Io { path: path.to_owned(), error })?;
    serde_json::from_str(&text).map_err(|error| ConfigError::Json { path: path.to_owned(), error })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Mixer;
    use serde_json::json;

    fn parse(value: Value) -> Result<HfModel, ConfigError> {
        let Value::Object(map) = value else { panic!("an object") };
        HfModel::from_fields(&Fields { path: "config.json".into(), map })
    }

    fn llama() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu",
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
            "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"},
            "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
            "transformers_version": "4.43.0.dev0", "vocab_size": 128256})
    }

    #[test]
    fn llama_3_1_8b_in_both_forms() {
        let old = parse(llama()).unwrap();
        let Mixer::Gqa(gqa) = old.spec.layers[31].mixer;
        assert_eq!((gqa.head_dim, gqa.num_kv_heads, old.dtype), (128, 8, Some(DType::Bf16)));
        assert_eq!(old.eos_token_ids, [128001, 128008, 128009]);
        let parameters: usize =
            old.spec.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        assert_eq!(parameters, 8_030_261_248);
        let mut new = llama();
        let map = new.as_object_mut().unwrap();
        let mut rope = map.remove("rope_scaling").unwrap();
        rope["rope_theta"] = map.remove("rope_theta").unwrap();
        map.insert("rope_parameters".into(), rope);
        let dtype = map.remove("torch_dtype").unwrap();
        map.insert("dtype".into(), dtype);
        let new = parse(new).unwrap();
        assert_eq!((&new.spec, new.dtype), (&old.spec, old.dtype));
    }

    #[test]
    fn what_changes_the_maths_is_refused() {
        let cases = [
            ("hidden_act", json!("gelu"), "silu"),
            ("attention_dropout", json!(0.1), "0.0"),
            ("pretraining_tp", json!(2), "1"),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "default or llama3"),
            ("quantization_config", json!({"bits": 4}), "null"),
            ("num_key_value_heads", json!(5), "divisor"),
            ("hidden_size", json!("wide"), "positive integer"),
            ("vocab_size", json!(null), "missing"),
            ("logit_softcap", json!(30.0), "logit_softcap"),
            (
                "model_type",
                json!("mamba"),
                "llama, mistral, mixtral, olmoe, qwen2, qwen2_moe, qwen3, qwen3_moe",
            ),
            ("head_dim", json!(127), "even"),
        ];
        for (field, value, word) in cases {
            let mut config = llama();
            config[field] = value;
            let message = parse(config).unwrap_err().to_string();
            assert!(message.starts_with("config.json: ") && message.contains(word), "{field}: {message}");
        }
    }
}
