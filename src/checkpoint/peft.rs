//! Adapters as HF PEFT loads them: `adapter_config.json` and `adapter_model.safetensors`, fp32, with HF's split names
//! also for fused targets. Adapters of routed experts are stored as `target_parameters` (see `experts`), or in a form
//! of serving stacks (see `stored`).

use super::{CheckpointError, experts, io, stored::Layout};
use crate::{
    config::ExportFormat,
    lora::{Factor, MoeNames, Site, targets::Projection},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

pub const CONFIG_FILE: &str = "adapter_config.json";
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// The fields of PEFT's adapter_config.json that this program computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    pub r: usize,
    pub lora_alpha: f64,
    #[serde(default)]
    pub target_modules: Vec<String>,
    /// Parameters that are adapted as a whole: those of fused experts.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub target_parameters: Vec<String>,
    /// r of the modules that a pattern matches.
    #[serde(default)]
    pub rank_pattern: BTreeMap<String, usize>,
    #[serde(default)]
    pub alpha_pattern: BTreeMap<String, f64>,
    pub base_model_name_or_path: Option<String>,
}

fn null_is_empty<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
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
    /// Count of experts with such an adapter each: the leading dimension of A and B.
    pub experts: Option<usize>,
    /// Names of the experts in the model's files.
    pub names: MoeNames,
    /// The factor that is the same for all experts.
    pub shared: Option<Factor>,
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
        let experts = site.experts.map(|experts| experts.count);
        let names = site.experts.map_or(MoeNames::MLP, |experts| experts.names);
        let (parent, shared) = (site.parent.clone(), site.shared);
        Self { parent, leaves, rank, input: site.input, experts, names, shared, a, b }
    }

    /// Rows of B.
    pub(super) fn output(&self) -> usize {
        self.leaves.iter().map(|(_, width)| width).sum()
    }
}

impl AdapterConfig {
    /// The configuration of `adapters` in `format`, with their targets and patterns.
    pub fn new(
        r: usize,
        lora_alpha: f64,
        base: Option<String>,
        adapters: &[LogicalAdapter],
        format: ExportFormat,
    ) -> Self {
        let groups = groups_of(adapters, format);
        let (mut modules, mut parameters) = (BTreeSet::new(), BTreeSet::new());
        let as_modules =
            |adapter: &&LogicalAdapter| adapter.experts.is_none() || format != ExportFormat::Peft;
        for adapter in adapters.iter().filter(as_modules) {
            for (leaf, _) in &adapter.leaves {
                match adapter.parent.split_once(".mlp") {
                    // PEFT drops MLPs that are targeted as modules beside fused experts: parameters of the experts
                    // have the same leaf names.
                    Some((_, rest)) if !groups.is_empty() => {
                        parameters.insert(format!("mlp{rest}.{leaf}.weight"))
                    }
                    _ if adapter.experts.is_some() => modules.insert(adapter.names.leaf(leaf).to_owned()),
                    _ => modules.insert(leaf.clone()),
                };
            }
        }
        parameters.extend(experts::parameters(&groups));
        let patterns = experts::patterns(&groups);
        Self {
            r,
            lora_alpha,
            target_modules: modules.into_iter().collect(),
            target_parameters: parameters.into_iter().collect(),
            rank_pattern: patterns.iter().map(|(name, n)| (name.clone(), n * r)).collect(),
            alpha_pattern: patterns.into_iter().map(|(name, n)| (name, n as f64 * lora_alpha)).collect(),
            base_model_name_or_path: base,
        }
    }
}

/// The groups of expert adapters that PEFT's `target_parameters` hold; none in another `format`.
fn groups_of(adapters: &[LogicalAdapter], format: ExportFormat) -> Vec<experts::Group> {
    if format == ExportFormat::Peft { experts::groups(adapters) } else { Vec::new() }
}

