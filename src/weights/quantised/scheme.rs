//! The tool that quantized a checkpoint, as config.json says: keys that are understood, and tensors that belong
//! together.

use super::{
    super::{SourceError, safetensors::SafetensorsSource},
    PackedMatrix,
};
use crate::regular_file;
use serde_json::{Map, Value};
use std::{collections::BTreeMap, path::Path};

/// Names of config.json's field.
const FIELDS: [&str; 2] = ["quantization_config", "compression_config"];
/// ModelOpt's own file, which older versions write in place of the field.
const MODELOPT: &str = "hf_quant_config.json";
const READ: &str = "these can be read: nf4 of bitsandbytes, fp8 in blocks of 128x128, NVFP4 of ModelOpt and of \
                    compressed-tensors; take the model in one of these, or in bfloat16";

/// The tool and format of a quantized checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// transformers' fine-grained FP8: `weight` e4m3, times `weight_scale_inv` a block.
    Fp8,
    /// NVIDIA's ModelOpt: `weight` e2m1, times `weight_scale` a group, times `weight_scale_2`.
    ModelOpt,
    /// vLLM's compressed-tensors: `weight_packed` e2m1, times `weight_scale` a group, divided by `weight_global_scale`.
    CompressedTensors,
    /// bitsandbytes' nf4: `weight`, `weight.absmax` and others beside it.
    BitsAndBytes,
}

/// A setting of a tool.
enum Setting {
    /// Any value.
    Harmless,
    /// One of these values, as JSON.
    OneOf(&'static [&'static str]),
}

use Setting::{Harmless, OneOf};

const FP8: &[(&str, Setting)] = &[
    // Activations are not quantized in training.
    ("activation_scheme", Harmless),
    ("dequantize", Harmless),
    ("expert_dtype", OneOf(&["null", "\"fp8\""])),
    ("fmt", OneOf(&["null", "\"e4m3\""])),
    // The files say which modules are quantized.
    ("ignored_layers", Harmless),
    ("modules_to_not_convert", Harmless),
    ("scale_fmt", OneOf(&["null", "\"float\"", "\"ue8m0\""])),
    ("weight_block_size", OneOf(&["[128,128]"])),
];

const MODELOPT_KEYS: &[(&str, Setting)] = &[
    ("config_groups", Harmless),
    ("exclude_modules", Harmless),
    ("group_size", OneOf(&["null", "16"])),
    ("has_zero_point", OneOf(&["null", "false"])),
    ("ignore", Harmless),
    // Keys and values of training are not quantized.
    ("kv_cache_quant_algo", Harmless),
    ("kv_cache_scheme", Harmless),
    ("pre_quant_scale", OneOf(&["null", "false"])),
    ("producer", Harmless),
    ("quant_algo", OneOf(&["\"NVFP4\"", "\"W4A16_NVFP4\""])),
];

const COMPRESSED: &[(&str, Setting)] = &[
    ("config_groups", Harmless),
    ("format", OneOf(&["\"nvfp4-pack-quantized\""])),
    ("global_compression_ratio", Harmless),
    ("ignore", Harmless),
    ("kv_cache_scheme", Harmless),
    ("quantization_status", OneOf(&["null", "\"compressed\""])),
    ("sparsity_config", OneOf(&["null", "{}"])),
    ("transform_config", OneOf(&["null", "{}"])),
    ("version", Harmless),
];

const BITSANDBYTES: &[(&str, Setting)] = &[
    ("_load_in_4bit", OneOf(&["null", "true"])),
    ("_load_in_8bit", OneOf(&["null", "false"])),
    ("bnb_4bit_compute_dtype", Harmless),
    // Other dtypes hold the same bytes.
    ("bnb_4bit_quant_storage", Harmless),
    ("bnb_4bit_quant_type", OneOf(&["\"nf4\""])),
    ("bnb_4bit_use_double_quant", Harmless),
    ("llm_int8_enable_fp32_cpu_offload", Harmless),
    ("llm_int8_has_fp16_weight", Harmless),
    ("llm_int8_skip_modules", Harmless),
    ("llm_int8_threshold", Harmless),
    ("load_in_4bit", OneOf(&["true"])),
    ("load_in_8bit", OneOf(&["null", "false"])),
];

impl Scheme {
    /// That of a directory; `None` where no file says that the model is quantized.
    ///
    /// # Errors
    /// A file cannot be read, or asks for what is not built.
    pub fn of(directory: &Path) -> Result<Option<Self>, SourceError> {
        let path = directory.join("config.json");
        if let Some(Value::Object(config)) = json(&path)?
            && let Some(scheme) = Self::in_config(&path, &config)?
        {
            return Ok(Some(scheme));
        }
        let path = directory.join(MODELOPT);
        match json(&path)? {
            Some(Value::Object(config)) if config.get("quantization").is_some_and(Value::is_object) => {
                let settings = config["quantization"].as_object().cloned().unwrap_or_default();
                check(&path, "quantization", &settings, MODELOPT_KEYS)?;
                Ok(Some(Self::ModelOpt))
            }
            _ => Ok(None),
        }
    }

