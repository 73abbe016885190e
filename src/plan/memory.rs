//! Memory of a rank at the peak of a step.
//!
//! The sum of all that lives through the step and the larger of two moments: the loss over a chunk of logits, and the
//! backward of the last layer. Temporaries of libtorch's kernels and blocks that the allocator keeps are not modelled:
//! [`LIBRARIES`] and the tests' tolerance cover them.

use super::adapter::{AdapterMemory, Held};
use crate::{
    lora::AdapterPlan,
    loss::HOST_ROWS,
    model::{
        ModelSpec,
        base_plan::{BasePlan, Options},
        declare::ProjectionId,
        sublayer::CostSizes,
    },
    optim::Settings,
    shard::RegionLayout,
};

pub use crate::model::sublayer::MicroBatch;

/// VmHWM of a rank that trains next to nothing under mpirun: libtorch, MPI, tokenizer (measured, CPU).
pub const LIBRARIES: usize = 165_000_000;

/// Bytes of a rank by purpose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// This rank's pieces of the frozen base.
    pub base: usize,
    /// Slots of layers, a vocabulary chunk and the final norm.
    pub slots: usize,
    /// This rank's compute copy of the adapter, and the slots of adapters.
    pub adapter: usize,
    /// fp32 masters, and the optimizer's state.
    pub optimizer: usize,
    /// fp32 gradients: this rank's piece, and the full sums before they are reduced.
    pub gradients: usize,
    /// Tensors kept for backward.
    pub activations: usize,
    /// The larger of a chunk of logits and the backward of a layer.
    pub scratch: usize,
    /// The same on a device, which computes more rows of the head at a time, and all experts of a layer in one GEMM.
    pub device_scratch: usize,
    pub libraries: usize,
    /// Copies that a save of a run makes on the host, beside all that, while training goes on.
    pub save: usize,
}

impl Memory {
    /// Memory of a rank that trains `adapter` on `base` of `spec` on micro-batches of at most `batch`.
    pub fn new(
        spec: &ModelSpec,
        base: &BasePlan,
        adapter: &AdapterPlan,
        options: &Options,
        optimizer: &Settings,
        batch: MicroBatch,
    ) -> Self {
        let regions = &base.regions;
        let kept = Kept::new(spec, base, adapter, options, batch);
        let [layer, on_device] =
            [false, true].map(|at_once| kept.again + layer_scratch(spec, base, options, batch, at_once));
        let base = [&regions.layers, &regions.experts].map(|layouts| Held::new(layouts));
        let adapter = AdapterMemory::new(adapter, options, optimizer);
        let [vocab, norm] = [&regions.vocab[..], std::slice::from_ref(&regions.final_norm)].map(Held::new);
        let slots_used = options.slots.clamp(1, regions.layers.len().max(1));
        let pieces = |held: &[Held]| held.iter().map(|held| held.pieces).sum::<usize>();
        let whole = |held: &[Held]| held.iter().map(|held| held.in_slots(slots_used)).sum::<usize>();
        let scratch = |rows, layer| loss_scratch(spec, options, batch, rows).max(layer);
        Self {
            base: pieces(&base) + vocab.pieces + norm.pieces,
            slots: whole(&base) + vocab.in_slots(1) + norm.in_slots(1),
            adapter: adapter.copies + adapter.slots,
            optimizer: adapter.optimizer,
            gradients: adapter.gradients,
            activations: kept.all,
            scratch: scratch(HOST_ROWS as usize, layer),
            device_scratch: scratch(usize::MAX, on_device),
            libraries: LIBRARIES,
            save: adapter.save_async,
        }
    }

    /// Names and bytes of the parts.
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

    /// Bytes that a pass takes on the host, beside the base and what adapters hold.
    pub fn pass(&self) -> usize {
        self.slots + self.activations + self.scratch
    }

    /// The same on a device, whose slots exist once the base is there.
    pub fn pass_on_device(&self) -> usize {
        self.activations + self.device_scratch
    }

    /// Bytes on the rank's device, for a device that is not the host.
    pub fn on_device(&self) -> usize {
        self.total() - self.libraries - self.scratch + self.device_scratch
    }

    pub fn total(&self) -> usize {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// Bytes that forward keeps for backward, as the layers' halves state them.
struct Kept {
    /// From forward until backward of the layer.
    all: usize,
    /// In the one layer that is computed again.
    again: usize,
}

impl Kept {
    fn new(
        spec: &ModelSpec,
        base: &BasePlan,
        adapter: &AdapterPlan,
        options: &Options,
        batch: MicroBatch,
    ) -> Self {
        let c = options.compute.size();
        let shards = |layouts: &[RegionLayout]| layouts.first().map_or(1, |layout| layout.shards);
        let experts_elsewhere = shards(&base.regions.layers) > shards(&base.regions.experts);
        let (mut all, mut mixer_again, mut ffn_again) = (0, 0, 0);
        for (i, (layer, adapter)) in base.layers.iter().zip(&adapter.layers).enumerate() {
            let method = options.checkpointing.of(i);
            let lora_ranks =
                |id: ProjectionId| adapter.modules[id.index()].as_ref().map_or(0, |module| module.ranks());
            let sizes = CostSizes { element: c, lora_ranks: &lora_ranks, experts_elsewhere };
            // u, the input of the second half, is kept with the mixer.
            let mixer = layer.mixer.kept_bytes(&sizes) + spec.hidden_size * c;
            let ffn = layer.ffn.kept_bytes(&sizes);
            if method.keeps_attention() {
                all += mixer;
            } else {
                all += layer.mixer.replay_bytes();
                mixer_again = mixer.max(mixer_again);
            }
            if method.keeps_mlp() {
                all += ffn;
            } else {
                all += layer.ffn.replay_bytes();
                ffn_again = ffn.max(ffn_again);
            }
        }
        // The input of each layer and the output of the last.
        let inputs = (base.layers.len() + 1) * spec.hidden_size * c;
        Self { all: (inputs + all) * batch.tokens, again: (mixer_again + ffn_again) * batch.tokens }
    }
}

/// The largest moment of the pass over the head, which computes at most `most` rows at a time: a chunk of logits beside
/// the normalised hidden states, those that carry loss, the sum over the vocabulary, the targets' rows, and the
/// gradient. With several chunks of vocabulary the sum is fp32.
fn loss_scratch(spec: &ModelSpec, options: &Options, batch: MicroBatch, most: usize) -> usize {
    let c = options.compute.size();
    let rows = options.chunk_rows(spec.vocab_size).min(most);
    let logits = options.loss_chunk_tokens.min(batch.tokens) * rows * c;
    let sum = if rows < spec.vocab_size { 4 } else { 0 };
    logits + batch.tokens * spec.hidden_size * (5 * c + sum)
}

/// The largest moment of a layer besides what it keeps: the temporaries of one half beside the gradient of the output
/// and a normalised input. Experts may be computed `at_once`.
fn layer_scratch(
    spec: &ModelSpec,
    base: &BasePlan,
    options: &Options,
    batch: MicroBatch,
    at_once: bool,
) -> usize {
    let c = options.compute.size();
    let halves = base.layers.iter().flat_map(|layer| [&layer.mixer, &layer.ffn]);
    let half = halves.map(|half| half.scratch_bytes(c, batch)).max();
    // The packed matrices of a projection, or of one or all of its experts, decoded.
    let decoded = base.layers.iter().map(|layer| layer.decoded_elements(at_once)).max();
    half.unwrap_or(0) + 2 * spec.hidden_size * c * batch.tokens + decoded.unwrap_or(0) * c
}
