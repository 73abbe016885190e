//! The sharded adapter: fp32 masters with their gradient on the owner only (ZeRO), gathered per unit in compute
//! dtype through a [`SlotPool`] like the base.
//!
//! Per unit one flat element space, the same for masters, moments and gradients; its offsets do not depend on
//! the world. That of experts lies one group of experts after another, each cut over the ranks that have it. Gradients
//! accumulate in fp32 and are reduce-scattered in fp32 inside the shard group, then summed over the replicas.

use super::{FlatRegion, OwnedPiece, ProcessGroups, Region, RegionLayout, ShardError, SlotPool, Storage};
use crate::{buffers::Buffer, comm::Communicator, config::ReduceGradients, dtype::DType};
use std::{ops::Range, rc::Rc};
use tch::{Kind, Tensor};

/// Elements between two tensors of an adapter region are a multiple of this, whatever the dtype.
pub const ADAPTER_ALIGN: usize = 32;

/// One unit's adapter on this rank. All tensors are flat fp32 `[piece elements]`; see
/// [`frozen`](AdapterRegions::frozen) for an adapter that is not trained.
struct UnitShards {
    master: Tensor,
    /// The reduced gradient of this rank's piece, summed over micro-batches.
    gradient: Tensor,
    /// The gradient of the whole region, before it is reduced: `[all elements]`. `None` on one rank: `gradient` is
    /// whole.
    full: Option<Tensor>,
}

/// The adapters of all units: the region that a block shares, and the region of single experts.
pub struct AdapterRegions {
    dense: AdapterShards,
    experts: AdapterShards,
}

impl AdapterRegions {
    /// Zero adapters over the layouts of both regions; see [`AdapterShards`].
    pub fn new(
        dense: Vec<RegionLayout>,
        experts: Vec<RegionLayout>,
        slots: usize,
        groups: &ProcessGroups,
        reduce: ReduceGradients,
    ) -> Self {
        Self::with(dense, experts, slots, groups, Some(reduce))
    }

    /// Zero adapters that are not trained: the compute copies alone, which are their masters too, in compute dtype.
    /// Their gradients are zeros without memory of their own, and cannot be written.
    pub fn frozen(
        dense: Vec<RegionLayout>,
        experts: Vec<RegionLayout>,
        slots: usize,
        groups: &ProcessGroups,
    ) -> Self {
        Self::with(dense, experts, slots, groups, None)
    }

    fn with(
        dense: Vec<RegionLayout>,
        experts: Vec<RegionLayout>,
        slots: usize,
        groups: &ProcessGroups,
        reduce: Option<ReduceGradients>,
    ) -> Self {
        let shards = |layouts, region| AdapterShards::new(layouts, slots, groups, region, reduce);
        Self { dense: shards(dense, Region::Dense), experts: shards(experts, Region::Experts) }
    }

    /// Takes over the compute copies of `other`, which has the same layouts.
    pub fn copy_values(&mut self, other: &Self) -> Result<(), ShardError> {
        self.invalidate()?;
        for region in [Region::Dense, Region::Experts] {
            let (own, other) = (self.of(region), other.of(region));
            for unit in 0..own.len() {
                if let (Some(mut own), Some(other)) = (own.compute(unit), other.compute(unit)) {
                    own.copy_(&other);
                }
            }
        }
        Ok(())
    }

    pub fn of(&self, region: Region) -> &AdapterShards {
        match region {
            Region::Dense => &self.dense,
            Region::Experts => &self.experts,
        }
    }

    pub fn of_mut(&mut self, region: Region) -> &mut AdapterShards {
        match region {
            Region::Dense => &mut self.dense,
            Region::Experts => &mut self.experts,
        }
    }

    fn both(&mut self) -> [&mut AdapterShards; 2] {
        [&mut self.dense, &mut self.experts]
    }

    /// The ranks that own all of it between them, no element twice.
    pub fn block(&self) -> &Rc<dyn Communicator> {
        &self.dense.block
    }

    /// Marks gathered units as stale and waits for gathers under way. Called before every change of a compute copy.
    pub fn invalidate(&mut self) -> Result<(), ShardError> {
        self.both().into_iter().try_for_each(|shards| shards.pool.invalidate())
    }

