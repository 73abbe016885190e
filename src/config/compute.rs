//! Fields that a run and a server share: the mesh, precision, memory and recomputation.

use super::error::Problem;
use super::section::section;
use super::value::choices;

choices! {
    /// Time at which adapter gradients are reduced over the ranks.
    pub enum ReduceGradients {
        /// Once, after the last micro-batch: full fp32 gradients are kept until then.
        Step = "step",
        /// After every unit's backward: only the shard is kept.
        MicroBatch = "micro_batch",
    }

    /// Choice of activations that are saved for backward; the others are recomputed.
    pub enum CheckpointingMethod {
        /// The least recompute that the free memory allows.
        Auto = "auto",
        /// Only the input of a layer is saved.
        RecomputeFullLayer = "recompute_full_layer",
        /// All but the MLP's wide activations is saved: those cost most bytes for the time that they save.
        Selective = "selective",
        /// Everything that backward needs is saved.
        NoRecompute = "no_recompute",
    }
}

impl CheckpointingMethod {
    /// True if the attention block's activations are kept.
    pub fn keeps_attention(self) -> bool {
        matches!(self, Self::Selective | Self::NoRecompute)
    }

    /// True if the MLP's activations are kept.
    pub fn keeps_mlp(self) -> bool {
        self == Self::NoRecompute
    }
}

section! {
    /// The mesh of the ranks, and how they compute; none of it changes the result beyond rounding.
    pub struct ComputeArgs {
        /// Copies of the sharded base. -1: the ranks that are left (1 if the shard size is -1 too).
        data_parallel_replicate_size: i64 = -1 => SizeOrRest;
        /// Ranks over which a copy of the base is sharded. -1: the ranks that are left.
        data_parallel_shard_size: i64 = -1 => SizeOrRest;
        /// Ranks that share a sequence. Only 1 is built.
        ulysses_parallel_size: usize = 1 => OneOrMore;
        /// Ranks that divide the experts of a layer; tokens are dispatched to them. It divides the ranks of a copy of
        /// the base, and the experts. 1: experts are sharded and gathered like the rest.
        expert_parallel_size: usize = 1 => OneOrMore;
        /// Compute in bf16; masters, moments, reductions and loss stay fp32. false: all in fp32.
        enable_mixed_precision: bool = true;
        /// Recompute activations in backward, as `gradient_checkpointing_method` says.
        enable_gradient_checkpointing: bool = true;
        /// `recompute_full_layer` keeps the input of each layer, `selective` also the activations of attention but not
        /// the MLP's wide ones, `no_recompute` everything that backward needs. `auto`: the least recompute, layer by
        /// layer, whose plan fits the memory that is free for each rank; a server keeps three quarters of the rest for
        /// adapters and sampling. Losses are the same to the bit.
        gradient_checkpointing_method: CheckpointingMethod = CheckpointingMethod::Auto;
        /// Free a layer's gathered weights after its forward and gather them again for backward. null: true.
        /// false: every layer is gathered once and stays.
        reshard_after_forward: bool = true => NullIsTrue;
        /// Layers that are whole on a rank at a time. With 2 the next is gathered while one computes.
        ring_slots: usize = 2 => OneOrMore;
        /// Reduce adapter gradients once a `step` (less traffic) or after each `micro_batch` (less memory). The same
        /// where a step is one micro-batch.
        reduce_gradients: ReduceGradients = ReduceGradients::Step;
        /// Rows of the embedding and the head gathered at a time. null: as many as 512 MiB hold.
        vocab_chunk_rows: Option<usize> = None => OneOrMore;
        /// Tokens per logits chunk.
        loss_chunk_tokens: usize = 1024 => OneOrMore;
    }
}

impl ComputeArgs {
    /// The activations that are saved for backward.
    pub fn checkpointing(&self) -> CheckpointingMethod {
        if self.enable_gradient_checkpointing {
            self.gradient_checkpointing_method
        } else {
            CheckpointingMethod::NoRecompute
        }
    }

    /// The problem of `ulysses_parallel_size`, if it asks for what is not built.
    pub(super) fn sequence_problem(&self) -> Option<Problem> {
        let reason = "sequence parallelism is not built; leave it at 1";
        let value = self.ulysses_parallel_size;
        (value > 1).then(|| Problem::Refused { value: value.to_string(), reason })
    }
}
