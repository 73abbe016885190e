//! Memory of a rank at the peak of a step.
//!
//! What is there all the time, plus the larger of two moments: the loss over a chunk of logits, and the backward of
//! the last layer. Bytes that libtorch's kernels take for themselves and what the allocator does not give back are
//! not known here: [`LIBRARIES`] and the tests' tolerance stand for them.

use crate::{
    config,
    lora::{AdapterPlan, LayerAdapterPlan},
    loss::HOST_ROWS,
    model::{
        ModelSpec, QkNorm,
        base_plan::{BasePlan, Options, Regions},
    },
    optim,
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
    /// The same on a device, which takes in more of the head at a time.
    pub device_scratch: usize,
    pub libraries: usize,
}

impl Memory {
    /// Of a rank that trains `adapter` on `base` of `spec` on micro-batches of at most `batch`.
    pub fn new(
        spec: &ModelSpec,
        base: &BasePlan,
        adapter: &AdapterPlan,
        options: &Options,
        optimizer: config::Optimizer,
        batch: MicroBatch,
    ) -> Self {
        let regions = &base.regions;
        let kept = Kept::new(spec, regions, adapter, options, batch);
        let base = [&regions.layers, &regions.experts].map(|layouts| Held::new(layouts));
        let adapters = [&adapter.dense, &adapter.experts].map(|layouts| Held::new(layouts));
        let [vocab, norm] = [&regions.vocab[..], std::slice::from_ref(&regions.final_norm)].map(Held::new);
        let whole_at_a_time = options.slots.clamp(1, regions.layers.len().max(1));
        let fp32 = |bytes: usize| bytes / options.compute.size() * size_of::<f32>();
        let pieces = |held: &[Held]| held.iter().map(|held| held.pieces).sum::<usize>();
        let whole = |held: &[Held]| held.iter().map(|held| held.in_slots(whole_at_a_time)).sum::<usize>();
        let moments = optim::state_names(optimizer).len();
        let unreduced = |held: &Held| match options.reduce {
            _ if held.shards == 1 => 0,
            config::ReduceGradients::Step => held.pieces * held.shards,
            config::ReduceGradients::MicroBatch => held.largest,
        };
        let gradients = pieces(&adapters) + adapters.iter().map(unreduced).sum::<usize>();

        let layer = kept.again + layer_scratch(spec, options, batch);
        let scratch = |rows| loss_scratch(spec, options, batch, rows).max(layer);
        Self {
            base: pieces(&base) + vocab.pieces + norm.pieces,
            slots: whole(&base) + vocab.in_slots(1) + norm.in_slots(1),
            adapter: pieces(&adapters) + whole(&adapters),
            optimizer: (1 + moments) * fp32(pieces(&adapters)),
            gradients: fp32(gradients),
            activations: kept.all,
            scratch: scratch(HOST_ROWS as usize),
            device_scratch: scratch(usize::MAX),
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

    /// What of it is on the rank's device, where that is not the host.
    pub fn on_device(&self) -> usize {
        self.total() - self.libraries - self.scratch + self.device_scratch
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
    /// Ranks that they are cut over.
    shards: usize,
}

impl Held {
    fn new(layouts: &[RegionLayout]) -> Self {
        let pieces = layouts.iter().map(RegionLayout::piece_bytes).sum();
        let largest = layouts.iter().map(|layout| layout.padded).max().unwrap_or(0);
        Self { pieces, largest, shards: layouts.first().map_or(1, |layout| layout.shards) }
    }

    /// Of `slots` slots, which a lone rank does not need.
    fn in_slots(&self, slots: usize) -> usize {
        if self.shards == 1 { 0 } else { slots * self.largest }
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
    fn new(
        spec: &ModelSpec,
        regions: &Regions,
        adapter: &AdapterPlan,
        options: &Options,
        batch: MicroBatch,
    ) -> Self {
        let c = options.compute.size();
        // Of rows that come from other ranks those of x are kept too.
        let Regions { layers, experts, .. } = regions;
        let shards = |layouts: &[RegionLayout]| layouts.first().map_or(1, |layout| layout.shards);
        let travels = shards(layers) > shards(experts);
        let layers = || adapter.layers.iter().enumerate();
        let of_layers = |kept: bool, of: fn(&ModelSpec, usize, &LayerAdapterPlan, usize) -> usize| {
            let layers = layers().map(|(layer, plan)| of(spec, layer, plan, c));
            if kept { (layers.sum(), 0) } else { (0, layers.max().unwrap_or(0)) }
        };
        let keeps_mlp = options.checkpointing.keeps_mlp();
        let attention = of_layers(options.checkpointing.keeps_attention(), kept_of_attention);
        let mlp = of_layers(keeps_mlp, if travels { kept_of_mlp_and_rows } else { kept_of_mlp });
        // The embedding's output enters the first layer, the last one's leaves it.
        let inputs = (spec.num_layers + 1) * spec.hidden_size * c;
        // What a router chose is kept in any case.
        let chosen =
            layers().filter_map(|(layer, _)| spec.moe_of(layer)).map(|moe| 8 * moe.top_k).sum::<usize>();
        let chosen = if keeps_mlp { 0 } else { chosen };
        Self {
            all: (inputs + chosen + attention.0 + mlp.0) * batch.tokens,
            again: (attention.1 + mlp.1) * batch.tokens,
        }
    }
}

/// Bytes a token of the thin LoRA activations of some projections.
fn lora_hidden(plan: &LayerAdapterPlan, projections: Range<usize>, c: usize) -> usize {
    let modules = plan.modules.iter().take(projections.end).skip(projections.start).flatten();
    modules.map(|module| module.ranks()).sum::<usize>() * c
}

/// Bytes a token: q|k|v, attention's output and row sums, the middle, the first norm's statistics, q|k before its norm,
/// where it was cut off.
fn kept_of_attention(spec: &ModelSpec, _layer: usize, plan: &LayerAdapterPlan, c: usize) -> usize {
    let (query, key_value) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
    let statistics = match spec.qk_norm {
        None => None,
        Some(QkNorm::Head) => Some(spec.num_heads + spec.num_kv_heads),
        Some(QkNorm::All) => Some(2),
    };
    let qk_norm = statistics.map_or(0, |count| (query + key_value) * c + 4 * count);
    let clipped = if spec.clip_qkv.is_some() { query + 2 * key_value } else { 0 };
    let rest = (2 * query + 2 * key_value + spec.hidden_size) * c + 4 * (spec.num_heads + 1);
    rest + qk_norm + clipped + lora_hidden(plan, 0..2, c)
}

/// The same where experts are divided over ranks: as many rows come as go, if the routers choose evenly.
fn kept_of_mlp_and_rows(spec: &ModelSpec, layer: usize, plan: &LayerAdapterPlan, c: usize) -> usize {
    let rows = spec.moe_of(layer).map_or(0, |moe| moe.top_k * spec.hidden_size * c);
    kept_of_mlp(spec, layer, plan, c) + rows
}

/// Bytes a token: gate|up, the second norm's statistics; of experts a row each with its scale, which row is whose, and
/// all that the router computed. The rows that fill up an expert's slice are not known before and not counted.
fn kept_of_mlp(spec: &ModelSpec, layer: usize, plan: &LayerAdapterPlan, c: usize) -> usize {
    let gated = |width: usize, projections| 2 * width * c + lora_hidden(plan, projections, c);
    let Some(moe) = spec.moe_of(layer) else { return 4 + gated(spec.intermediate_size, 2..4) };
    let row = gated(moe.width, 2..4) + 4 + 3 * 8;
    let router = moe.top_k * (8 + 4) + 4 * moe.experts;
    let shared = moe.shared_width.map_or(0, |width| 4 + gated(width, 4..6));
    4 + moe.top_k * row + router + shared
}

/// The largest moment of the pass over the head, of which at most `most` rows are taken in at a time: a chunk of logits
/// beside the normalised hidden states, those that carry loss, the sum over the vocabulary, the targets' rows, and the
/// gradient; with several chunks of vocabulary the sum is fp32.
fn loss_scratch(spec: &ModelSpec, options: &Options, batch: MicroBatch, most: usize) -> usize {
    let c = options.compute.size();
    let rows = options.chunk_rows(spec.vocab_size).min(most);
    let logits = options.loss_chunk_tokens.min(batch.tokens) * rows * c;
    let sum = if rows < spec.vocab_size { 4 } else { 0 };
    logits + batch.tokens * spec.hidden_size * (5 * c + sum)
}

/// The largest moment of a layer besides what it keeps: SwiGLU's output beside the gradient that comes in and a
/// normalised input, with experts once more for the rows of each of theirs; and the tiles of attention, of each thread.
fn layer_scratch(spec: &ModelSpec, options: &Options, batch: MicroBatch) -> usize {
    let c = options.compute.size();
    let tiles = batch.longest * spec.head_dim * (3 * c + 2 * 4);
    let hidden = 2 * spec.hidden_size;
    let token = |layer| match spec.moe_of(layer) {
        None => spec.intermediate_size + hidden,
        Some(moe) => hidden + (moe.top_k * (moe.width + hidden)).max(moe.shared_width.unwrap_or(0)),
    };
    (0..spec.num_layers).map(token).max().unwrap_or(0) * c * batch.tokens + tiles
}