/// Writes both files into `directory`, and checks that the whole adapter is in them.
pub fn write(
    directory: &Path,
    config: &AdapterConfig,
    adapters: &[LogicalAdapter],
    format: ExportFormat,
) -> Result<(), CheckpointError> {
    let mut json = serde_json::json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": false,
        "inference_mode": true, "use_rslora": false, "use_dora": false, "modules_to_save": null,
    });
    if let (Value::Object(all), Ok(Value::Object(own))) = (&mut json, serde_json::to_value(config)) {
        all.extend(own);
    }
    if config.target_parameters.is_empty() {
        json["target_parameters"] = Value::Null;
    }
    let path = directory.join(CONFIG_FILE);
    let text = serde_json::to_string_pretty(&json).unwrap_or_default();
    std::fs::write(&path, text + "\n").map_err(io(&path))?;

    let path = directory.join(WEIGHTS_FILE);
    let tensors = tensors(adapters, format);
    let mut views: BTreeMap<&str, TensorView> = BTreeMap::new();
    for (key, shape, values) in &tensors {
        let fault = |error: safetensors::SafeTensorError| CheckpointError::Mismatch {
            path: path.clone(),
            reason: format!("{key}: {error}"),
        };
        let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values)).map_err(fault)?;
        views.insert(key, view);
    }
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let fault = |error: safetensors::SafeTensorError| CheckpointError::Format {
        path: path.clone(),
        reason: error.to_string(),
    };
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(fault)?;
    std::fs::write(&path, bytes).map_err(io(&path))?;
    check_written(&path, adapters, format)
}

/// Checks that the file at `path` has the tensors of `adapters` and no others, each parameter as often as they need it.
/// An adapter with a part missing would load, and do nothing there.
fn check_written(
    path: &Path,
    adapters: &[LogicalAdapter],
    format: ExportFormat,
) -> Result<(), CheckpointError> {
    let mismatch = |reason: String| CheckpointError::Mismatch { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(io(path))?;
    // SAFETY: this process has just written the file, and no other writes in the hidden directory. Only the header is
    // read.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io(path))?;
    let file = SafeTensors::deserialize(&map).map_err(|error| mismatch(error.to_string()))?;
    let mut expected: BTreeSet<String> = BTreeSet::new();
    let mut count = 0;
    for adapter in adapters {
        let (parts, experts) = (adapter.leaves.len(), adapter.experts.unwrap_or(1));
        // Each leaf needs an A and its rows of B. A factor that experts share is there once if the format has room for
        // it.
        let copies = |factor| match format {
            ExportFormat::SglangSharedOuter if adapter.shared == Some(factor) => 1,
            _ => experts,
        };
        count += match (adapter.experts, format) {
            (Some(_), ExportFormat::Peft) => 0,
            _ => {
                adapter.rank
                    * (copies(Factor::A) * parts * adapter.input + copies(Factor::B) * adapter.output())
            }
        };
        expected.extend(Layout::from(format).tensors(adapter).into_iter().map(|stored| stored.key));
    }
    for group in groups_of(adapters, format) {
        count += group.shapes().iter().map(|[rows, columns]| rows * columns).sum::<usize>();
        expected.extend(group.keys);
    }
    let found: BTreeSet<String> = file.names().into_iter().map(|name| name.to_owned()).collect();
    if let Some(key) = expected.symmetric_difference(&found).next() {
        let what = if found.contains(key) { "surplus" } else { "missing" };
        return Err(mismatch(format!("{key} is {what} in what was written")));
    }
    let written: usize = file.iter().map(|(_, view)| view.data().len()).sum();
    if written != count * size_of::<f32>() {
        return Err(mismatch(format!("{written} bytes were written of {}", count * size_of::<f32>())));
    }
    Ok(())
}

/// The tensors of the file: key, shape, values. The shape reveals an A or B that is too short.
fn tensors(adapters: &[LogicalAdapter], format: ExportFormat) -> Vec<(String, Vec<usize>, Cow<'_, [f32]>)> {
    let mut tensors = Vec::new();
    for adapter in adapters {
        for stored in Layout::from(format).tensors(adapter) {
            let values = stored.values(adapter);
            tensors.push((stored.key, stored.shape, values));
        }
    }
    for group in groups_of(adapters, format) {
        let values = group.fuse(adapters).map(Cow::from);
        for ((key, shape), values) in group.keys.clone().into_iter().zip(group.shapes()).zip(values) {
            tensors.push((key, shape.to_vec(), values));
        }
    }
    tensors
}

/// Reads adapter_config.json.
///
/// # Errors
/// A setting that changes the maths and is not built.
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
    // Independent adapters on gate and up of experts are stored as one of twice the rank and the same scale.
    for (field, of) in [("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")] {
        let twice = json[of].as_f64().map(|value| 2.0 * value);
        let ours =
            |(pattern, value): (&String, &Value)| experts::is_pattern(pattern) && value.as_f64() == twice;
        let ours = json[field].as_object().is_some_and(|map| map.iter().all(ours));
        let allowed = if ours { json[field].clone() } else { Value::Null };
        neutral(field, "one rank and alpha for all", &[allowed])?;
    }
    for field in ["modules_to_save", "trainable_token_indices"] {
        neutral(field, "none", &[serde_json::json!([])])?;
    }
    serde_json::from_value(json).map_err(|error| format(error.to_string()))
}

