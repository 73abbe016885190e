//! Rules between fields, and values of fields that are not built. Demands on a single field stand in its declaration.

use super::error::{ConfigError, FieldLocations, Problem};
use super::file::{Broken, ConfigFile};
use super::{ExportFormat, InitLoraWeights, LrDecayStyle, Optimizer, PackingMethod, RunConfig, lora, train};
use std::collections::BTreeSet;

/// Sets the defaults that depend on another field, then checks the rules between fields. A rule is left out if one of
/// its fields, or its section, is `unread`: its default stands in its place.
pub(super) fn validate<C: ConfigFile>(
    config: &mut C,
    places: &FieldLocations,
    unread: &BTreeSet<String>,
) -> Vec<ConfigError> {
    config.complete(places);
    let mut faults = Vec::new();
    for (fields, problem) in config.broken_rules() {
        let section = |field: &str| field.split('.').next().unwrap_or(field).to_owned();
        if !fields.iter().any(|field| unread.contains(*field) || unread.contains(&section(field))) {
            faults.push(ConfigError::Field { place: places.of(fields[0]), problem });
        }
    }
    faults
}

/// Packing is needed for padding, so without it the default of the latter is none.
pub(super) fn complete_run(config: &mut RunConfig, places: &FieldLocations) {
    let unpacked = config.data.sample_packing_method == PackingMethod::None;
    if unpacked && !places.is_given("data.pad_to_multiple_of") {
        config.data.pad_to_multiple_of = None;
    }
}

/// The rules of `run.yaml` that are broken.
pub(super) fn broken_of_run(config: &RunConfig) -> Vec<Broken> {
    let RunConfig { model, data, train, lora } = config;
    let mut broken: Vec<Broken> = Vec::new();
    let mut found = |fields: &'static [&'static str], problem: Option<Problem>| {
        broken.extend(problem.map(|problem| (fields, problem)));
    };
    found(&["model.model_path", "model.config_path"], model.missing());
    found(&["data.val_set_size"], data.split_problem());
    found(&["model.revision"], model.revision_problem());
    found(&["train.adam_epsilon"], train::epsilon_problem(train.adam_epsilon));
    found(&["train.muon_ns_steps"], train.rule.ns_steps_problem());
    found(&["train.ulysses_parallel_size"], train.compute.sequence_problem());
    found(&["lora.lora_target_modules"], lora::targets_problem(lora.lora_target_modules.as_deref()));
    found(&["lora.quant_group_size", "lora.quant_format"], lora.quant.group_problem());
    found(&["lora.enable_lora"], lora::enabled_problem(lora.enable_lora));

    let mut rule = |is_broken: bool, fields: &'static [&'static str], problem: Problem| {
        found(fields, is_broken.then_some(problem));
    };
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
    let words = "names what validates, and so does data.test_datasets; remove one of them";
    rule(
        data.val_set_size.is_some_and(|size| size > 0.0) && !data.validation_sets().is_empty(),
        &["data.val_set_size", "data.test_datasets"],
        Problem::Conflict(words.into()),
    );
    let words = "there is nothing to evaluate on: set data.val_set_size or data.test_datasets, or remove it";
    if let Some(field) = train.evaluates() {
        rule(!data.validates(), field, Problem::Conflict(words.into()));
    }
    let words =
        "needs train.metric_for_best, by which an evaluation is better: set it, or remove one of them";
    rule(
        train.early_stopping_patience.is_some() && train.metric_for_best.is_none(),
        &["train.early_stopping_patience", "train.metric_for_best"],
        Problem::Conflict(words.into()),
    );
    let reason = "not built; metrics go to metrics.jsonl in output_dir";
    rule(train.use_wandb, &["train.use_wandb"], Problem::Refused { value: "true".into(), reason });
    let words =
        "sglang_shared_outer holds what experts share: set lora.moe_hybrid_shared_lora, or use per_expert";
    rule(
        lora.lora_export_format == ExportFormat::SglangSharedOuter && !lora.moe_hybrid_shared_lora,
        &["lora.lora_export_format", "lora.moe_hybrid_shared_lora"],
        Problem::Conflict(words.into()),
    );
    let starts_from_base = lora.init_lora_weights == InitLoraWeights::Pissa;
    let words = "pissa leaves the base without what the adapter starts with, so that merging would lose it: remove \
                 lora.merge_lora_interval and lora.merge_at_end (the command merge takes the adapter), or pissa";
    rule(
        starts_from_base && (lora.merge_lora_interval > 0 || lora.merge_at_end),
        &["lora.init_lora_weights", "lora.merge_lora_interval", "lora.merge_at_end"],
        Problem::Conflict(words.into()),
    );
    let words =
        "pissa gives A and B their values: remove lora.adapter_path and lora.lora_b_init_std, or pissa";
    rule(
        starts_from_base && (lora.adapter_path.is_some() || lora.lora_b_init_std != 0.0),
        &["lora.init_lora_weights", "lora.adapter_path", "lora.lora_b_init_std"],
        Problem::Conflict(words.into()),
    );
    let words = "is noise of a quantised base: set lora.enable_qlora, or remove it";
    rule(
        lora.noise.enable_aqn && !lora.quant.enable_qlora,
        &["lora.enable_aqn", "lora.enable_qlora"],
        Problem::Conflict(words.into()),
    );
    let merges = lora.merge_lora_interval > 0 || lora.merge_at_end;
    let conflicts: [(bool, &'static [&'static str], &str); 4] = [
        (
            lora.lora_dropout > 0.0,
            &["lora.use_dora", "lora.lora_dropout"],
            "with dropout PEFT computes the base twice, which is not built: remove lora.lora_dropout",
        ),
        (
            merges,
            &["lora.use_dora", "lora.merge_lora_interval", "lora.merge_at_end"],
            "a merge that scales whole rows is not built: remove lora.merge_lora_interval and lora.merge_at_end, and \
             merge with PEFT's merge_and_unload",
        ),
        (
            starts_from_base,
            &["lora.use_dora", "lora.init_lora_weights"],
            "pissa with magnitudes is not built: remove one",
        ),
        (
            train.optimizer == Optimizer::Muon,
            &["lora.use_dora", "train.optimizer"],
            "muon updates matrices, and magnitudes are vectors: choose another train.optimizer",
        ),
    ];
    for (is_broken, fields, words) in conflicts {
        rule(lora.use_dora && is_broken, fields, Problem::Conflict(words.into()));
    }
    let words = "raises the learning rate after merges that start the optimizer anew: set lora.merge_lora_interval and \
                 lora.reset_optimizer_on_merge, or remove it";
    rule(
        lora.merge_warmup_steps > 0 && !(lora.merge_lora_interval > 0 && lora.reset_optimizer_on_merge),
        &["lora.merge_warmup_steps", "lora.merge_lora_interval", "lora.reset_optimizer_on_merge"],
        Problem::Conflict(words.into()),
    );
    let words = "is not below lora.merge_lora_interval, so that the learning rate would never be that of the schedule";
    rule(
        (1..=lora.merge_warmup_steps).contains(&lora.merge_lora_interval),
        &["lora.merge_warmup_steps", "lora.merge_lora_interval"],
        Problem::Conflict(words.into()),
    );
    broken
}
