//! `adapter_config.json` as PEFT writes it. A table says of every field that is known either why it changes nothing,
//! or the values with which it changes nothing; the rest is computed. Any other field is refused by name.

use super::{CheckpointError, io};
use crate::{
    console::shortened,
    json,
    lora::{LoraShape, PatternError, Patterns},
    regular_file,
};
use fancy_regex::Regex;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

pub const CONFIG_FILE: &str = "adapter_config.json";

/// The fields of PEFT's adapter_config.json that this program computes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdapterConfig {
    pub r: usize,
    pub lora_alpha: f64,
    /// Scales by alpha / √r instead of alpha / r.
    pub use_rslora: bool,
    /// Has magnitudes of the sum's rows beside A and B.
    pub use_dora: bool,
    pub target_modules: Names,
    pub exclude_modules: Option<Names>,
    pub layers_to_transform: Option<LayerNumbers>,
    pub layers_pattern: Option<Names>,
    /// Acts while PEFT trains.
    pub lora_dropout: f64,
    /// Parameters that are adapted as a whole: those of fused experts.
    pub target_parameters: Vec<String>,
    /// r of the modules that a pattern matches, the first of them.
    pub rank_pattern: Map<String, Value>,
    pub alpha_pattern: Map<String, Value>,
    pub base_model_name_or_path: Option<String>,
    /// Revision of a base on a hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// A regular expression over whole names, or ends of names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    Pattern(String),
    Ends(Vec<String>),
}

/// One layer, or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LayerNumbers {
    One(usize),
    Several(Vec<usize>),
}

