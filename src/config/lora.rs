//! Section `lora`.

use super::error::Problem;
use super::section::section;
use super::value::{Value, choices};
use serde_json::{Map, Value as Json};
use std::path::PathBuf;

choices! {
    /// Format of a quantised base. One scale for each block of weights.
    pub enum QuantFormat {
        /// 4-bit NormalFloat of bitsandbytes: blocks of 64 with an fp32 scale.
        Nf4 = "nf4",
        /// 8-bit floats (e4m3) in blocks of 128 × 128 with an fp32 scale.
        BlockFp8 = "block_fp8",
        /// 4-bit floats (e2m1) in blocks of 16 with an 8-bit scale, and an fp32 scale of the matrix.
        Nvfp4 = "nvfp4",
    }

    /// Values that A and B start with.
    pub enum InitLoraWeights {
        /// Random A, and B of `lora_b_init_std`.
        Default = "default",
        /// The first singular vectors of each matrix.
        Pissa = "pissa",
    }

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
    /// Storage of the frozen base, of a run and a server.
    pub struct QuantArgs {
        /// Quantise the linear layers of decoder layers while they are loaded (QLoRA). Packed weights are what ranks
        /// store and send. Embedding, head, norms and routers stay as they are.
        enable_qlora: bool = false;
        /// Format of quantised weights: `nf4` as bitsandbytes has it, `block_fp8` with 8 bits, `nvfp4` with 4 bits and
        /// two levels of scales.
        quant_format: QuantFormat = QuantFormat::Nvfp4;
        /// Weights that share a scale; null: 64 for nf4, 128 (by 128) for block_fp8, 16 for nvfp4. No format has
        /// another.
        quant_group_size: Option<usize> = None => OneOrMore;
    }
}

section! {
    /// Adaptive quantisation noise of a run.
    pub struct NoiseArgs {
        /// Add noise to quantised weights in every training step (adaptive quantisation noise): N(0, 1) · aqn_alpha ·
        /// step, with half the smallest step of a block's codes (nf4, nvfp4) or an eighth of its scale (block_fp8).
        /// Needs enable_qlora.
        enable_aqn: bool = false;
        /// Factor of the noise. 0: none.
        aqn_alpha: f64 = 1.0 => NonNegative;
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
        /// Train a magnitude of each output beside A and B: its row of W + ΔW is scaled to it (DoRA), as PEFT has it.
        /// On dense projections. Such an adapter is gathered in fp32, as magnitudes change by less than bf16 can show.
        /// Each backward computes the layer's forward once more.
        use_dora: bool = false;
        /// Ranks of single modules, by regular expressions over whole names or their ends, as PEFT's rank_pattern:
        /// `{v_proj: 8, "layers\\.[0-3]\\..*q_proj": 32}`. The first that matches counts; one that matches nothing is
        /// an error.
        rank_pattern: Map<String, Json> = Map::new() => Size;
        /// Alphas of single modules, in the same way, as PEFT's alpha_pattern.
        alpha_pattern: Map<String, Json> = Map::new() => Positive;
        /// Share of the elements of an adapter's input that become 0 in training, as PEFT has it; the others are scaled
        /// by 1 / (1 - lora_dropout). The same in any topology. Routed experts have none, so with them it must be 0.
        lora_dropout: f64 = 0.0 => BelowOne;
        /// Leaf names (`q_proj`, `qkv_proj`), globs over dotted paths (`layers.[0-7].*.q_proj`), or
        /// `all-linear`. null: the default of the model's family. A target that matches nothing is an error.
        lora_target_modules: Option<Vec<String>> = None => NonEmpty;
        /// Values that A and B start with. `default`: random A, and B of lora_b_init_std. `pissa`: the first singular
        /// vectors of each matrix of the base, which the base lacks in training (PiSSA). Checkpoints then hold what
        /// training has changed, as an adapter of twice the rank that belongs to the base as it is. Not for quantised
        /// bases, merges during training, and routed experts.
        init_lora_weights: InitLoraWeights = InitLoraWeights::Default;
        /// Standard deviation that B starts with. 0: B starts at zero, so training starts at the base model.
        lora_b_init_std: f64 = 0.0 => NonNegative;
        /// Experts share the A of gate_proj, up_proj and gate_up_proj, and the B of down_proj; the other factor is each
        /// expert's own.
        moe_hybrid_shared_lora: bool = false;
        /// Compute q, k, v and gate, up as separate GEMMs. Results and adapter keys stay the same.
        unfuse_for_lora: bool = false;
        ..quant: QuantArgs;
        /// Linear layers that are not quantised, named as in `lora_target_modules`.
        exclude_modules: Option<Vec<String>> = None;
        ..noise: NoiseArgs;
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

impl QuantFormat {
    /// Weights that share a scale (of a row, where blocks have several rows).
    pub fn group_size(self) -> usize {
        match self {
            Self::Nf4 => 64,
            Self::BlockFp8 => 128,
            Self::Nvfp4 => 16,
        }
    }
}

impl NoiseArgs {
    /// The factor of the noise, if there is any.
    pub fn alpha(&self) -> Option<f64> {
        Some(self.aqn_alpha).filter(|&alpha| self.enable_aqn && alpha > 0.0)
    }
}

impl QuantArgs {
    /// The format of the base, if it is quantised.
    pub fn format(&self) -> Option<QuantFormat> {
        self.enable_qlora.then_some(self.quant_format)
    }

    /// The problem of a group size that the format does not have.
    pub(super) fn group_problem(&self) -> Option<Problem> {
        let only = self.quant_format.group_size();
        let given = self.quant_group_size.filter(|&size| size != only)?;
        let format = self.quant_format.write();
        Some(Problem::Conflict(format!(
            "{given} is no group size of {format}, which has {only}; leave it out"
        )))
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
    let reason = "the base is frozen by design, so nothing would be trained; leave it out";
    (!enabled).then(|| Problem::Refused { value: "false".into(), reason })
}