/// Fills A and B of `adapters` from the adapter in `directory`, in any format. Every key must be there, in shape, and
/// no other. Leaves of a fused target need the same A, bit for bit.
pub fn read(directory: &Path, adapters: &mut [LogicalAdapter]) -> Result<(), CheckpointError> {
    let path = directory.join(WEIGHTS_FILE);
    let bytes = std::fs::read(&path).map_err(io(&path))?;
    let format = |reason: String| CheckpointError::Format { path: path.clone(), reason };
    let file = SafeTensors::deserialize(&bytes).map_err(|error| format(error.to_string()))?;
    let mut surplus: BTreeSet<String> = file.names().into_iter().map(|name| name.to_owned()).collect();
    let mut faults = Vec::new();
    let layout = Layout::of(file.names());
    let mut take = |key: &str, shape: &[usize], faults: &mut Vec<String>| {
        surplus.remove(key);
        let Ok(view) = file.tensor(key) else {
            faults.push(format!("{key} is missing"));
            return None;
        };
        if view.shape() != shape {
            faults.push(format!("{key} is {:?}, expected {shape:?}", view.shape()));
            return None;
        }
        let values = floats(&view);
        if values.is_none() {
            faults.push(format!("{key} is {:?}, expected F32, BF16 or F16", view.dtype()));
        }
        values
    };
    for group in groups_of(adapters, layout.format) {
        let [shape_a, shape_b] = group.shapes();
        let [key_a, key_b] = &group.keys;
        let (a, b) = (take(key_a, &shape_a, &mut faults), take(key_b, &shape_b, &mut faults));
        if let (Some(a), Some(b)) = (a, b)
            && let Some(found) = group.split(&a, &b, adapters)
        {
            faults.push(format!("{key_b} has {found} where no adapter of this run has an element"));
        }
    }
    for adapter in adapters {
        let tensors = layout.tensors(adapter);
        if !tensors.is_empty() {
            let experts = adapter.experts.unwrap_or(1);
            adapter.a = vec![0.0; experts * adapter.rank * adapter.input];
            adapter.b = vec![0.0; experts * adapter.output() * adapter.rank];
        }
        for stored in tensors {
            let Some(values) = take(&stored.key, &stored.shape, &mut faults) else { continue };
            if stored.repeats && *stored.values(adapter) != *values {
                let key = &stored.key;
                faults.push(format!(
                    "{key} differs from its neighbours, but the target is fused and has one A"
                ));
            }
            stored.fill(&values, adapter);
        }
    }
    faults.extend(surplus.into_iter().map(|key| format!("{key} is surplus")));
    if faults.is_empty() {
        Ok(())
    } else {
        Err(CheckpointError::Mismatch { path, reason: faults.join("; ") })
    }
}

/// The adapters on `sites`, with the values that `value` returns for each logical parameter (`….q_proj.lora_A`, or
/// `….experts.3.up_proj.lora_A` for an expert); empty where it returns none. A factor that experts share is repeated
/// for each of them, which is exact.
pub fn adapters(
    sites: &[Site],
    rank: usize,
    mut value: impl FnMut(&str) -> Option<Vec<f32>>,
) -> Vec<LogicalAdapter> {
    let mut all = |site: &Site, factor| -> Vec<f32> {
        let names = parameters(site, factor);
        let copies = site.experts.filter(|_| site.shared == Some(factor)).map_or(1, |experts| experts.count);
        let values: Vec<f32> = names.iter().flat_map(|name| value(name).unwrap_or_default()).collect();
        values.repeat(copies)
    };
    let with_values = |site| {
        let (a, b) = (all(site, Factor::A), all(site, Factor::B));
        LogicalAdapter { a, b, ..LogicalAdapter::of(site, rank) }
    };
    sites.iter().map(with_values).collect()
}

/// Names of the copies of a site's factor.
fn parameters(site: &Site, factor: Factor) -> Vec<String> {
    let suffix = match factor {
        Factor::A => "lora_A",
        Factor::B => "lora_B",
    };
    (0..site.copies(factor)).map(|copy| format!("{}.{suffix}", site.path_of(factor, copy))).collect()
}