/// The rule for a field of the file.
enum Rule {
    /// Part of [`AdapterConfig`].
    Computed,
    /// Changes no result, for the reason given.
    Harmless(&'static str),
    /// Changes nothing with null or one of these values, as JSON. The second text says what to do with others.
    Only(&'static [&'static str], &'static str),
}

use Rule::{Computed, Harmless, Only};

const MERGE: &str =
    "merge the adapter into its base with PEFT's merge_and_unload, and give the result as model.model_path";
const CONVERT: &str = "PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base at their start: have PEFT's \
                       save_pretrained make a plain adapter, with path_initial_model_for_weight_conversion, or merge \
                       it and give the result as model.model_path; EVA and MiCA do not: set the field to true";
const OF_INIT: &str = "settings of a start that init_lora_weights names";

/// The fields of PEFT's LoraConfig, and those of programs that write its files.
const FIELDS: &[(&str, Rule)] = &[
    ("r", Computed),
    ("lora_alpha", Computed),
    ("use_rslora", Computed),
    ("use_dora", Computed),
    ("target_modules", Computed),
    ("exclude_modules", Computed),
    ("layers_to_transform", Computed),
    ("layers_pattern", Computed),
    ("target_parameters", Computed),
    ("rank_pattern", Computed),
    ("alpha_pattern", Computed),
    ("base_model_name_or_path", Computed),
    ("revision", Computed),
    ("peft_type", Only(&["\"LORA\""], "only LoRA is built: merge it with PEFT's merge_and_unload")),
    ("task_type", Only(&["\"CAUSAL_LM\""], "only CAUSAL_LM is trained here")),
    ("init_lora_weights", Only(&["true", "false", "\"gaussian\"", "\"orthogonal\""], CONVERT)),
    ("bias", Only(&["\"none\""], MERGE)),
    ("fan_in_fan_out", Only(&["false"], "no model here stores weights like that: set it to false")),
    ("use_qalora", Only(&["false"], MERGE)),
    ("lora_bias", Only(&["false"], MERGE)),
    ("modules_to_save", Only(&["[]"], MERGE)),
    ("trainable_token_indices", Only(&["[]", "{}"], MERGE)),
    (
        "alora_invocation_tokens",
        Only(&[], "an adapter that acts behind some tokens alone cannot be merged or trained on here"),
    ),
    ("layer_replication", Only(&["[]"], MERGE)),
    ("use_bdlora", Only(&[], MERGE)),
    ("arrow_config", Only(&[], "routing among adapters cannot be merged or trained on here")),
    ("kasa_config", Only(&[], MERGE)),
    ("velora_config", Only(&[], "its backward pass is not built: set it to null to train on as plain LoRA")),
    ("monteclora_config", Only(&[], MERGE)),
    ("megatron_config", Only(&[], "Megatron's layers are not built: set it to null")),
    ("auto_mapping", Harmless("names of the base's Python classes")),
    ("peft_version", Harmless("the version that wrote the file")),
    ("inference_mode", Harmless("says whether PEFT freezes the adapter after loading")),
    ("lora_dropout", Harmless("acts while PEFT trains; a run has lora.lora_dropout")),
    ("megatron_core", Harmless("a module's name, read with megatron_config alone")),
    ("loftq_config", Harmless(OF_INIT)),
    ("eva_config", Harmless(OF_INIT)),
    ("corda_config", Harmless(OF_INIT)),
    ("lora_ga_config", Harmless(OF_INIT)),
    ("qalora_group_size", Harmless("read with use_qalora alone")),
    ("runtime_config", Harmless("PEFT ignores it in a file")),
    ("ensure_weight_tying", Harmless("acts on embeddings and heads, which are not adapted")),
    ("lora_dtype", Harmless("the dtype in which ms-swift trained; the tensors have their own")),
    ("lorap_lr_ratio", Harmless("a learning rate of ms-swift")),
    ("lorap_emb_lr", Harmless("a learning rate of ms-swift")),
    ("merge_weights", Harmless("PEFT before 0.3 merged for inference; the result is the same")),
];

/// The fields that change no result, each with the reason.
pub fn harmless_fields() -> impl Iterator<Item = (&'static str, &'static str)> {
    FIELDS.iter().filter_map(|(field, rule)| match rule {
        Harmless(reason) => Some((*field, *reason)),
        _ => None,
    })
}

/// Reads adapter_config.json.
///
/// # Errors
/// A field that changes the maths and is not built, and one that is not known.
pub fn read_config(directory: &Path) -> Result<AdapterConfig, CheckpointError> {
    let path = directory.join(CONFIG_FILE);
    let text = regular_file::read_to_string(&path).map_err(io(&path))?;
    let format = |reason: String| CheckpointError::Format { path: path.clone(), reason };
    let fields: Map<String, Value> =
        serde_json::from_str(&text).map_err(|error| format(json::problem(text.as_bytes(), &error)))?;
    if fields.get("peft_type").is_none_or(Value::is_null) {
        return Err(format(
            "peft_type is missing, without which PEFT loads no adapter; set it to \"LORA\"".into(),
        ));
    }
    for (field, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        let remedy = match FIELDS.iter().find(|(known, _)| known == field) {
            Some((_, Computed | Harmless(_))) => continue,
            Some((_, Only(neutral, _))) if neutral.contains(&value.to_string().as_str()) => continue,
            Some((_, Only(_, remedy))) => remedy,
            None => "the field is not known here; take it out if it changes no result",
        };
        let (field, found) = (field.clone(), shortened(value));
        return Err(CheckpointError::NotBuilt { path, field, found, remedy });
    }
    let file = ConfigFile { path, fields };
    let config = AdapterConfig {
        r: file.field("r", 8)?,
        lora_alpha: file.field("lora_alpha", 8.0)?,
        use_rslora: file.field("use_rslora", false)?,
        use_dora: file.field("use_dora", false)?,
        target_modules: file.field("target_modules", Names::Ends(Vec::new()))?,
        exclude_modules: file.field("exclude_modules", None)?,
        layers_to_transform: file.field("layers_to_transform", None)?,
        layers_pattern: file.field("layers_pattern", None)?,
        lora_dropout: 0.0,
        target_parameters: file.field("target_parameters", Vec::new())?,
        rank_pattern: file.field("rank_pattern", Map::new())?,
        alpha_pattern: file.field("alpha_pattern", Map::new())?,
        base_model_name_or_path: file.field("base_model_name_or_path", None)?,
        revision: file.field("revision", None)?,
    };
    config.check().map_err(|reason| CheckpointError::Format { path: file.path, reason })?;
    Ok(config)
}

/// The file, without fields that are refused.
struct ConfigFile {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl ConfigFile {
    /// The value of `field`, `default` where PEFT has one for an absent field.
    fn field<T: DeserializeOwned>(&self, field: &str, default: T) -> Result<T, CheckpointError> {
        match self.fields.get(field) {
            None => Ok(default),
            Some(Value::Null) if !["r", "lora_alpha"].contains(&field) => Ok(default),
            Some(value) => serde_json::from_value(value.clone()).map_err(|_| {
                let reason = format!("{field} cannot be {}", shortened(value));
                CheckpointError::Format { path: self.path.clone(), reason }
            }),
        }
    }
}

impl AdapterConfig {
    /// Rank and scale of the modules that no pattern matches.
    pub fn shape(&self) -> LoraShape {
        let &Self { r: rank, lora_alpha: alpha, use_rslora, use_dora, .. } = self;
        LoraShape { rank, alpha, use_rslora, use_dora }
    }

    /// Its patterns of ranks and alphas, compiled.
    pub fn patterns(&self) -> Result<Patterns, PatternError> {
        Patterns::new(self.shape(), &self.rank_pattern, &self.alpha_pattern)
    }

