//! Reads an HF `config.json` into a [`ModelSpec`]. A field that changes the maths and is not built is refused unless it
//! holds its neutral value. An unknown field is refused too, because it might change the maths.

mod fields;
mod generation;
pub mod known;
mod rope;

use super::{
    family::{Decoder, FAMILIES, Family},
    spec::ModelSpec,
};
use crate::{
    console::{first_of, shortened},
    dtype::DType,
    hub, json, lfs, regular_file,
    weights::SourceError,
};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

pub use fields::Fields;
use generation::Generation;

/// Reasons to refuse a config; all are user errors (exit 2).
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error("{path}: has no config.json; give the folder of a model in HF format")]
    NoConfig { path: PathBuf },
    #[error("{path}: {}", hub::absent_words(path))]
    Absent { path: PathBuf },
    #[error("{path}: not JSON: {problem}; mend it, or copy the model's file again")]
    Json { path: PathBuf, problem: String },
    #[error("{path}: {}", lfs::REMEDY)]
    LfsPointer { path: PathBuf },
    #[error("{path}: model_type is {found}; built are {}", known())]
    Family { path: PathBuf, found: String },
    #[error("{path}: {field} is missing")]
    Missing { path: PathBuf, field: String },
    #[error("{path}: {field}: expected {expected}, got {found}")]
    Value { path: PathBuf, field: String, expected: String, found: String },
    #[error(
        "{path}: {fields}: not known for {of}; a field that may change the maths is refused: take it out if the model is \
         the same without it"
    )]
    Unknown { path: PathBuf, of: String, fields: String },
    #[error(
        "{path}: its sizes make a model of {parameters:.1e} parameters; at most {MOST_PARAMETERS:e} are read"
    )]
    TooLarge { path: PathBuf, parameters: f64 },
    #[error("{path}: {first} and {second}: two spellings of one setting disagree; keep the right one")]
    Disagree { path: PathBuf, first: String, second: String },
    #[error("{0}")]
    Quantized(SourceError),
}

/// Layers of the deepest model that is read.
const MOST_LAYERS: usize = 10_000;
/// Fields of widths of matrices, and the largest width that is read.
const WIDTHS: [&str; 5] = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
];
const MOST_WIDTH: usize = 1 << 24;
/// Parameters of the largest model that is read.
const MOST_PARAMETERS: f64 = 1e15;

fn known() -> String {
    FAMILIES.iter().map(|family| family.model_type).collect::<Vec<_>>().join(", ")
}

/// True if two values are equal, numbers compared by value.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

impl ConfigError {
    /// The error of two spellings (name, value) that disagree.
    fn disagree(path: &Path, a: (&str, &Value), b: (&str, &Value)) -> Self {
        let [first, second] = [a, b].map(|(name, value)| format!("{name} {}", shortened(value)));
        Self::Disagree { path: path.to_owned(), first, second }
    }

    /// Refuses `fields`, if there are any, as not known for `of`.
    fn unknown(path: &Path, of: &str, fields: Vec<&str>) -> Result<(), Self> {
        if fields.is_empty() {
            return Ok(());
        }
        Err(Self::Unknown { path: path.to_owned(), of: of.to_owned(), fields: first_of(&fields) })
    }
}

/// A model as its config describes it.
#[derive(Clone, Debug)]
pub struct HfModel {
    pub family: &'static Family,
    /// The class of the model, `LlamaForCausalLM`; the `model_type` where the config names none.
    pub architecture: String,
    pub spec: ModelSpec,
    /// Dtype of the checkpoint, if the config has one.
    pub dtype: Option<DType>,
    /// Tokens that end a document, as the config class has them.
    pub eos_token_ids: Vec<i64>,
    /// Tokens that end a generation: those of a generation_config.json alone, or without one those that stand in the
    /// config.
    pub end_token_ids: Vec<i64>,
    pub pad_token_id: Option<i64>,
    /// Tokens of the longest sequence that the model was made for, if the config has it.
    pub max_positions: Option<usize>,
    /// Settings of that generation_config.json that would change a greedy continuation and are not built.
    pub generation_unread: Vec<String>,
    /// Settings by which that file has transformers sample, with their values; none where it does not.
    pub generation_sampling: Vec<(String, Value)>,
}

impl HfModel {
    /// Reads `path`: a config.json, or a directory that has one.
    pub fn open(path: &Path) -> Result<Self, ConfigError> {
        let is_folder = path.is_dir();
        let path = if is_folder { path.join("config.json") } else { path.to_owned() };
        if !path.exists() {
            let folder = path.parent().filter(|_| is_folder).map(Path::to_owned);
            return Err(folder.map_or(ConfigError::Absent { path }, |path| ConfigError::NoConfig { path }));
        }
        let mut model = Self::parse(&path, read_object(&path)?)?;
        if let Some(generation) = Generation::read(&path.with_file_name("generation_config.json"))? {
            model.end_token_ids = generation.eos_token_ids;
            model.generation_unread = generation.unread;
            model.generation_sampling = generation.sampling;
        }
        Ok(model)
    }