    /// That of config.json, if it has one.
    ///
    /// # Errors
    /// It asks for what is not built.
    pub fn in_config(path: &Path, config: &Map<String, Value>) -> Result<Option<Self>, SourceError> {
        let given = |field: &'static str| Some((field, config.get(field).filter(|value| !value.is_null())?));
        let Some((field, value)) = FIELDS.into_iter().find_map(given) else { return Ok(None) };
        let refused = |name: &str, found: String| SourceError::Scheme {
            path: path.to_owned(),
            field: format!("{field}{name}"),
            found,
            remedy: READ.to_owned(),
        };
        let Value::Object(settings) = value else { return Err(refused("", value.to_string())) };
        let method = match settings.get("quant_method") {
            Some(Value::String(method)) => method.as_str(),
            // transformers' oldest files of bitsandbytes lack it.
            None if settings.contains_key("load_in_4bit") => "bitsandbytes",
            Some(other) => return Err(refused(".quant_method", other.to_string())),
            None => return Err(refused("", value.to_string())),
        };
        let (scheme, keys) = match method {
            "fp8" => (Self::Fp8, FP8),
            "modelopt" | "modelopt_fp4" => (Self::ModelOpt, MODELOPT_KEYS),
            "compressed-tensors" => (Self::CompressedTensors, COMPRESSED),
            "bitsandbytes" => (Self::BitsAndBytes, BITSANDBYTES),
            other => return Err(refused(".quant_method", other.to_owned())),
        };
        check(path, field, settings, keys)?;
        if scheme == Self::CompressedTensors {
            check_groups(path, field, settings)?;
        }
        Ok(Some(scheme))
    }

    /// Takes the tensors of each quantized matrix out of `source`.
    pub(in super::super) fn take(
        self,
        source: &mut SafetensorsSource,
    ) -> Result<BTreeMap<String, PackedMatrix>, SourceError> {
        let ending = match self {
            Self::Fp8 => "_scale_inv",
            Self::ModelOpt => "_scale_2",
            Self::CompressedTensors => "_packed",
            Self::BitsAndBytes => ".absmax",
        };
        let mut matrices = BTreeMap::new();
        for name in source.stored() {
            let matrix = name.strip_suffix(ending).filter(|matrix| matrix.ends_with(".weight"));
            let Some(matrix) = matrix else { continue };
            let taken = match self {
                Self::Fp8 => PackedMatrix::fp8(source, matrix, &name),
                Self::ModelOpt => PackedMatrix::modelopt(source, matrix),
                Self::CompressedTensors => PackedMatrix::compressed(source, matrix),
                Self::BitsAndBytes => PackedMatrix::nf4(source, matrix),
            };
            matrices.insert(matrix.to_owned(), taken?);
        }
        // Scales of activations and of cached keys and values, none of which training quantizes.
        const UNUSED: [&str; 5] =
            [".input_scale", ".activation_scale", ".input_global_scale", ".k_scale", ".v_scale"];
        for name in source.stored() {
            if UNUSED.iter().any(|ending| name.ends_with(ending)) {
                source.take(&name);
            }
        }
        Ok(matrices)
    }
}

/// The JSON of `path`; `None` where no such file is there, or it is no JSON, which the reader of the config reports.
fn json(path: &Path) -> Result<Option<Value>, SourceError> {
    match regular_file::read_to_string(path) {
        Ok(text) => Ok(serde_json::from_str(&text).ok()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(SourceError::Io { path: path.to_owned(), error }),
    }
}

/// Refuses settings that `keys` does not know, or whose values it does not allow.
fn check(
    path: &Path,
    field: &str,
    settings: &Map<String, Value>,
    keys: &[(&str, Setting)],
) -> Result<(), SourceError> {
    let refused = |name: &str, found: &Value, remedy: String| {
        Err(SourceError::Scheme {
            path: path.to_owned(),
            field: format!("{field}.{name}"),
            found: found.to_string(),
            remedy,
        })
    };
    for (name, setting) in keys {
        let value = settings.get(*name).unwrap_or(&Value::Null);
        if let OneOf(allowed) = setting
            && !allowed.contains(&value.to_string().as_str())
        {
            return refused(name, value, format!("{} can be read", allowed.join(" or ")));
        }
    }
    for (name, value) in settings {
        if name != "quant_method" && !keys.iter().any(|(key, _)| key == name) {
            return refused(name, value, "this setting is not known; take the model in bfloat16".into());
        }
    }
    Ok(())
}

/// Refuses groups of compressed-tensors whose weights are not NVFP4.
fn check_groups(path: &Path, field: &str, settings: &Map<String, Value>) -> Result<(), SourceError> {
    const WEIGHTS: [(&str, &[&str]); 5] = [
        ("num_bits", &["4"]),
        ("type", &["\"float\""]),
        ("group_size", &["16"]),
        ("symmetric", &["null", "true"]),
        ("strategy", &["\"tensor_group\""]),
    ];
    let groups = settings.get("config_groups").and_then(Value::as_object);
    for (group, scheme) in groups.into_iter().flatten() {
        for (name, allowed) in WEIGHTS {
            let value = &scheme["weights"][name];
            if !allowed.contains(&value.to_string().as_str()) {
                return Err(SourceError::Scheme {
                    path: path.to_owned(),
                    field: format!("{field}.config_groups.{group}.weights.{name}"),
                    found: value.to_string(),
                    remedy: format!("{} can be read", allowed.join(" or ")),
                });
            }
        }
    }
    Ok(())
}