    /// True if PEFT adapts the linear layer `path`.
    pub fn targets(&self, path: &str) -> bool {
        let ends = |names: &[String]| names.iter().any(|name| ends_at_dot(path, name));
        let excluded = match &self.exclude_modules {
            Some(Names::Pattern(pattern)) => full_match(pattern, path),
            Some(Names::Ends(names)) => ends(names),
            None => false,
        };
        !excluded
            && match &self.target_modules {
                Names::Pattern(all) if all == ALL_LINEAR => true,
                Names::Pattern(pattern) => full_match(pattern, path),
                Names::Ends(names) => ends(names) && self.transforms_layer_of(path),
            }
    }

    /// True if PEFT adapts the parameter `path`.
    pub fn targets_parameter(&self, path: &str) -> bool {
        self.target_parameters.iter().any(|name| ends_at_dot(path, name))
    }

    /// True if the layer of `path` is one that layers_to_transform names, or none is named.
    fn transforms_layer_of(&self, path: &str) -> bool {
        let is_named: &dyn Fn(usize) -> bool = match &self.layers_to_transform {
            None => return true,
            Some(LayerNumbers::Several(layers)) if layers.is_empty() => return true,
            Some(LayerNumbers::Several(layers)) => &|layer| layers.contains(&layer),
            Some(LayerNumbers::One(only)) => &|layer| layer == *only,
        };
        let number = |before: &str| {
            let regex = regex(&format!(r"^{before}\.(?P<idx>\d+)\.")).ok()?;
            regex.captures(path).ok()??.name("idx")?.as_str().parse::<usize>().ok()
        };
        let layer = match self.layer_patterns() {
            [] => number(r".*?\.[^.]*"),
            patterns => patterns.iter().find_map(|pattern| number(&format!(r"(?:|.*?\.){pattern}"))),
        };
        layer.is_some_and(is_named)
    }

    /// Names of lists of layers; empty for any name.
    fn layer_patterns(&self) -> &[String] {
        match &self.layers_pattern {
            Some(Names::Pattern(pattern)) if !pattern.is_empty() => std::slice::from_ref(pattern),
            Some(Names::Ends(patterns)) => patterns,
            _ => &[],
        }
    }

    /// Checks values against each other, as far as PEFT does.
    fn check(&self) -> Result<(), String> {
        if self.r == 0 {
            return Err("r is 0; a rank is at least 1".into());
        }
        if self.use_dora && !self.target_parameters.is_empty() {
            return Err("use_dora is true, but PEFT has no DoRA on target_parameters; set it to false".into());
        }
        if let Some((pattern, value)) =
            self.rank_pattern.iter().find(|(_, value)| value.as_u64().is_none_or(|rank| rank == 0))
        {
            return Err(format!(
                "rank_pattern has {value} for {pattern:?}; a rank is a number of at least 1"
            ));
        }
        if let Some((pattern, value)) = self.alpha_pattern.iter().find(|(_, value)| !value.is_number()) {
            return Err(format!("alpha_pattern has {value} for {pattern:?}; an alpha is a number"));
        }
        let is_pattern = matches!(self.target_modules, Names::Pattern(_));
        if is_pattern && (self.layers_to_transform.is_some() || self.layers_pattern.is_some()) {
            let reason = "target_modules is a regular expression, with which PEFT takes no layers_to_transform and no \
                          layers_pattern; name the layers in it";
            return Err(reason.into());
        }
        if !self.layer_patterns().is_empty() && self.layers_to_transform.is_none() {
            return Err("layers_pattern is set, but layers_to_transform is not; PEFT asks for both".into());
        }
        self.regexes().try_for_each(|(field, text)| {
            let one_line = |error: &str| error.split_whitespace().collect::<Vec<_>>().join(" ");
            let said =
                |error: String| format!("{field}: {text:?} is no regular expression: {}", one_line(&error));
            regex(text).map(drop).map_err(|error| said(error.to_string()))
        })
    }