    /// The token that fills packs. It has no loss.
    pub fn padding(&self) -> i64 {
        let ends = || self.eos_token_ids.iter().chain(&self.end_token_ids).next().copied();
        self.pad_token_id.or_else(ends).unwrap_or(0)
    }

    /// The model that `map` of the file `path` describes.
    pub fn parse(path: &Path, map: Map<String, Value>) -> Result<Self, ConfigError> {
        // transformers generates by the file alone, without the defaults of its config class.
        let end_token_ids = token_ids(path, &map)?;
        let class = map.get("architectures").and_then(|classes| classes.get(0)?.as_str().map(str::to_owned));
        let fields = Fields::new(path, map)?;
        let family = fields.family();
        for field in WIDTHS.into_iter().filter(|field| family.reads(field)) {
            if fields.optional_size(field)?.is_some() {
                fields.size_up_to(field, MOST_WIDTH)?;
            }
        }
        let rms_norm_eps = fields.positive("rms_norm_eps")?;
        let num_layers = fields.size_up_to("num_hidden_layers", MOST_LAYERS)?;
        let decoder = Decoder { num_layers, rms_norm_eps };
        let layers = (family.layers)(&fields, &decoder)?;
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
            tie_word_embeddings: fields.flag("tie_word_embeddings")?,
            initializer_range: fields.positive("initializer_range")?,
            quantization: None,
        };
        check_parameters(path, &spec)?;
        let pad_token_id = fields.pad_token_id(spec.vocab_size)?;
        let eos_token_ids = fields.token_ids()?;
        let (dtype, generation_unread) = (dtype(&fields)?, Vec::new());
        let max_positions = fields.optional_size("max_position_embeddings")?;
        Ok(Self {
            family,
            architecture: class.unwrap_or_else(|| family.model_type.to_owned()),
            spec,
            dtype,
            eos_token_ids,
            end_token_ids,
            pad_token_id,
            max_positions,
            generation_unread,
            generation_sampling: Vec::new(),
        })
    }
}

/// Dtype of the checkpoint, if the config has one.
fn dtype(fields: &Fields) -> Result<Option<DType>, ConfigError> {
    let Some(value) = fields.get("dtype") else { return Ok(None) };
    match value.as_str() {
        Some("float32") => Ok(Some(DType::F32)),
        Some("bfloat16") => Ok(Some(DType::Bf16)),
        Some("float16") => Ok(Some(DType::F16)),
        _ => Err(fields.fault("dtype", "float32, bfloat16 or float16", value)),
    }
}

/// The field `eos_token_id` of `map`, read from `path`: one id or a list of them.
fn token_ids(path: &Path, map: &Map<String, Value>) -> Result<Vec<i64>, ConfigError> {
    const FIELD: &str = "eos_token_id";
    let Some(value) = map.get(FIELD).filter(|value| !value.is_null()) else { return Ok(Vec::new()) };
    let ids = match value {
        Value::Array(ids) => ids.iter().map(Value::as_i64).collect(),
        value => value.as_i64().map(|id| vec![id]),
    };
    ids.ok_or_else(|| ConfigError::Value {
        path: path.to_owned(),
        field: FIELD.to_owned(),
        expected: "an id or a list of ids".to_owned(),
        found: shortened(value),
    })
}

/// Refuses sizes whose products could not be counted in bytes.
fn check_parameters(path: &Path, spec: &ModelSpec) -> Result<(), ConfigError> {
    let elements = |shape: &[usize]| shape.iter().map(|&size| size as f64).product::<f64>();
    let parameters: f64 = spec.tensors().iter().map(|(_, shape)| elements(shape)).sum();
    if parameters > MOST_PARAMETERS {
        return Err(ConfigError::TooLarge { path: path.to_owned(), parameters });
    }
    Ok(())
}

fn read_object(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let text = regular_file::read_to_string(path)
        .map_err(|error| ConfigError::Io { path: path.to_owned(), error })?;
    if lfs::is_pointer(text.as_bytes()) {
        return Err(ConfigError::LfsPointer { path: path.to_owned() });
    }
    let problem = |error| json::problem(text.as_bytes(), &error);
    serde_json::from_str(&text)
        .map_err(|error| ConfigError::Json { path: path.to_owned(), problem: problem(error) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Mixer;
    use serde_json::json;

    fn parse(value: Value) -> Result<HfModel, ConfigError> {
        let Value::Object(map) = value else { panic!("an object") };
        HfModel::parse(Path::new("config.json"), map)
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
        let Mixer::Gqa(gqa) = &old.spec.layers[31].mixer;
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
            ("rope_scaling", json!({"rope_type": "su", "factor": 4.0}), "default, linear, dynamic"),
            ("quantization_config", json!({"bits": 4}), "quantization_config is {"),
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