/// Reads A and B of the adapter in `directory` by logical parameter name, for the adapters on `sites`; see [`adapters`]
/// for the names, and [`read`]. A factor that experts share has to be the same for all of them, bit for bit.
pub fn read_values(
    directory: &Path,
    sites: &[Site],
    rank: usize,
) -> Result<HashMap<String, Vec<f32>>, CheckpointError> {
    let mut adapters: Vec<_> = sites.iter().map(|site| LogicalAdapter::of(site, rank)).collect();
    read(directory, &mut adapters)?;
    let mut named = HashMap::new();
    for (site, adapter) in sites.iter().zip(adapters) {
        for (factor, values) in [(Factor::A, adapter.a), (Factor::B, adapter.b)] {
            let experts = site.experts.map_or(1, |experts| experts.count);
            let mut copies = values.chunks_exact((values.len() / experts).max(1));
            let names = parameters(site, factor);
            named.extend(names.iter().cloned().zip(copies.by_ref().map(<[f32]>::to_vec)));
            if copies.any(|copy| copy != named[&names[0]]) {
                let path = directory.join(WEIGHTS_FILE);
                let reason = format!("{} differs between experts, but this run's share it", names[0]);
                return Err(CheckpointError::Mismatch { path, reason });
            }
        }
    }
    Ok(named)
}

/// The sites on `projections` that the adapter in `directory` adapts, by the keys of its file: the meaning of PEFT's
/// `target_modules` depends on patterns. Keys of experts in PEFT's format name no targets, so `target_parameters` does.
/// Gate and up of one rank are one adapter on both.
pub fn adapted_sites(
    directory: &Path,
    config: &AdapterConfig,
    projections: &[Projection],
) -> Result<Vec<Site>, CheckpointError> {
    let path = directory.join(WEIGHTS_FILE);
    let bytes = std::fs::read(&path).map_err(io(&path))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|error| CheckpointError::Format { path, reason: error.to_string() })?;
    let layout = Layout::of(file.names());
    let independent = |site: &Site| config.rank_pattern.keys().any(|p| experts::matches(p, &site.parent));
    let adapted = |site: Site, leaf: bool| {
        if site.experts.is_none() || layout.format != ExportFormat::Peft {
            let tensors = layout.tensors(&LogicalAdapter::of(&site, 0));
            let mut found = tensors.iter().filter_map(|stored| file.tensor(&stored.key).ok()).peekable();
            // A factor that all experts share is stacked with a leading dimension of 1.
            let one = |view: TensorView| view.shape().len() == 3 && view.shape()[0] == 1;
            let shares = site.experts.is_some() && (layout.shared_once || found.clone().any(one));
            let adapted = leaf && found.peek().is_some();
            return adapted.then(|| if shares { site.hybrid() } else { site });
        }
        let (parameter, ours) = match site.name {
            "down_proj" => ("down_proj", leaf),
            _ => ("gate_up_proj", leaf == independent(&site)),
        };
        let key = format!(".{}.{parameter}", site.parent);
        let listed = config.target_parameters.iter().any(|target| key.ends_with(&format!(".{target}")));
        (ours && listed).then_some(site)
    };
    let sites = projections.iter().flat_map(|projection| {
        let leaves = projection.leaf_sites().into_iter().map(|site| (site, true));
        leaves.chain(projection.fused_site().map(|site| (site, false)))
    });
    Ok(sites.filter_map(|(site, leaf)| adapted(site, leaf)).collect())
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
                experts: None,
                names: MoeNames::MLP,
                shared: None,
                a: values(6, 0.5),
                b: values(16, 100.0),
            },
            LogicalAdapter {
                parent: "model.layers.0.mlp".into(),
                leaves: leaves(&[("down_proj", 3)]),
                rank: 2,
                input: 5,
                experts: None,
                names: MoeNames::MLP,
                shared: None,
                a: values(10, -3.0),
                b: values(6, 7.0),
            },
        ]
    }

    fn config() -> AdapterConfig {
        let target_modules = ["q_proj", "k_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec();
        let base_model_name_or_path = Some("base".into());
        AdapterConfig {
            target_modules,
            base_model_name_or_path,
            ..AdapterConfig::new(2, 4.0, None, &[], ExportFormat::Peft)
        }
    }

    fn empty() -> Vec<LogicalAdapter> {
        adapters().into_iter().map(|adapter| LogicalAdapter { a: vec![], b: vec![], ..adapter }).collect()
    }

    #[test]
    fn fused_targets_are_written_split_and_come_back() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), &config(), &adapters(), ExportFormat::Peft).unwrap();
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
        write(directory.path(), &config(), &other, ExportFormat::Peft).unwrap();
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
        write(directory.path(), &config(), &split, ExportFormat::Peft).unwrap();
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
            write(directory.path(), &config(), &[], ExportFormat::Peft).unwrap();
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
