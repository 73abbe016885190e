//! The base of a model in HF files: opens them, gives tensors the model's names, decides whether the head is tied, and
//! compares all shapes.

use super::{
    ModelSpec,
    spec::{EMBEDDING, HEAD},
};
use crate::{
    dtype::DType,
    weights::{SafetensorsSource, SourceError, WeightSource, names_in_model, validate},
};
use std::path::Path;

/// A folder of a model with this file is the model with an adapter to transformers.
const ADAPTER: &str = "adapter_config.json";
/// Elements compared at a time.
const CHUNK: usize = 1 << 20;

/// The tensors of `directory` for `spec`, chosen and named as transformers does. Warnings go to the log. A head that
/// the files have beside another embedding is used even if the config ties the two: `spec` is changed then.
pub fn open(directory: &Path, spec: &mut ModelSpec) -> Result<SafetensorsSource, SourceError> {
    let mut source = SafetensorsSource::open(directory)?;
    let adapter = directory.join(ADAPTER);
    if adapter.is_file() {
        return Err(SourceError::AdapterInside { path: adapter });
    }
    source.rename(names_in_model(&spec.tensors()))?;
    source.split(|name, shape| experts_in(spec, name, shape))?;
    if spec.tie_word_embeddings && source.meta(HEAD).is_some() {
        if source.meta(EMBEDDING).is_none() {
            let tied = |name: &str| if name == HEAD { EMBEDDING.to_owned() } else { name.to_owned() };
            source.rename(tied)?;
        } else if !is_equal(&source, EMBEDDING, HEAD)? {
            tracing::warn!(
                "{}: tie_word_embeddings is true, and {HEAD} of the files is not {EMBEDDING}: the files' head is \
                 used, as in transformers; set tie_word_embeddings: false in config.json to say so",
                directory.display()
            );
            spec.tie_word_embeddings = false;
        }
    }
    validate(&source, &spec.tensors()).map_err(|error| match error {
        SourceError::Mismatch(faults) => SourceError::Unfit { path: directory.to_owned(), faults },
        error => error,
    })?;
    Ok(source)
}

/// The tensors of the model in `name`, which transformers has in its modules and writes with
/// `save_original_format=False`: `mlp.experts.gate_up_proj` `[experts, 2 · width, hidden]`, gate above up, and
/// `mlp.experts.down_proj` `[experts, hidden, width]`; the router, where the files of the family name its block
/// otherwise.
fn experts_in(spec: &ModelSpec, name: &str, shape: &[usize]) -> Option<Vec<(String, Vec<usize>)>> {
    let (layer, tensor) = name.strip_prefix("model.layers.")?.split_once(".mlp.")?;
    let number = layer.parse().ok().filter(|&layer| layer < spec.layers.len())?;
    let moe = spec.moe_of(number)?;
    let block = format!("model.layers.{layer}.{}", moe.names.block);
    let leaves: &[&str] = match tensor {
        "experts.gate_up_proj" => &["gate_proj", "up_proj"],
        "experts.down_proj" => &["down_proj"],
        "gate.weight" if moe.names.block != "mlp" => {
            return Some(vec![(format!("{block}.gate.weight"), shape.to_vec())]);
        }
        _ => return None,
    };
    let &[experts, rows, columns] = shape else { return None };
    if experts != moe.experts || !rows.is_multiple_of(leaves.len()) {
        return None;
    }
    let part = |expert: usize, leaf: &str| {
        let name = format!("{block}.experts.{expert}.{}.weight", moe.names.leaf(leaf));
        (name, vec![rows / leaves.len(), columns])
    };
    Some((0..experts).flat_map(|expert| leaves.iter().map(move |leaf| part(expert, leaf))).collect())
}

/// True if tensors `a` and `b` have the same shape and values.
fn is_equal(source: &SafetensorsSource, a: &str, b: &str) -> Result<bool, SourceError> {
    let shapes = [a, b].map(|name| source.meta(name).map(|meta| meta.shape));
    if shapes[0] != shapes[1] {
        return Ok(false);
    }
    let elements: usize = shapes.into_iter().flatten().take(1).flatten().product();
    let read = |name: &str, start: usize| {
        let range = start..elements.min(start + CHUNK);
        let mut values = vec![0f32; range.len()];
        source.read(name, range, DType::F32, bytemuck::cast_slice_mut(&mut values))?;
        Ok::<_, SourceError>(values)
    };
    for start in (0..elements).step_by(CHUNK) {
        if read(a, start)? != read(b, start)? {
            return Ok(false);
        }
    }
    Ok(true)
}
