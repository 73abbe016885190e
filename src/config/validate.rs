//! Rules between fields, and values of fields that are not built. Demands on a single field stand in its declaration.

use super::error::{ConfigError, FieldLocations, Problem};
use super::{ExportFormat, LrDecayStyle, PackingMethod, RunConfig};

/// Sets the defaults that depend on another field, then checks the rules between fields.
///
/// # Errors
/// The first rule that is broken.
pub(super) fn validate(config: &mut RunConfig, places: &FieldLocations) -> Result<(), ConfigError> {
    let unpacked = config.data.sample_packing_method == PackingMethod::None;
    if unpacked && !places.is_given("data.pad_to_multiple_of") {
        config.data.pad_to_multiple_of = None;
    }

    let RunConfig { model, data, train, lora } = &*config;
    let fail = |field: &str, problem| Err(ConfigError::Field { place: places.of(field), problem });
    let conflict = |field, words: String| fail(field, Problem::Conflict(words));
    let refuse = |field, value: String, reason| fail(field, Problem::Refused { value, reason });

    if model.model_path.is_none() && model.config_path.is_none() {
        let needed = "an HF model directory, or config_path alone for random weights";
        return fail("model.model_path", Problem::Missing { needed });
    }
    if data.datasets.is_empty() {
        return fail(
            "data.datasets",
            Problem::Missing { needed: "at least one data set, {path: …, type: …}" },
        );
    }
    if unpacked && data.pad_to_multiple_of.is_some() {
        let words = "pads packs, but data.sample_packing_method is none; remove one of them";
        return conflict("data.pad_to_multiple_of", words.into());
    }
    if train.lr_decay_style != LrDecayStyle::Constant && train.lr_min > train.lr {
        return conflict("train.lr_min", format!("{:?} is above train.lr {:?}", train.lr_min, train.lr));
    }
    if train.lr_warmup_ratio > 0.0 && train.lr_start > train.lr {
        return conflict("train.lr_start", format!("{:?} is above train.lr {:?}", train.lr_start, train.lr));
    }
    if train.adam_epsilon as f32 == 0.0 {
        let words = format!("{:?} is 0 in fp32, in which AdamW computes", train.adam_epsilon);
        return conflict("train.adam_epsilon", words);
    }
    if train.ulysses_parallel_size > 1 {
        let reason = "sequence parallelism is not built; leave it at 1";
        return refuse("train.ulysses_parallel_size", train.ulysses_parallel_size.to_string(), reason);
    }
    if train.use_wandb {
        let reason = "not built; metrics go to metrics.jsonl in output_dir";
        return refuse("train.use_wandb", "true".into(), reason);
    }
    if lora.lora_export_format == ExportFormat::SglangSharedOuter && !lora.moe_hybrid_shared_lora {
        let words = "sglang_shared_outer holds what experts share: set lora.moe_hybrid_shared_lora, or use per_expert";
        return conflict("lora.lora_export_format", words.into());
    }
    if !lora.enable_lora {
        let reason = "the base is frozen by design, so nothing would be trained";
        return refuse("lora.enable_lora", "false".into(), reason);
    }
    Ok(())
}
