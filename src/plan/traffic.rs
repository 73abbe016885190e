//! Bytes that a rank receives in a step, by operation and group: the ledger of a run equals this exactly.
//!
//! A pool's unit u goes to slot u mod K, so the units of one slot come one after another: u₁, u₂, … uₙ in forward
//! and back again in backward. Forward ends with uₙ in the slot, where backward finds it; backward ends with u₁,
//! where the next forward finds it. So each pass gathers all units of a slot but one, and only the first forward
//! after the slots were emptied gathers them all.

use crate::{
    comm::{Operation, Received},
    config::ReduceGradients,
    lora::AdapterPlan,
    model::{
        ModelSpec,
        base_plan::{Options, Regions},
    },
    shard::RegionLayout,
};

/// Rows that travel between a rank and the others of its expert group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Travellers {
    /// Choices of other ranks' tokens that fall on this rank's experts.
    pub come: usize,
    /// Choices of this rank's tokens that fall on other ranks' experts.
    pub go: usize,
}

/// Inputs of the traffic formula.
pub struct Traffic<'a> {
    pub spec: &'a ModelSpec,
    pub options: &'a Options,
    pub base: &'a Regions,
    pub adapter: &'a AdapterPlan,
    /// Copies of the base.
    pub replicas: usize,
}

impl Traffic<'_> {
    /// Bytes of one step of `micro_batches` in which some token carried loss and the adapter was updated, but for what
    /// depends on the routers' choices: [`all_to_all`](Self::all_to_all). `warm`: the
    /// slots hold what a step before left in them, as in every step but the first and those after a save.
    pub fn step(&self, micro_batches: usize, warm: bool) -> Received {
        let Regions { layers, experts, .. } = self.base;
        let AdapterPlan { dense: adapter, experts: expert_adapter, .. } = self.adapter;
        let passes = || (0..micro_batches).map(|i| (warm || i > 0, i > 0));
        let both = |base, adapter, (warm_base, warm_adapter)| {
            let slots = self.options.slots;
            there_and_back(base, slots, warm_base) + there_and_back(adapter, slots, warm_adapter)
        };
        let dense = passes().map(|warm| both(layers, adapter, warm) + self.vocab_and_norm(warm.0)).sum();
        let of_experts = passes().map(|warm| both(experts, expert_adapter, warm)).sum();
        let reductions = match self.options.reduce {
            ReduceGradients::Step => 1,
            ReduceGradients::MicroBatch => micro_batches,
        };
        let scattered = |regions: &[RegionLayout]| {
            let received = |region| Operation::ReduceScatter.received(self.fp32_bytes(region), region.shards);
            reductions * regions.iter().map(received).sum::<usize>()
        };
        let replicated = |region: &RegionLayout| {
            Operation::AllReduce.received(self.fp32_bytes(region) / region.shards, self.replicas)
        };
        let all = [
            (Operation::AllGather, "shard", dense),
            (Operation::AllGather, "expert_shard", of_experts),
            (Operation::ReduceScatter, "shard", scattered(adapter)),
            (Operation::ReduceScatter, "expert_shard", scattered(expert_adapter)),
            (Operation::AllReduce, "replicate", adapter.iter().chain(expert_adapter).map(replicated).sum()),
        ];
        let moved = all.into_iter().filter(|(_, _, bytes)| *bytes > 0);
        moved.map(|(operation, group, bytes)| ((operation, group.to_owned()), bytes as u64)).collect()
    }

    /// Received by expert parallelism for one layer and micro-batch of which `rows` come and go.
    ///
    /// There go the rows of x, each with its weight, and in backward those of dy; back come those of y, and dx each
    /// with the gradient of its weight. What is computed again sends x and weights again, and not y.
    pub fn all_to_all(&self, rows: Travellers) -> usize {
        let row = self.spec.hidden_size * self.options.compute.size();
        let weight = size_of::<f32>();
        let again = if self.options.checkpointing.keeps_mlp() { 0 } else { row + weight };
        rows.come * (row + weight + again + row) + rows.go * (row + row + weight)
    }

    /// Received by a step's gathers of vocabulary and final norm for one micro-batch. `warm`: their slots hold what the
    /// micro-batch before left in them.
    fn vocab_and_norm(&self, warm: bool) -> usize {
        let Regions { vocab, final_norm, .. } = self.base;
        let embedding_chunks = self.spec.vocab_size.div_ceil(self.options.chunk_rows(self.spec.vocab_size));
        let vocab = if embedding_chunks == 1 && vocab.len() == 1 {
            // Tied and in one chunk: it never leaves its slot.
            if warm { 0 } else { received(&vocab[0]) }
        } else {
            // The embedding's chunks, then the head's: each is pushed out by the next.
            let tied = if vocab.len() == embedding_chunks { 2 } else { 1 };
            tied * vocab.iter().map(received).sum::<usize>()
        };
        vocab + if warm { 0 } else { received(final_norm) }
    }

    fn fp32_bytes(&self, adapter: &RegionLayout) -> usize {
        adapter.padded / self.options.compute.size() * size_of::<f32>()
    }
}

/// Received for one forward and one backward over a pool of `slots` slots.
fn there_and_back(layouts: &[RegionLayout], slots: usize, warm: bool) -> usize {
    let slots = slots.clamp(1, layouts.len().max(1));
    let of_slot = |slot: usize| {
        // Units without bytes are not gathered and leave their slot alone.
        let mut units = layouts.iter().skip(slot).step_by(slots).map(received).filter(|bytes| *bytes > 0);
        let first = units.next()?;
        let (mut all, mut last) = (first, first);
        for bytes in units {
            (all, last) = (all + bytes, bytes);
        }
        Some(2 * all - last - if warm { first } else { 0 })
    };
    (0..slots).filter_map(of_slot).sum()
}

fn received(layout: &RegionLayout) -> usize {
    Operation::AllGather.received(layout.padded, layout.shards)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::DType,
        shard::{EntrySpec, layout::BASE_ALIGN},
    };

    /// Units of 1, 2, 4, … lines of 64 bytes, cut over 2; `None` is a unit without bytes.
    fn units(count: usize, empty: Option<usize>) -> Vec<RegionLayout> {
        let unit = |i: usize| {
            let entry = EntrySpec::whole("w", "w".into(), &[32 << i], DType::F32);
            RegionLayout::new("unit", if empty == Some(i) { vec![] } else { vec![entry] }, 2, BASE_ALIGN)
        };
        (0..count).map(unit).collect()
    }

    /// The slots themselves, asked unit by unit.
    fn simulated(layouts: &[RegionLayout], slots: usize, passes: usize) -> Vec<usize> {
        let slots = slots.clamp(1, layouts.len());
        let mut held = vec![None; slots];
        let mut ask = |unit: usize| {
            let bytes = received(&layouts[unit]);
            if bytes == 0 || held[unit % slots].replace(unit) == Some(unit) { 0 } else { bytes }
        };
        let mut pass = || (0..layouts.len()).chain((0..layouts.len()).rev()).map(&mut ask).sum();
        (0..passes).map(|_| pass()).collect()
    }

    #[test]
    fn a_ring_receives_what_its_slots_do_not_hold() {
        for (count, empty) in [(1, None), (5, None), (6, None), (6, Some(5)), (6, Some(0)), (7, Some(3))] {
            let layouts = units(count, empty);
            for slots in 1..9 {
                let [cold, warm] = [false, true].map(|warm| there_and_back(&layouts, slots, warm));
                let seen = simulated(&layouts, slots, 3);
                assert_eq!(seen, [cold, warm, warm], "{count} units, {empty:?} empty, {slots} slots");
            }
        }
    }
}