    /// Copies the masters into the compute copies and marks gathered units as stale. Called after every change of a
    /// master alone.
    pub fn refresh(&mut self) -> Result<(), ShardError> {
        self.invalidate()?;
        self.both().into_iter().for_each(|shards| shards.refresh());
        Ok(())
    }

    /// Gathers `unit`'s adapters; see [`SlotPool::gather`].
    pub fn gather(&mut self, unit: usize) -> Result<(), ShardError> {
        self.both().into_iter().try_for_each(|shards| shards.pool.gather(unit))
    }

    /// See [`SlotPool::prefetch_beside`].
    pub fn prefetch_beside(&mut self, unit: usize, current: usize) -> Result<(), ShardError> {
        self.both().into_iter().try_for_each(|shards| shards.pool.prefetch_beside(unit, current))
    }

    /// See [`SlotPool::poison`].
    pub fn poison(&mut self, unit: usize) {
        self.both().into_iter().for_each(|shards| shards.pool.poison(unit));
    }

    /// The tensors that hold what is accumulated between passes, as this rank has it: zero after
    /// [`zero_gradients`](Self::zero_gradients).
    pub fn accumulators(&self) -> impl Iterator<Item = &Tensor> {
        let units = [&self.dense, &self.experts].into_iter().flat_map(|shards| &shards.units);
        units.map(|unit| unit.full.as_ref().unwrap_or(&unit.gradient))
    }

    /// Sets all gradients to zero, before a step.
    pub fn zero_gradients(&mut self) {
        self.both().into_iter().for_each(AdapterShards::zero_gradients);
    }

    /// Reduces `unit`'s gradient after its backward of a micro-batch and adds it to this rank's pieces, with
    /// `reduce_gradients: micro_batch`.
    pub fn micro_batch_done(&mut self, unit: usize) -> Result<(), ShardError> {
        self.both().into_iter().try_for_each(|shards| shards.micro_batch_done(unit))
    }

    /// Reduces all gradients after the last micro-batch: each rank then has the sum over all ranks for its pieces.
    pub fn step_done(&mut self) -> Result<(), ShardError> {
        self.both().into_iter().try_for_each(|shards| shards.step_done())
    }
}

/// The adapters of all units in one of their regions.
pub struct AdapterShards {
    units: Vec<UnitShards>,
    pool: SlotPool,
    shard: Rc<dyn Communicator>,
    replicate: Rc<dyn Communicator>,
    /// All ranks that own a part of the flat spaces.
    block: Rc<dyn Communicator>,
    /// Into how many groups of experts a flat space is divided, and which of them this rank has.
    expert_groups: usize,
    expert_group: usize,
    /// `micro_batch`: the one buffer that every unit's backward fills in turn, as large as the largest unit.
    scratch: Option<Tensor>,
    is_frozen: bool,
}

impl AdapterShards {
    /// Zero adapters over `layouts` (compute dtype, aligned to [`ADAPTER_ALIGN`] elements), with as many slots as
    /// the base pool has. `reduce`: `None` for those that are not trained.
    fn new(
        layouts: Vec<RegionLayout>,
        slots: usize,
        groups: &ProcessGroups,
        region: Region,
        reduce: Option<ReduceGradients>,
    ) -> Self {
        let (mesh, block, device) = (&groups.mesh, groups.shard.clone(), groups.device.tensors());
        let (shard, expert_groups, expert_group) = match region {
            Region::Dense => (block.clone(), 1, 0),
            Region::Experts => {
                (groups.expert_shard.clone(), mesh.expert(), mesh.coordinates(groups.rank).expert)
            }
        };
        let replicate = groups.replicate.clone();
        let lone = shard.size() == 1;
        let zeros = |n: usize| Tensor::zeros([n as i64], (Kind::Float, device));
        let elements = |layout: &RegionLayout| {
            layout.entries.first().map_or(0, |e| e.spec.storage.element_at(layout.padded))
        };
        let largest = layouts.iter().map(elements).max().unwrap_or(0);
        let scratch = (!lone && reduce == Some(ReduceGradients::MicroBatch)).then(|| zeros(largest));
        let pool = SlotPool::new("adapter", layouts, slots, shard.clone(), device);
        let unit = |unit: usize| {
            let layout = pool.layout(unit);
            let (all, own) = (elements(layout), elements(layout) / layout.shards);
            let Some(reduce) = reduce else {
                let master = copy_of(&pool, unit).unwrap_or_else(|| zeros(0));
                return UnitShards { master, gradient: zeros(1).expand([all as i64], false), full: None };
            };
            let keeps_full = !lone && reduce == ReduceGradients::Step;
            UnitShards { master: zeros(own), gradient: zeros(own), full: keeps_full.then(|| zeros(all)) }
        };
        let units = (0..pool.len()).map(unit).collect();
        let is_frozen = reduce.is_none();
        Self { units, pool, shard, replicate, block, expert_groups, expert_group, scratch, is_frozen }
    }

