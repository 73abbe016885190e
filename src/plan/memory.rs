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
    /// With recompute: of the layer that is computed again.
    again: usize,
}

impl Kept {
    fn new(spec: &ModelSpec, blueprint: &Blueprint, options: &Options, batch: MicroBatch) -> Self {
        let c = options.compute.size();
        let (query, key_value) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
        let input = spec.hidden_size * c;
        // Besides the input: q|k|v, attention's output and row sums, the middle, gate|up, two norms' statistics.
        let widths = 2 * query + 2 * key_value + spec.hidden_size + 2 * spec.intermediate_size;
        let qk_norm =
            if spec.qk_norm { (query + key_value) * c + 4 * (spec.num_heads + spec.num_kv_heads) } else { 0 };
        let rest = widths * c + 4 * (spec.num_heads + 2) + qk_norm;
        let thin = |layer: &LayerAdapterPlan| {
            layer.modules.iter().flatten().map(|module| module.rank() * module.sites.len()).sum::<usize>() * c
        };
        let of_layer = blueprint.lora.iter().map(|layer| rest + thin(layer));
        // The embedding's output enters the first layer, the last one's leaves it.
        let inputs = (spec.num_layers + 1) * input;
        let (all, again) = if options.recompute {
            (inputs, of_layer.max().unwrap_or(0))
        } else {
            (inputs + of_layer.sum::<usize>(), 0)
        };
        Self { all: all * batch.tokens, again: again * batch.tokens }
    }
}

/// The largest moment of the pass over the head: a chunk of logits in fp32 and in compute dtype, beside hidden
/// states, their running gradient and the targets' rows.
fn loss_scratch(spec: &ModelSpec, options: &Options, batch: MicroBatch) -> usize {
    let c = options.compute.size();
    let rows = options.chunk_rows(spec.vocab_size);
    let tokens = options.loss_chunk_tokens.min(batch.tokens);
    let logits = tokens * rows * (4 + if c == 4 { 0 } else { c });
    logits + batch.tokens * spec.hidden_size * (3 * c + 4)
}

/// The largest moment of a layer's backward: the slope of SwiGLU, in fp32, beside its input and output gradients;
/// and the mask of a window where one is shorter than a document.
fn layer_scratch(spec: &ModelSpec, options: &Options, batch: MicroBatch) -> usize {
    let (c, wide) = (options.compute.size(), spec.intermediate_size);
    // What is fp32 already is not copied to fp32.
    let temporaries = if c == 4 { 5 } else { 8 };
    let swiglu = (4 * temporaries + 3 * c) * wide + 2 * c * spec.hidden_size;
    let windowed = spec.layer_windows.iter().flatten().any(|&window| window < batch.longest);
    let mask = if windowed { batch.longest * batch.longest * (8 + 3 + 2 * c) } else { 0 };
    (swiglu * batch.tokens).max(mask)
}
