//! Adapters in the form that HF PEFT loads: `adapter_config.json` and `adapter_model.safetensors`, fp32, with HF's
//! split names also for fused targets: the shared A is written for each part and B is cut, which is exact.

use super::{CheckpointError, io};
use crate::lora::Site;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

pub const CONFIG_FILE: &str = "adapter_config.json";
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// The part of PEFT's adapter_config.json that we compute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    pub r: usize,
    pub lora_alpha: f64,
    pub target_modules: Vec<String>,
    pub base_model_name_or_path: Option<String>,
}

/// One adapter as a run trains it: an independent leaf, or a fused target of several leaves with one A.
#[derive(Clone, Debug, PartialEq)]
pub struct LogicalAdapter {
    /// Dotted path of the parent: `model.layers.0.self_attn`.
    pub parent: String,
    /// Leaves with their widths, in the order of B's rows.
    pub leaves: Vec<(String, usize)>,
    pub rank: usize,
    pub input: usize,
    /// `[rank, input]`
    pub a: Vec<f32>,
    /// `[Σ widths, rank]`
    pub b: Vec<f32>,
}

impl LogicalAdapter {
    /// The adapter of `site`, without values.
    pub fn of(site: &Site, rank: usize) -> Self {
        let leaves = site.leaves.iter().map(|(leaf, width)| (leaf.to_string(), *width)).collect();
        let (a, b) = (Vec::new(), Vec::new());
        Self { parent: site.parent.clone(), leaves, rank, input: site.input, a, b }
    }

    /// PEFT's keys of leaf `leaf`: lora_A and lora_B.
    fn keys(&self, leaf: &str) -> [String; 2] {
        ["lora_A", "lora_B"].map(|factor| format!("base_model.model.{}.{leaf}.{factor}.weight", self.parent))
    }
}

/// Writes both files into `directory`.
pub fn write(
    directory: &Path,
    config: &AdapterConfig,
    adapters: &[LogicalAdapter],
) -> Result<(), CheckpointError> {
    let mut json = serde_json::json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": false,
        "inference_mode": true, "use_rslora": false, "use_dora": false, "rank_pattern": {}, "alpha_pattern": {},
        "modules_to_save": null,
    });
    json["r"] = config.r.into();
    json["lora_alpha"] = config.lora_alpha.into();
    json["target_modules"] = config.target_modules.clone().into();
    json["base_model_name_or_path"] = config.base_model_name_or_path.clone().into();
    let path = directory.join(CONFIG_FILE);
    let text = serde_json::to_string_pretty(&json).unwrap_or_default();
    std::fs::write(&path, text + "\n").map_err(io(&path))?;

    let path = directory.join(WEIGHTS_FILE);
    let mut views: BTreeMap<String, TensorView> = BTreeMap::new();
    for adapter in adapters {
        let mut row = 0;
        for (leaf, width) in &adapter.leaves {
            // A B that is too short fails below, where its key is known.
            let b = adapter.b.get(row * adapter.rank..(row + width) * adapter.rank).unwrap_or_default();
            row += width;
            let shapes = [vec![adapter.rank, adapter.input], vec![*width, adapter.rank]];
            for ((key, shape), data) in adapter.keys(leaf).into_iter().zip(shapes).zip([&adapter.a[..], b]) {
                let view = TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(data));
                let fault = |error: safetensors::SafeTensorError| CheckpointError::Mismatch {
                    path: path.clone(),
                    reason: format!("{key}: {error}"),
                };
                let view = view.map_err(fault)?;
                views.insert(key, view);
            }
        }
    }
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let fault = |error: safetensors::SafeTensorError| CheckpointError::Format {
        path: path.clone(),
        reason: error.to_string(),
    };
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(fault)?;
    std::fs::write(&path, bytes).map_err(io(&path))
}