    pub fn len(&self) -> usize {
        self.units.len()
    }

    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    pub fn layout(&self, unit: usize) -> &RegionLayout {
        self.pool.layout(unit)
    }

    /// This rank's piece of `unit`, whose flat space is `region`.
    pub fn piece<'a>(&'a self, unit: usize, region: &'a FlatRegion) -> OwnedPiece<'a> {
        OwnedPiece {
            region,
            owned: self.owned(unit),
            master: self.master(unit),
            gradient: self.gradient(unit),
            compute: self.compute(unit),
            shards: &*self.shard,
        }
    }

    /// Element range of `unit`'s flat space that this rank owns.
    pub fn owned(&self, unit: usize) -> Range<usize> {
        let n = self.units[unit].master.numel();
        let piece = self.expert_group * self.shard.size() + self.shard.rank();
        piece * n..(piece + 1) * n
    }

    /// Range of entry `entry` of the experts' group `group` (0 in dense regions) in `unit`'s flat element space.
    pub fn elements(&self, unit: usize, group: usize, entry: usize) -> Range<usize> {
        let entry = &self.pool.layout(unit).entries[entry];
        let first = group * self.units[unit].master.numel() * self.shard.size();
        let start = first + entry.spec.storage.element_at(entry.offset);
        start..start + entry.elements()
    }

    /// fp32 master of this rank's piece of `unit`: `[piece elements]`.
    pub fn master(&self, unit: usize) -> &Tensor {
        &self.units[unit].master
    }

    /// Reduced fp32 gradient of this rank's piece of `unit`: `[piece elements]`.
    pub fn gradient(&self, unit: usize) -> &Tensor {
        &self.units[unit].gradient
    }

    /// The compute copy of this rank's piece of `unit`, from which it is gathered: `[piece elements]`. None where the
    /// unit has no adapter.
    pub fn compute(&self, unit: usize) -> Option<Tensor> {
        copy_of(&self.pool, unit)
    }

    /// Entry `entry` of `unit`, gathered, in compute dtype.
    pub fn view(&self, unit: usize, entry: usize) -> Result<Tensor, ShardError> {
        self.pool.view(unit, entry)
    }

    /// Sum of the gradient of entry `entry`, to which `unit`'s backward adds: an fp32 view of the entry's shape.
    pub fn gradient_view(&self, unit: usize, entry: usize) -> Tensor {
        let own = &self.units[unit];
        let flat = own.full.as_ref().or(self.scratch.as_ref()).unwrap_or(&own.gradient);
        // Of this rank's own group of experts, which is what it computes.
        let range = self.elements(unit, 0, entry);
        let shape: Vec<i64> = self.layout(unit).entries[entry].spec.shape.iter().map(|&n| n as i64).collect();
        flat.narrow(0, range.start as i64, range.len() as i64).view(&shape[..])
    }

    /// Copies the masters into the compute copies.
    fn refresh(&mut self) {
        if self.is_frozen {
            return;
        }
        for unit in 0..self.len() {
            if let Some(mut compute) = self.compute(unit) {
                compute.copy_(self.master(unit));
            }
        }
    }

    fn zero_gradients(&mut self) {
        // Where a unit keeps the gradient of its whole region, reducing that overwrites the piece's.
        let buffers = self.units.iter_mut().map(|unit| unit.full.as_mut().unwrap_or(&mut unit.gradient));
        for buffer in buffers.chain(self.scratch.as_mut()) {
            let _ = buffer.zero_();
        }
    }

