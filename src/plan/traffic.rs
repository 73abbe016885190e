//! Bytes that a rank receives in a step, by operation and group: the ledger of a run equals this exactly.
//!
//! Unit u of a slot pool goes to slot u mod K, so a slot holds the units u₁, u₂, … uₙ one after another in forward, and
//! in reverse in backward. Forward ends with uₙ in the slot, where backward finds it; backward ends with u₁, where the
//! next forward finds it. So each pass gathers all units of a slot but one. Only the first forward after the slots were
//! invalidated gathers all.

use crate::{
    comm::{Operation, Received},
    config::{self, ReduceGradients},
    dtype::DType,
    lora::AdapterPlan,
    model::{
        ModelSpec,
        base_plan::{Options, Regions},
    },
    optim::muon,
    shard::{FlatRegion, Region, RegionLayout},
};

/// Rows sent between a rank and the others of its expert group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoutedRows {
    /// Choices of this rank's experts by tokens of other ranks.
    pub received: usize,
    /// Choices of other ranks' experts by tokens of this rank.
    pub sent: usize,
}

/// Model and options that the traffic depends on.
pub struct Traffic<'a> {
    pub spec: &'a ModelSpec,
    pub options: &'a Options,
    pub base: &'a Regions,
    pub adapter: &'a AdapterPlan,
    /// Copies of the base.
    pub replicas: usize,
    pub optimizer: config::Optimizer,
    /// The model of a forward before each micro-batch, with which the loss compares.
    pub reference: Option<Reference>,
}

/// The model that a loss compares with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// The base alone.
    Base,
    /// The base with a frozen adapter as large as the trained one.
    WithAdapter,
}

impl Traffic<'_> {
    /// Bytes of one step of `micro_batches` in which some token carried loss and the adapter was updated, without those
    /// that depend on the routers' choices ([`all_to_all`](Self::all_to_all)). `warm`: the slots hold the units of an
    /// earlier step, as in every step but the first and those after a save.
    pub fn step(&self, micro_batches: usize, warm: bool) -> Received {
        let Regions { layers, experts, .. } = self.base;
        let AdapterPlan { dense: adapter, experts: expert_adapter, .. } = self.adapter;
        let passes = || (0..micro_batches).map(|i| (warm || i > 0, i > 0));
        let both = |base, adapter, (warm_base, warm_adapter)| {
            let (slots, again) = (self.options.slots, self.reference.is_some());
            let frozen = match self.reference {
                Some(Reference::WithAdapter) => forward_over(adapter, slots, warm_base),
                _ => 0,
            };
            passes_over(base, slots, warm_base, again)
                + passes_over(adapter, slots, warm_adapter, false)
                + frozen
        };
        let dense: usize =
            passes().map(|warm| both(layers, adapter, warm) + self.vocab_and_norm(warm.0)).sum();
        let of_experts: usize = passes().map(|warm| both(experts, expert_adapter, warm)).sum();
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
            (Operation::AllGather, "shard", dense + self.of_update(Region::Dense)),
            (Operation::AllGather, "expert_shard", of_experts + self.of_update(Region::Experts)),
            (Operation::ReduceScatter, "shard", scattered(adapter)),
            (Operation::ReduceScatter, "expert_shard", scattered(expert_adapter)),
            (Operation::AllReduce, "replicate", adapter.iter().chain(expert_adapter).map(replicated).sum()),
        ];
        let moved = all.into_iter().filter(|(_, _, bytes)| *bytes > 0);
        moved.map(|(operation, group, bytes)| ((operation, group.to_owned()), bytes as u64)).collect()
    }

    /// Bytes received by expert parallelism for layer `layer` and a micro-batch with `rows`.
    ///
    /// Dispatch sends the rows of x with their weights, and in backward those of dy. Combine sends those of y, and in
    /// backward those of dx with the gradients of the weights. A recompute dispatches x and weights again, without
    /// combine. A pass of the reference has the forward's.
    pub fn all_to_all(&self, layer: usize, rows: RoutedRows) -> usize {
        let row = self.spec.hidden_size * self.options.compute.size();
        let weight = size_of::<f32>();
        let again = if self.options.checkpointing.of(layer).keeps_mlp() { 0 } else { row + weight };
        let (received, sent) = if self.reference.is_some() { (row + weight, row) } else { (0, 0) };
        rows.received * (row + weight + again + row + received) + rows.sent * (row + row + weight + sent)
    }

    /// Bytes received by the gathers of vocabulary and final norm for one micro-batch. `warm`: their slots hold the
    /// units of an earlier micro-batch.
    fn vocab_and_norm(&self, warm: bool) -> usize {
        let Regions { vocab, final_norm, .. } = self.base;
        let embedding_chunks = self.spec.vocab_size.div_ceil(self.options.chunk_rows(self.spec.vocab_size));
        let vocab = if embedding_chunks == 1 && vocab.len() == 1 {
            // Tied and in one chunk: it stays in its slot.
            if warm { 0 } else { received(&vocab[0]) }
        } else {
            // The embedding's chunks, then the head's: each overwrites the one before.
            let tied = if vocab.len() == embedding_chunks { 2 } else { 1 };
            let passes = if self.reference.is_some() { 2 } else { 1 };
            passes * tied * vocab.iter().map(received).sum::<usize>()
        };
        vocab + if warm { 0 } else { received(final_norm) }
    }

    /// Bytes received by the update of all units' adapters in `region`.
    fn of_update(&self, region: Region) -> usize {
        if self.optimizer != config::Optimizer::Muon {
            return 0;
        }
        let units = self.adapter.flat_of(region).iter().zip(self.adapter.of(region));
        let received = |(flat, layout): (&FlatRegion, &RegionLayout)| {
            let bytes = muon::gathered_elements(flat, layout.shards) * DType::Bf16.size();
            Operation::AllGather.received(bytes, layout.shards)
        };
        units.map(received).sum()
    }

    fn fp32_bytes(&self, adapter: &RegionLayout) -> usize {
        adapter.padded / self.adapter.copies().size() * size_of::<f32>()
    }
}