    /// Every regular expression, with its field.
    fn regexes(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let whole = [
            ("target_modules", Some(&self.target_modules)),
            ("exclude_modules", self.exclude_modules.as_ref()),
        ];
        let whole = whole.into_iter().filter_map(|(field, names)| match names {
            Some(Names::Pattern(pattern)) => Some((field, pattern.as_str())),
            _ => None,
        });
        let layers = self.layer_patterns().iter().map(|pattern| ("layers_pattern", pattern.as_str()));
        let ranks = self.rank_pattern.keys().map(|pattern| ("rank_pattern", pattern.as_str()));
        let alphas = self.alpha_pattern.keys().map(|pattern| ("alpha_pattern", pattern.as_str()));
        whole.chain(layers).chain(ranks).chain(alphas)
    }
}

/// Every linear layer but the head.
const ALL_LINEAR: &str = "all-linear";

fn ends_at_dot(path: &str, end: &str) -> bool {
    path.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn regex(text: &str) -> Result<Regex, Box<fancy_regex::Error>> {
    Regex::new(text).map_err(Box::new)
}

fn is_match(regex: &Regex, text: &str) -> bool {
    regex.is_match(text).unwrap_or(false)
}

/// Python's `re.fullmatch`.
fn full_match(pattern: &str, text: &str) -> bool {
    regex(&format!(r"^(?:{pattern})$")).is_ok_and(|regex| is_match(&regex, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(text: &str) -> Result<AdapterConfig, CheckpointError> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CONFIG_FILE), text).unwrap();
        read_config(folder.path())
    }

    fn config(mut fields: Value) -> Result<AdapterConfig, CheckpointError> {
        fields.as_object_mut().unwrap().entry("peft_type").or_insert("LORA".into());
        read(&fields.to_string())
    }

    #[test]
    fn a_file_without_its_type_or_with_numbers_that_json_lacks_is_refused() {
        for (text, words) in [
            (r#"{"r": 4}"#, "peft_type is missing"),
            (r#"{"peft_type": null, "r": 4}"#, "peft_type is missing"),
            (r#"{"peft_type": "LORA", "lora_alpha": NaN}"#, "NaN is not JSON; write a number"),
            ("{\n\"lora_alpha\": -Infinity}", "line 2"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains(words) && message.contains(CONFIG_FILE), "{message}");
        }
    }

    #[test]
    fn the_first_pattern_that_matches_counts() {
        let config =
            config(json!({"r": 4, "lora_alpha": 8, "rank_pattern": {r"layers\.1\..*v_proj": 6, "v_proj": 3},
            "alpha_pattern": {"v_proj": 1.5}, "use_rslora": true}))
            .unwrap();
        let patterns = config.patterns().unwrap();
        let of = |path: &str| patterns.shape_of(path);
        let shape = |rank, alpha| LoraShape { use_rslora: true, ..LoraShape::new(rank, alpha) };
        assert_eq!(of("model.layers.1.self_attn.v_proj"), shape(6, 1.5));
        assert_eq!(of("model.layers.0.self_attn.v_proj"), shape(3, 1.5));
        // A name ends at a dot.
        assert_eq!(of("model.layers.0.self_attn.kv_proj"), shape(4, 8.0));
    }

    #[test]
    fn targets_are_peft_s() {
        let targets = |fields: Value, path: &str| config(fields).unwrap().targets(path);
        let q = "model.layers.11.self_attn.q_proj";
        assert!(targets(json!({"target_modules": ["q_proj"]}), q));
        assert!(!targets(json!({"target_modules": ["proj"]}), q));
        assert!(targets(json!({"target_modules": r".*layers\.(?!1\.)\d+\..*q_proj"}), q));
        assert!(!targets(json!({"target_modules": "q_proj"}), q), "the whole name");
        assert!(!targets(json!({"target_modules": ["q_proj"], "layers_to_transform": 1}), q));
        assert!(targets(json!({"target_modules": ["q_proj"], "layers_to_transform": [1, 11]}), q));
        let named = json!({"target_modules": ["q_proj"], "layers_to_transform": [11], "layers_pattern": ["h", "layers"]});
        assert!(targets(named, q));
        assert!(!targets(
            json!({"target_modules": "all-linear", "exclude_modules": ["self_attn.q_proj"]}),
            q
        ));
        assert!(!targets(json!({"target_modules": null}), q));
    }

    #[test]
    fn faults_name_field_and_remedy() {
        let long = "x".repeat(300);
        for (fields, words) in [
            (json!({"init_lora_weights": "pissa_niter_4"}), "init_lora_weights is \"pissa_niter_4\""),
            (json!({"init_lora_weights": "pissa"}), "path_initial_model_for_weight_conversion"),
            (json!({"use_qalora": true}), "merge_and_unload"),
            (
                json!({"use_dora": true, "target_parameters": ["mlp.experts.down_proj"]}),
                "no DoRA on target_parameters",
            ),
            (json!({"brand_new": long}), "brand_new is \"xxx"),
            (json!({"r": "four"}), "r cannot be \"four\""),
            (json!({"target_modules": 3}), "target_modules cannot be 3"),
            (json!({"target_modules": ".*[z-a]"}), "is no regular expression"),
            (json!({"alpha_pattern": {"a": "b"}}), "alpha_pattern has \"b\" for \"a\""),
        ] {
            let message = config(fields).unwrap_err().to_string();
            assert!(message.contains(words) && message.contains(CONFIG_FILE), "{message}");
            assert!(message.len() < 400 && !message.contains('\n'), "{message}");
        }
    }
}