    fn micro_batch_done(&mut self, unit: usize) -> Result<(), ShardError> {
        let Some(scratch) = &mut self.scratch else { return Ok(()) };
        let own = &mut self.units[unit];
        let n = own.gradient.numel() as i64;
        if n == 0 {
            return Ok(());
        }
        let mut full = scratch.narrow(0, 0, n * self.shard.size() as i64);
        let piece = Buffer::like(&own.gradient);
        self.shard.reduce_scatter(&full, &piece)?;
        let _ = own.gradient.g_add_(&piece);
        let _ = full.zero_();
        Ok(())
    }

    fn step_done(&mut self) -> Result<(), ShardError> {
        for unit in &self.units {
            if unit.gradient.numel() == 0 {
                continue;
            }
            if let Some(full) = &unit.full {
                self.shard.reduce_scatter(full, &unit.gradient)?;
            }
            if self.replicate.size() > 1 {
                self.replicate.all_reduce(&unit.gradient)?;
            }
        }
        Ok(())
    }

    /// A copy of what [`AdapterRegions::step_done`] would leave in `unit`'s gradient, the sum over all ranks
    /// `[piece elements]`; what is accumulated stays. Collective.
    pub fn reduced_gradient(&self, unit: usize) -> Result<Tensor, ShardError> {
        let own = &self.units[unit];
        let sum = own.gradient.copy();
        if sum.numel() > 0 {
            if let Some(full) = &own.full {
                self.shard.reduce_scatter(full, &sum)?;
            }
            if self.replicate.size() > 1 {
                self.replicate.all_reduce(&sum)?;
            }
        }
        Ok(sum)
    }

    /// Replaces what is accumulated of `unit`: as if passes had been made whose gradients, summed over all ranks, are
    /// `sum` `[piece elements]` for this rank's piece.
    pub fn set_reduced_gradient(&mut self, unit: usize, sum: &Tensor) {
        let own = &mut self.units[unit];
        for buffer in [Some(&mut own.gradient), own.full.as_mut()].into_iter().flatten() {
            let _ = buffer.zero_();
        }
        // Summed over the replicas, it has to be there once.
        if self.replicate.rank() == 0 {
            let n = own.gradient.numel() as i64;
            let piece = own.full.as_ref().map(|full| full.narrow(0, self.shard.rank() as i64 * n, n));
            piece.unwrap_or_else(|| own.gradient.shallow_clone()).copy_(sum);
        }
    }

    /// Copies `values` (elements `range` of `unit`'s flat space) into the part of this rank's master they cover.
    pub fn set_master(&mut self, unit: usize, range: Range<usize>, values: &[f32]) {
        let owned = self.owned(unit);
        let (from, to) = (range.start.max(owned.start), range.end.min(owned.end));
        if from < to {
            let own = &values[from - range.start..to - range.start];
            let (at, n) = ((from - owned.start) as i64, (to - from) as i64);
            let mut target = self.units[unit].master.narrow(0, at, n);
            target.copy_(&Tensor::from_slice(own));
        }
    }

    /// The whole fp32 masters of `unit` `[elements]`, those of all experts, on every rank of the block. Collective.
    pub fn whole_master(&self, unit: usize) -> Result<Tensor, ShardError> {
        let piece = &self.units[unit].master;
        if self.block.size() == 1 {
            return Ok(piece.shallow_clone());
        }
        let (n, ranks) = (piece.numel() as i64, self.block.size() as i64);
        let output = Tensor::empty([ranks * n], (Kind::Float, piece.device()));
        self.block.all_gather(piece, &output)?;
        // A rank's group of experts is its number modulo their count; the flat space has group after group.
        let groups = self.expert_groups as i64;
        Ok(output.view([ranks / groups, groups, n]).transpose(0, 1).reshape([-1]))
    }
}

/// This rank's piece of `unit` in `pool`, in compute dtype: `[piece elements]`. None where the unit has no adapter.
fn copy_of(pool: &SlotPool, unit: usize) -> Option<Tensor> {
    let Storage::Plain(dtype) = pool.layout(unit).entries.first()?.spec.storage else { return None };
    Some(pool.shard(unit).view_dtype(dtype.kind()))
}

/// Bytes of alignment of an adapter region in `dtype`.
pub const fn align_bytes(dtype: DType) -> usize {
    ADAPTER_ALIGN * dtype.size()
}