/// Reads adapter_config.json, refusing what changes the maths and is not built.
pub fn read_config(directory: &Path) -> Result<AdapterConfig, CheckpointError> {
    let path = directory.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(io(&path))?;
    let format = |reason: String| CheckpointError::Format { path: path.clone(), reason };
    let json: Value = serde_json::from_str(&text).map_err(|error| format(error.to_string()))?;
    let neutral = |field: &'static str, supported: &'static str, allowed: &[Value]| {
        let value = &json[field];
        if value.is_null() || allowed.contains(value) {
            return Ok(());
        }
        Err(CheckpointError::NotBuilt { path: path.clone(), field, found: value.to_string(), supported })
    };
    neutral("peft_type", "LORA", &["LORA".into()])?;
    neutral("bias", "none", &["none".into()])?;
    for field in ["use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"] {
        neutral(field, "false", &[false.into()])?;
    }
    for field in ["rank_pattern", "alpha_pattern"] {
        neutral(field, "one rank and alpha for all", &[serde_json::json!({})])?;
    }
    for field in ["modules_to_save", "target_parameters", "trainable_token_indices"] {
        neutral(field, "none", &[serde_json::json!([])])?;
    }
    serde_json::from_value(json).map_err(|error| format(error.to_string()))
}

/// Fills A and B of `adapters` from the adapter in `directory`. Every key must be there, in shape, and no other;
/// leaves of a fused target need the same A, bit for bit.
pub fn read(directory: &Path, adapters: &mut [LogicalAdapter]) -> Result<(), CheckpointError> {
    let path = directory.join(WEIGHTS_FILE);
    let bytes = std::fs::read(&path).map_err(io(&path))?;
    let format = |reason: String| CheckpointError::Format { path: path.clone(), reason };
    let file = SafeTensors::deserialize(&bytes).map_err(|error| format(error.to_string()))?;
    let mut surplus: BTreeSet<String> = file.names().into_iter().map(|name| name.to_owned()).collect();
    let mut faults = Vec::new();
    for adapter in adapters {
        let (mut first_a, mut b): (Option<Vec<f32>>, Vec<f32>) = (None, Vec::new());
        for (leaf, width) in &adapter.leaves {
            let shapes = [[adapter.rank, adapter.input], [*width, adapter.rank]];
            for (factor, (key, shape)) in adapter.keys(leaf).into_iter().zip(shapes).enumerate() {
                surplus.remove(&key);
                let Ok(view) = file.tensor(&key) else {
                    faults.push(format!("{key} is missing"));
                    continue;
                };
                if view.shape() != shape {
                    faults.push(format!("{key} is {:?}, expected {shape:?}", view.shape()));
                    continue;
                }
                let Some(values) = floats(&view) else {
                    faults.push(format!("{key} is {:?}, expected F32, BF16 or F16", view.dtype()));
                    continue;
                };
                match (factor, &first_a) {
                    (0, None) => first_a = Some(values),
                    (0, Some(a)) if *a != values => {
                        faults.push(format!(
                            "{key} differs from its neighbours, but the target is fused and has one A"
                        ));
                    }
                    (0, Some(_)) => (),
                    _ => b.extend(values),
                }
            }
        }
        (adapter.a, adapter.b) = (first_a.unwrap_or_default(), b);
    }
    faults.extend(surplus.into_iter().map(|key| format!("{key} is surplus")));
    if faults.is_empty() {
        Ok(())
    } else {
        Err(CheckpointError::Mismatch { path, reason: faults.join("; ") })
    }
}

/// A and B of the adapter in `directory` by logical parameter name (`….q_proj.lora_A`), for the adapters on `sites`.
/// See [`read`].
pub fn read_values(
    directory: &Path,
    sites: &[Site],
    rank: usize,
) -> Result<HashMap<String, Vec<f32>>, CheckpointError> {
    let mut adapters: Vec<_> = sites.iter().map(|site| LogicalAdapter::of(site, rank)).collect();
    read(directory, &mut adapters)?;
    let named = sites.iter().zip(adapters).flat_map(|(site, adapter)| {
        let path = site.path();
        [(format!("{path}.lora_A"), adapter.a), (format!("{path}.lora_B"), adapter.b)]
    });
    Ok(named.collect())
}

/// Those of `sites` that the adapter in `directory` adapts, by the keys of its file: what PEFT's `target_modules` mean
/// depends on patterns, the keys do not.
pub fn adapted_sites(directory: &Path, sites: Vec<Site>) -> Result<Vec<Site>, CheckpointError> {
    let path = directory.join(WEIGHTS_FILE);
    let bytes = std::fs::read(&path).map_err(io(&path))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| CheckpointError::Format { path, reason: error.to_string() })?;
    let adapted = |site: &Site| {
        let adapter = LogicalAdapter::of(site, 0);
        adapter.leaves.iter().any(|(leaf, _)| adapter.keys(leaf).iter().any(|key| file.tensor(key).is_ok()))
    };
    Ok(sites.into_iter().filter(adapted).collect())
}

