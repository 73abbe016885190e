//! Rules between fields, and values of fields that are not built. Demands on a single field stand in its declaration.

use super::error::{ConfigError, FieldLocations, Problem};
use super::{ExportFormat, LrDecayStyle, PackingMethod, RunConfig};
use std::collections::BTreeSet;

/// Sets the defaults that depend on another field, then checks the rules between fields. A rule is left out if one of
/// its fields, or its section, is `unread`: its default stands in its place.
pub(super) fn validate(
    config: &mut RunConfig,
    places: &FieldLocations,
    unread: &BTreeSet<String>,
) -> Vec<ConfigError> {
    let unpacked = config.data.sample_packing_method == PackingMethod::None;
    if unpacked && !places.is_given("data.pad_to_multiple_of") {
        config.data.pad_to_multiple_of = None;
    }

    let mut faults = Vec::new();
    for (fields, problem) in broken_rules(config) {
        let section = |field: &str| field.split('.').next().unwrap_or(field).to_owned();
        if !fields.iter().any(|field| unread.contains(*field) || unread.contains(&section(field))) {
            faults.push(ConfigError::Field { place: places.of(fields[0]), problem });
        }
    }
    faults
}

/// The rules that are broken: the fields that they compare, of which the first is to blame, and the problem.
fn broken_rules(config: &RunConfig) -> Vec<(&'static [&'static str], Problem)> {
    let RunConfig { model, data, train, lora } = config;
    let mut broken: Vec<(&'static [&'static str], Problem)> = Vec::new();
    let mut rule = |is_broken: bool, fields: &'static [&'static str], problem: Problem| {
        if is_broken {
            broken.push((fields, problem));
        }
    };
    let refused = |value: String, reason| Problem::Refused { value, reason };

    let needed = "an HF model directory, or config_path alone for random weights";
    rule(
        model.model_path.is_none() && model.config_path.is_none(),
        &["model.model_path", "model.config_path"],
        Problem::Missing { needed },
    );
    let needed = "at least one data set, {path: …, type: …}";
    rule(data.datasets.is_empty(), &["data.datasets"], Problem::Missing { needed });
    let words = "pads packs, but data.sample_packing_method is none; remove one of them";
    rule(
        data.sample_packing_method == PackingMethod::None && data.pad_to_multiple_of.is_some(),
        &["data.pad_to_multiple_of", "data.sample_packing_method"],
        Problem::Conflict(words.into()),
    );
    rule(
        train.lr_decay_style != LrDecayStyle::Constant && train.lr_min > train.lr,
        &["train.lr_min", "train.lr", "train.lr_decay_style"],
        Problem::Conflict(format!("{:?} is above train.lr {:?}", train.lr_min, train.lr)),
    );
    rule(
        (train.lr_warmup_ratio > 0.0 || train.lr_warmup_steps.is_some_and(|n| n > 0))
            && train.lr_start > train.lr,
        &["train.lr_start", "train.lr"],
        Problem::Conflict(format!("{:?} is above train.lr {:?}", train.lr_start, train.lr)),
    );
    let words = "train.lr_warmup_ratio says the length of the warm-up too; remove one of them";
    rule(
        train.lr_warmup_ratio > 0.0 && train.lr_warmup_steps.is_some(),
        &["train.lr_warmup_steps", "train.lr_warmup_ratio"],
        Problem::Conflict(words.into()),
    );
    rule(
        train.adam_epsilon as f32 == 0.0,
        &["train.adam_epsilon"],
        Problem::Conflict(format!("{:?} is 0 in fp32, in which AdamW computes", train.adam_epsilon)),
    );
    let reason = "sequence parallelism is not built; leave it at 1";
    let ulysses = train.ulysses_parallel_size;
    rule(ulysses > 1, &["train.ulysses_parallel_size"], refused(ulysses.to_string(), reason));
    let reason = "not built; metrics go to metrics.jsonl in output_dir";
    rule(train.use_wandb, &["train.use_wandb"], refused("true".into(), reason));
    let words =
        "sglang_shared_outer holds what experts share: set lora.moe_hybrid_shared_lora, or use per_expert";
    rule(
        lora.lora_export_format == ExportFormat::SglangSharedOuter && !lora.moe_hybrid_shared_lora,
        &["lora.lora_export_format", "lora.moe_hybrid_shared_lora"],
        Problem::Conflict(words.into()),
    );
    let of_vocabulary = |name: &&String| ["lm_head", "embed_tokens"].iter().any(|end| name.ends_with(end));
    if let Some(name) = lora.lora_target_modules.iter().flatten().find(of_vocabulary) {
        let reason =
            "embedding and head are frozen; name projections of layers (q_proj, down_proj) or all-linear";
        rule(true, &["lora.lora_target_modules"], refused(name.clone(), reason));
    }
    let reason = "the base is frozen by design, so nothing would be trained";
    rule(!lora.enable_lora, &["lora.enable_lora"], refused("false".into(), reason));
    broken
}
