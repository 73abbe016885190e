//! Memory of a rank at the peak of a step.
//!
//! What is there all the time, plus the larger of two moments: the loss over a chunk of logits, and the backward of
//! the last layer. Bytes that libtorch's kernels take for themselves and what the allocator does not give back are
//! not known here: [`LIBRARIES`] and the tests' tolerance stand for them.

use crate::{
    config,
    lora::LoraModule,
    model::{
        ModelSpec,
        blueprint::{Blueprint, Options},
        layer::LayerAdapterPlan,
    },
    shard::RegionLayout,
};
use std::ops::Range;

/// VmHWM of a rank that trains next to nothing under mpirun: libtorch, MPI, tokenizer (measured, CPU).
pub const LIBRARIES: usize = 165_000_000;

/// The largest micro-batch of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// All tokens.
    pub tokens: usize,
    /// Tokens of its longest document.
    pub longest: usize,
}

/// Bytes of a rank, by what they are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// This rank's pieces of the frozen base.
    pub base: usize,
    /// Layers, a vocabulary chunk and the final norm while they are whole.
    pub slots: usize,
    /// This rank's compute copy of the adapter, and the adapters of the whole layers.
    pub adapter: usize,
    /// fp32 masters and moments.
    pub optimizer: usize,
    /// fp32 gradients: this rank's piece, and where the whole is summed before it is reduced.
    pub gradients: usize,
    /// What forward keeps for backward.
    pub activations: usize,
    /// The larger of a chunk of logits and the backward of a layer.
    pub scratch: usize,
    pub libraries: usize,
}

impl Memory {
    /// Of a rank that trains `blueprint` of `spec` on micro-batches of at most `batch`.
    pub fn new(
        spec: &ModelSpec,
        blueprint: &Blueprint,
        options: &Options,
        optimizer: config::Optimizer,
        batch: MicroBatch,
    ) -> Self {
        let regions = &blueprint.regions;
        let shards = regions.final_norm.shards;
        let of = |layouts: &[RegionLayout]| Held::new(layouts);
        let (layers, vocab, adapter) = (of(&regions.layers), of(&regions.vocab), of(&regions.adapter));
        let whole_at_a_time = options.slots.clamp(1, regions.layers.len().max(1));
        let fp32 = |bytes: usize| bytes / options.compute.size() * size_of::<f32>();
        let moments = match optimizer {
            config::Optimizer::Adamw => 2,
            config::Optimizer::Sgd => 0,
        };
        let unreduced = match options.reduce {
            _ if shards == 1 => 0,
            config::ReduceGradients::Step => adapter.pieces * shards,
            config::ReduceGradients::MicroBatch => adapter.largest,
        };
        let ring = |slots: usize, largest: usize| if shards == 1 { 0 } else { slots * largest };
        let norm = regions.final_norm.padded;

        let kept = Kept::new(spec, blueprint, options, batch);
        Self {
            base: layers.pieces + vocab.pieces + regions.final_norm.piece_bytes(),
            slots: ring(whole_at_a_time, layers.largest) + ring(1, vocab.largest) + ring(1, norm),
            adapter: adapter.pieces + ring(whole_at_a_time, adapter.largest),
            optimizer: (1 + moments) * fp32(adapter.pieces),
            gradients: fp32(adapter.pieces + unreduced),
            activations: kept.all,
            scratch: loss_scratch(spec, options, batch).max(kept.again + layer_scratch(spec, options, batch)),
            libraries: LIBRARIES,
        }
    }

    /// What each part is for, and its bytes.
    pub fn parts(&self) -> [(&'static str, usize); 8] {
        [
            ("base shards", self.base),
            ("gathered layers and vocabulary", self.slots),
            ("adapter, gathered", self.adapter),
            ("adapter masters and moments", self.optimizer),
            ("adapter gradients", self.gradients),
            ("saved activations", self.activations),
            ("logits or layer scratch", self.scratch),
            ("libraries", self.libraries),
        ]
    }

    pub fn total(&self) -> usize {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Bytes of the regions of a ring.
struct Held {
    /// A rank's pieces.
    pieces: usize,
    /// The largest region, whole.
    largest: usize,
}

impl Held {
    fn new(layouts: &[RegionLayout]) -> Self {
        let pieces = layouts.iter().map(RegionLayout::piece_bytes).sum();
        Self { pieces, largest: layouts.iter().map(|layout| layout.padded).max().unwrap_or(0) }
    }
}

/// Bytes of what forward keeps; see [`block`](crate::model::block).
struct Kept {
    /// From forward until backward comes to it.
    all: usize,
    /// Of the layer that is computed again.
    again: usize,
}

impl Kept {
    fn new(spec: &ModelSpec, blueprint: &Blueprint, options: &Options, batch: MicroBatch) -> Self {
        let c = options.compute.size();
        let (query, key_value) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
        // q|k|v, attention's output and row sums, the middle, the first norm's statistics.
        let qk_norm =
            if spec.qk_norm { (query + key_value) * c + 4 * (spec.num_heads + spec.num_kv_heads) } else { 0 };
        let attention =
            (2 * query + 2 * key_value + spec.hidden_size) * c + 4 * (spec.num_heads + 1) + qk_norm;
        // gate|up, the second norm's statistics.
        let mlp = 2 * spec.intermediate_size * c + 4;
        let thin = |layer: &LayerAdapterPlan, linears: Range<usize>| {
            let modules = layer.modules[linears].iter().flatten();
            modules.map(|module| module.rank() * module.sites.len()).sum::<usize>() * c
        };
        let of_layers = |kept: bool, rest: usize, linears: Range<usize>| {
            let layers = blueprint.lora.iter().map(|layer| rest + thin(layer, linears.clone()));
            if kept { (layers.sum(), 0) } else { (0, layers.max().unwrap_or(0)) }
        };
        let attention = of_layers(options.checkpointing.keeps_attention(), attention, 0..2);
        let mlp = of_layers(options.checkpointing.keeps_mlp(), mlp, 2..4);
        // The embedding's output enters the first layer, the last one's leaves it.
        let inputs = (spec.num_layers + 1) * spec.hidden_size * c;
        Self {
            all: (inputs + attention.0 + mlp.0) * batch.tokens,
            again: (attention.1 + mlp.1) * batch.tokens,
        }
    }
}

/// The largest moment of the pass over the head: a chunk of logits beside the normalised hidden states, those that
/// carry loss, the sum over the vocabulary, the targets' rows, and the gradient; with several chunks of vocabulary the
/// sum is fp32.
fn loss_scratch(spec: &ModelSpec, options: &Options, batch: MicroBatch) -> usize {
    let c = options.compute.size();
    let rows = options.chunk_rows(spec.vocab_size);
    let logits = options.loss_chunk_tokens.min(batch.tokens) * rows * c;
    let sum = if rows < spec.vocab_size { 4 } else { 0 };
    logits + batch.tokens * spec.hidden_size * (5 * c + sum)
}

/// The largest moment of a layer besides what it keeps: SwiGLU's output beside the gradient that comes in and a
/// normalised input; and the tiles of attention, of each thread.
fn layer_scratch(spec: &ModelSpec, options: &Options, batch: MicroBatch) -> usize {
    let c = options.compute.size();
    let tiles = batch.longest * spec.head_dim * (3 * c + 2 * 4);
    (spec.intermediate_size + 2 * spec.hidden_size) * c * batch.tokens + tiles
}