/// A tensor's values in fp32.
fn floats(view: &TensorView) -> Option<Vec<f32>> {
    let dtype = match view.dtype() {
        Dtype::F32 => crate::dtype::DType::F32,
        Dtype::BF16 => crate::dtype::DType::Bf16,
        Dtype::F16 => crate::dtype::DType::F16,
        _ => return None,
    };
    let mut values = vec![0f32; view.data().len() / dtype.size()];
    dtype.convert(view.data(), crate::dtype::DType::F32, bytemuck::cast_slice_mut(&mut values));
    Some(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapters() -> Vec<LogicalAdapter> {
        let values = |n: usize, from: f32| (0..n).map(|i| from + i as f32).collect::<Vec<_>>();
        let leaves = |names: &[(&str, usize)]| names.iter().map(|(n, w)| (n.to_string(), *w)).collect();
        vec![
            LogicalAdapter {
                parent: "model.layers.0.self_attn".into(),
                leaves: leaves(&[("q_proj", 4), ("k_proj", 2), ("v_proj", 2)]),
                rank: 2,
                input: 3,
                a: values(6, 0.5),
                b: values(16, 100.0),
            },
            LogicalAdapter {
                parent: "model.layers.0.mlp".into(),
                leaves: leaves(&[("down_proj", 3)]),
                rank: 2,
                input: 5,
                a: values(10, -3.0),
                b: values(6, 7.0),
            },
        ]
    }

    fn config() -> AdapterConfig {
        let target_modules = ["q_proj", "k_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec();
        AdapterConfig { r: 2, lora_alpha: 4.0, target_modules, base_model_name_or_path: Some("base".into()) }
    }

    fn empty() -> Vec<LogicalAdapter> {
        adapters().into_iter().map(|adapter| LogicalAdapter { a: vec![], b: vec![], ..adapter }).collect()
    }

    #[test]
    fn fused_targets_are_written_split_and_come_back() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), &config(), &adapters()).unwrap();
        let bytes = std::fs::read(directory.path().join(WEIGHTS_FILE)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 8);
        let k = file.tensor("base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight").unwrap();
        assert_eq!((k.shape(), floats(&k).unwrap()), (&[2, 2][..], vec![108.0, 109.0, 110.0, 111.0]));
        let mut back = empty();
        read(directory.path(), &mut back).unwrap();
        assert_eq!(back, adapters());
        assert_eq!(read_config(directory.path()).unwrap(), config());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let mut other = adapters();
        other[1].leaves[0].0 = "up_proj".into();
        write(directory.path(), &config(), &other).unwrap();
        let message = read(directory.path(), &mut empty()).unwrap_err().to_string();
        for part in ["mlp.down_proj.lora_A.weight is missing", "mlp.up_proj.lora_B.weight is surplus"] {
            assert!(message.contains(part), "{part} in {message}");
        }
        // Independent A's cannot start a fused target.
        let split: Vec<LogicalAdapter> = ["q_proj", "k_proj", "v_proj"]
            .iter()
            .zip([4, 2, 2])
            .map(|(leaf, width)| LogicalAdapter {
                leaves: vec![(leaf.to_string(), width)],
                a: vec![width as f32; 6],
                b: vec![0.0; width * 2],
                ..adapters()[0].clone()
            })
            .chain([adapters()[1].clone()])
            .collect();
        write(directory.path(), &config(), &split).unwrap();
        let message = read(directory.path(), &mut empty()).unwrap_err().to_string();
        assert!(message.contains("k_proj.lora_A.weight differs"), "{message}");
    }

    #[test]
    fn configs_that_mean_other_maths_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        for (field, value) in [
            ("use_rslora", Value::from(true)),
            ("use_dora", Value::from(true)),
            ("bias", "all".into()),
            ("rank_pattern", serde_json::json!({"q_proj": 4})),
            ("modules_to_save", serde_json::json!(["lm_head"])),
            ("peft_type", "IA3".into()),
        ] {
            write(directory.path(), &config(), &[]).unwrap();
            let path = directory.path().join(CONFIG_FILE);
            let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            json[field] = value;
            std::fs::write(&path, json.to_string()).unwrap();
            let error = read_config(directory.path()).unwrap_err();
            assert!(
                matches!(error, CheckpointError::NotBuilt { field: named, .. } if named == field),
                "{error}"
            );
        }
    }
}
