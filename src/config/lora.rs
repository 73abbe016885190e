//! Section `lora`.

use super::error::Problem;
use super::section::section;
use super::value::choices;
use serde_json::{Map, Value as Json};
use std::path::PathBuf;

choices! {
    /// Format of routed experts' adapters in checkpoints.
    pub enum ExportFormat {
        /// PEFT's, on transformers' fused experts.
        Peft = "peft",
        /// One A and B for each expert.
        PerExpert = "per_expert",
        /// Stacked, with shared factors once.
        SglangSharedOuter = "sglang_shared_outer",
    }
}

section! {
    /// Section `lora`: the adapter. Nothing else is trained.
    pub struct LoraArgs {
        /// Must stay true: the base is frozen by design.
        enable_lora: bool = true;
        /// Rank r of A and B.
        lora_rank: usize = 16 => Size;
        /// The adapter's output is scaled by lora_alpha / lora_rank.
        lora_alpha: f64 = 32.0 => Positive;
        /// Scale by lora_alpha / √lora_rank instead (rank-stabilized LoRA).
        use_rslora: bool = false;
        /// Ranks of single modules, by regular expressions over whole names or their ends, as PEFT's rank_pattern:
        /// `{v_proj: 8, "layers\\.[0-3]\\..*q_proj": 32}`. The first that matches counts; one that matches nothing is
        /// an error.
        rank_pattern: Map<String, Json> = Map::new() => Size;
        /// Alphas of single modules, in the same way, as PEFT's alpha_pattern.
        alpha_pattern: Map<String, Json> = Map::new() => Positive;
        /// Leaf names (`q_proj`, `qkv_proj`), globs over dotted paths (`layers.[0-7].*.q_proj`), or
        /// `all-linear`. null: the default of the model's family. A target that matches nothing is an error.
        lora_target_modules: Option<Vec<String>> = None => NonEmpty;
        /// Standard deviation that B starts with. 0: B starts at zero, so training starts at the base model.
        lora_b_init_std: f64 = 0.0 => NonNegative;
        /// Experts share the A of gate_proj, up_proj and gate_up_proj, and the B of down_proj; the other factor is each
        /// expert's own.
        moe_hybrid_shared_lora: bool = false;
        /// Compute q, k, v and gate, up as separate GEMMs. Results and adapter keys stay the same.
        unfuse_for_lora: bool = false;
        /// Checkpoints hold the adapter, not the base model. false: the base too, in `model/`, hard-linked where
        /// possible.
        save_lora_only: bool = true;
        /// Format of routed experts' adapters in checkpoints: `peft` for PEFT's target_parameters, `per_expert` with an
        /// A and B for each expert, `sglang_shared_outer` stacked, which needs moe_hybrid_shared_lora. All else is the
        /// same.
        lora_export_format: ExportFormat = ExportFormat::Peft;
        /// Steps between merges (ReLoRA): after every so many the adapter is added to the base, and a fresh one is
        /// trained on it. Checkpoints from then on hold the changed base in `model/`. 0: never.
        merge_lora_interval: usize = 0;
        /// The optimizer starts anew at each merge, and the learning rate rises again over merge_warmup_steps.
        reset_optimizer_on_merge: bool = false;
        /// Steps after a merge over which the learning rate rises in a line from near 0 to its schedule. Needs
        /// reset_optimizer_on_merge.
        merge_warmup_steps: usize = 0;
        /// Merge after the last step, too, so that its `model/` is the result.
        merge_at_end: bool = false;
        /// An adapter directory to start from, in any of these formats, with a fresh optimizer. A resume does not read
        /// it.
        adapter_path: Option<PathBuf> = None;
    }
}

/// The problem of targets that are no projections of layers.
pub(super) fn targets_problem(targets: Option<&[String]>) -> Option<Problem> {
    let of_vocabulary = |name: &&String| ["lm_head", "embed_tokens"].iter().any(|end| name.ends_with(end));
    let name = targets.unwrap_or_default().iter().find(of_vocabulary)?;
    let reason =
        "embedding and head are frozen; name projections of layers (q_proj, down_proj) or all-linear";
    Some(Problem::Refused { value: name.clone(), reason })
}

/// The problem of `enable_lora`, if it is false.
pub(super) fn enabled_problem(enabled: bool) -> Option<Problem> {
    let reason = "the base is frozen by design, so nothing would be trained";
    (!enabled).then(|| Problem::Refused { value: "false".into(), reason })
}
