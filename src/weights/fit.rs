//! Compares the tensors of a source with those of a model, by the names that transformers gives them.

use super::{SourceError, WeightSource};
use crate::console::first_of;
use std::collections::HashSet;

/// The module in which transformers has everything but the head. Names may lack it, or have it once too often.
const BODY: &str = "model.";
const HEAD: &str = "lm_head.weight";

/// Prefixes that programs leave in names, each with what takes it off.
const PREFIXES: &[(&str, &str)] = &[
    ("_orig_mod.", "it is torch.compile's: save model._orig_mod"),
    ("base_model.model.", "it is PEFT's: save model.merge_and_unload()"),
    ("language_model.", "it is that of a model with vision: save its language model alone"),
    ("module.", "it is DistributedDataParallel's: save model.module"),
    ("_fsdp_wrapped_module.", "it is FSDP's: save the full state dict"),
];

/// Finds the model's name for a stored one, as transformers does: it adds `model.` where that makes a name of the
/// model, and takes it off where that does. `needed` are the model's tensors.
pub fn names_in_model(needed: &[(String, Vec<usize>)]) -> impl Fn(&str) -> String {
    let known: HashSet<String> =
        needed.iter().map(|(name, _)| name.clone()).chain([HEAD.to_owned()]).collect();
    move |stored| {
        let shorter = stored.strip_prefix(BODY).filter(|name| known.contains(*name));
        let longer = || Some(format!("{BODY}{stored}")).filter(|name| known.contains(name));
        shorter.map(str::to_owned).or_else(longer).unwrap_or_else(|| stored.to_owned())
    }
}

/// Compares what `source` has with what the model needs. One error names everything that is missing, of another shape,
/// or surplus in the model's own layers. Other tensors are not read, as in transformers: a warning names them.
pub fn validate(source: &dyn WeightSource, needed: &[(String, Vec<usize>)]) -> Result<(), SourceError> {
    let known: HashSet<&str> = needed.iter().map(|(name, _)| name.as_str()).collect();
    let missing: Vec<&str> =
        needed.iter().map(|(name, _)| name.as_str()).filter(|name| source.meta(name).is_none()).collect();
    // Old checkpoints carry the rotary buffer, and some a copy of the tied head: neither is a weight.
    let harmless = |name: &str| name.ends_with("rotary_emb.inv_freq") || name == HEAD;
    let names = source.names();
    let unread = names.iter().map(String::as_str);
    let unread: Vec<&str> = unread.filter(|name| !known.contains(name) && !harmless(name)).collect();
    if !missing.is_empty()
        && let Some(error) = foreign_prefix(&unread, &known)
    {
        return Err(error);
    }
    let layers: HashSet<&str> = known.iter().filter_map(|name| layer_of(name)).collect();
    let (surplus, unread): (Vec<&str>, Vec<&str>) =
        unread.into_iter().partition(|name| layer_of(name).is_some_and(|layer| layers.contains(layer)));
    let misshapen = needed.iter().filter_map(|(name, shape)| {
        let found = source.meta(name)?.shape;
        (found != *shape).then(|| format!("{name} is {found:?}, expected {shape:?}"))
    });
    let mut faults = vec![
        ("missing", first_of(&missing)),
        ("of another shape", first_of(&misshapen.collect::<Vec<_>>())),
        ("surplus", first_of(&surplus)),
    ];
    faults.retain(|(_, names)| !names.is_empty());
    if !faults.is_empty() {
        faults.extend((!unread.is_empty()).then(|| ("not read", first_of(&unread))));
        let faults: Vec<String> =
            faults.into_iter().map(|(what, names)| format!("{what}: {names}")).collect();
        return Err(SourceError::Mismatch(faults.join("; ")));
    }
    if !unread.is_empty() {
        tracing::warn!("tensors of the model that nothing reads, as in transformers: {}", first_of(&unread));
    }
    Ok(())
}

/// The layer that `name` is in: `model.layers.7`.
fn layer_of(name: &str) -> Option<&str> {
    let rest = name.strip_prefix("model.layers.")?;
    Some(&name[..name.len() - rest.len() + rest.find('.')?])
}

/// The error of a prefix that makes names of the model of the `unread` names.
fn foreign_prefix(unread: &[&str], known: &HashSet<&str>) -> Option<SourceError> {
    let is_known = |name: &str| known.contains(name) || known.contains(format!("{BODY}{name}").as_str());
    unread.iter().find_map(|name| {
        let (prefix, remedy) = PREFIXES.iter().find_map(|(prefix, remedy)| {
            let at = name.find(prefix)?;
            let inner = format!("{}{}", &name[..at], &name[at + prefix.len()..]);
            is_known(&inner).then_some((*prefix, *remedy))
        })?;
        Some(SourceError::Prefix { prefix: prefix.to_owned(), example: (*name).to_owned(), remedy })
    })
}
