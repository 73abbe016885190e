//! Memory of one adapter on a rank, as a run holds one and a server many.

use crate::{
    config, dtype::DType, lora::AdapterPlan, model::base_plan::Options, optim::Settings, shard::RegionLayout,
};

/// Bytes of a rank that an adapter takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterMemory {
    /// The compute copies of this rank's pieces.
    pub copies: usize,
    /// The slots into which layers are gathered.
    pub slots: usize,
    /// fp32 masters, and the optimizer's state.
    pub optimizer: usize,
    /// fp32 gradients: this rank's pieces, and the full sums before they are reduced.
    pub gradients: usize,
    /// Copies that a save makes on the host, beside all that.
    pub save: usize,
    /// The same of a save that training does not wait for.
    pub save_async: usize,
}

impl AdapterMemory {
    /// Memory of `adapter`, computed with `options` and updated by `optimizer`.
    pub fn new(adapter: &AdapterPlan, options: &Options, optimizer: &Settings) -> Self {
        let regions = [&adapter.dense, &adapter.experts].map(|layouts| Held::new(layouts));
        let slots = options.slots.clamp(1, adapter.dense.len().max(1));
        let size = adapter.copies().size();
        let fp32 = |bytes: usize| bytes / size * DType::F32.size();
        let copies = regions.iter().map(|region| region.pieces).sum::<usize>();
        let unreduced = |held: &Held| match options.reduce {
            _ if held.shards == 1 => 0,
            config::ReduceGradients::Step => held.pieces * held.shards,
            config::ReduceGradients::MicroBatch => held.largest,
        };
        let elements = copies / size;
        // Files hold all of it in fp32.
        let stored = (1 + optimizer.rule().state_names().len()) * fp32(copies);
        // A rank's pieces are copied, then serialised. Before that rank 0 does the same with the whole adapter, where
        // experts are put together once more. If training goes on, both are copied first.
        let of_experts = fp32(regions[1].pieces);
        let whole = (fp32(copies) + of_experts / 2) * regions[0].shards;
        Self {
            copies,
            slots: regions.iter().map(|region| region.in_slots(slots)).sum(),
            optimizer: fp32(copies) + elements * optimizer.state_bytes(),
            gradients: fp32(copies + regions.iter().map(unreduced).sum::<usize>()),
            save: 2 * stored.max(whole),
            save_async: stored + whole + stored.max(whole),
        }
    }

    /// Bytes as long as the adapter is in memory.
    pub fn held(&self) -> usize {
        self.copies + self.slots + self.optimizer + self.gradients
    }

    /// The same of one that is not trained.
    pub fn frozen(&self) -> usize {
        self.copies + self.slots
    }
}

/// Bytes of the files of a server's save of `adapter`, all ranks together, about: the whole adapter in fp32, and with
/// training state masters, the state of `optimizer` and, if passes have `accumulated`, gradients.
pub fn save_bytes(
    adapter: &AdapterPlan,
    optimizer: &Settings,
    training_state: bool,
    accumulated: bool,
) -> usize {
    /// Headers, configuration and manifest.
    const TEXT: usize = 64 << 10;
    let parameters = adapter.layers.iter().flat_map(|layer| layer.parameters());
    let values: usize = parameters.map(|parameter| parameter.shape.iter().product::<usize>()).sum();
    let moments = optimizer.rule().state_names().len();
    let state = if training_state { 1 + moments + usize::from(accumulated) } else { 0 };
    TEXT + values * DType::F32.size() * (1 + state)
}

/// Bytes of the regions of a slot pool.
pub(super) struct Held {
    /// Pieces of a rank.
    pub pieces: usize,
    /// The largest gathered region.
    pub largest: usize,
    /// Ranks that the regions are cut over.
    pub shards: usize,
}

impl Held {
    pub fn new(layouts: &[RegionLayout]) -> Self {
        let pieces = layouts.iter().map(RegionLayout::piece_bytes).sum();
        let largest = layouts.iter().map(|layout| layout.padded).max().unwrap_or(0);
        Self { pieces, largest, shards: layouts.first().map_or(1, |layout| layout.shards) }
    }

    /// Bytes of `slots` slots; a single rank has none.
    pub fn in_slots(&self, slots: usize) -> usize {
        if self.shards == 1 { 0 } else { slots * self.largest }
    }
}