/// Bytes received by one forward and one backward over a pool of `slots` slots. `again`: another forward comes before.
fn passes_over(layouts: &[RegionLayout], slots: usize, warm: bool, again: bool) -> usize {
    let slots = slots.clamp(1, layouts.len().max(1));
    let of_slot = |slot: usize| {
        // Units without bytes are not gathered: their slot keeps its unit.
        let mut units = layouts.iter().skip(slot).step_by(slots).map(received).filter(|bytes| *bytes > 0);
        let first = units.next()?;
        let (mut all, mut last) = (first, first);
        let mut is_alone = true;
        for bytes in units {
            (all, last, is_alone) = (all + bytes, bytes, false);
        }
        // The other forward ends with the last unit in the slot, so that the next one gathers all of several.
        let other = if again && !is_alone { all } else { 0 };
        Some(2 * all - last + other - if warm { first } else { 0 })
    };
    (0..slots).filter_map(of_slot).sum()
}

/// Bytes received by one forward of several over a pool of `slots` slots.
fn forward_over(layouts: &[RegionLayout], slots: usize, warm: bool) -> usize {
    let slots = slots.clamp(1, layouts.len().max(1));
    let of_slot = |slot: usize| {
        let units = layouts.iter().skip(slot).step_by(slots).map(received).filter(|bytes| *bytes > 0);
        let (count, all) = units.fold((0, 0), |(count, all), bytes| (count + 1, all + bytes));
        // A lone unit stays in its slot.
        if warm && count == 1 { 0 } else { all }
    };
    (0..slots).map(of_slot).sum()
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

    /// Simulation of the slots, unit by unit.
    fn simulated(layouts: &[RegionLayout], slots: usize, passes: usize, again: bool) -> Vec<usize> {
        let slots = slots.clamp(1, layouts.len());
        let mut held = vec![None; slots];
        let mut ask = |unit: usize| {
            let bytes = received(&layouts[unit]);
            if bytes == 0 || held[unit % slots].replace(unit) == Some(unit) { 0 } else { bytes }
        };
        let forward = || 0..layouts.len();
        let other = || forward().take(if again { layouts.len() } else { 0 });
        let mut pass = || other().chain(forward()).chain(forward().rev()).map(&mut ask).sum();
        (0..passes).map(|_| pass()).collect()
    }

    #[test]
    fn a_pool_receives_the_units_that_its_slots_do_not_hold() {
        for (count, empty) in [(1, None), (5, None), (6, None), (6, Some(5)), (6, Some(0)), (7, Some(3))] {
            let layouts = units(count, empty);
            for slots in 1..9 {
                for again in [false, true] {
                    let [cold, warm] = [false, true].map(|warm| passes_over(&layouts, slots, warm, again));
                    let seen = simulated(&layouts, slots, 3, again);
                    assert_eq!(
                        seen,
                        [cold, warm, warm],
                        "{count} units, {empty:?} empty, {slots} slots, {again}"
                    );
                }
            }
        }
    }
}
