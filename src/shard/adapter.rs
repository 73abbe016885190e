//! The sharded adapter: fp32 masters with their gradient on the owner only (ZeRO), gathered per unit in compute
//! dtype through a [`Ring`] like the base.
//!
//! Per unit one flat element space, the same for masters, moments and gradients; its offsets do not depend on
//! the world. Gradients accumulate in fp32 and are reduce-scattered in fp32 inside the shard group, then summed
//! over the replicas.

use super::{RegionLayout, Ring, ShardError};
use crate::{comm::Communicator, config::ReduceGradients, dtype::DType};
use std::{ops::Range, rc::Rc};
use tch::{Device, Kind, Tensor};

/// Elements between two tensors of an adapter region are a multiple of this, whatever the dtype.
pub const ADAPTER_ALIGN: usize = 32;

/// One unit's adapter on this rank. All tensors are flat fp32 `[piece elements]`.
struct Unit {
    master: Tensor,
    /// The reduced gradient of this rank's piece, summed over micro-batches.
    gradient: Tensor,
    /// The gradient of the whole unit, before it is reduced: `[all elements]`. A lone rank's is `gradient`.
    full: Option<Tensor>,
}

/// The adapters of all units.
pub struct AdapterShards {
    units: Vec<Unit>,
    ring: Ring,
    shard: Rc<dyn Communicator>,
    replicate: Rc<dyn Communicator>,
    /// `micro_batch`: the one buffer that every unit's backward fills in turn, as large as the largest unit.
    scratch: Option<Tensor>,
}

impl AdapterShards {
    /// Zero adapters over `layouts` (compute dtype, aligned to [`ADAPTER_ALIGN`] elements), with as many slots as
    /// the base ring has.
    pub fn new(
        layouts: Vec<RegionLayout>,
        slots: usize,
        shard: Rc<dyn Communicator>,
        replicate: Rc<dyn Communicator>,
        reduce: ReduceGradients,
        device: Device,
    ) -> Self {
        let lone = shard.size() == 1;
        let zeros = |n: usize| Tensor::zeros([n as i64], (Kind::Float, device));
        let elements =
            |layout: &RegionLayout| layout.entries.first().map_or(0, |e| layout.padded / e.spec.dtype.size());
        let unit = |layout: &RegionLayout| {
            let (all, own) = (elements(layout), elements(layout) / layout.shards);
            let keeps_full = !lone && reduce == ReduceGradients::Step;
            Unit { master: zeros(own), gradient: zeros(own), full: keeps_full.then(|| zeros(all)) }
        };
        let units = layouts.iter().map(unit).collect();
        let largest = layouts.iter().map(elements).max().unwrap_or(0);
        let scratch = (!lone && reduce == ReduceGradients::MicroBatch).then(|| zeros(largest));
        let ring = Ring::new("adapter", layouts, slots, shard.clone(), device);
        Self { units, ring, shard, replicate, scratch }
    }

    pub fn len(&self) -> usize {
        self.units.len()
    }

    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    pub fn layout(&self, unit: usize) -> &RegionLayout {
        self.ring.layout(unit)
    }

    /// The group over which the adapters are cut.
    pub fn shard_group(&self) -> &Rc<dyn Communicator> {
        &self.shard
    }

    /// Element range of `unit`'s flat space that this rank owns.
    pub fn owned(&self, unit: usize) -> Range<usize> {
        let n = self.units[unit].master.numel();
        self.shard.rank() * n..(self.shard.rank() + 1) * n
    }

    /// Where entry `entry` lies in `unit`'s flat element space.
    pub fn elements(&self, unit: usize, entry: usize) -> Range<usize> {
        let entry = &self.ring.layout(unit).entries[entry];
        let start = entry.offset / entry.spec.dtype.size();
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
        let entry = self.ring.layout(unit).entries.first()?;
        Some(self.ring.shard(unit).view_dtype(entry.spec.dtype.kind()))
    }

    /// Makes what is gathered stale, and waits for what is under way. Before every change of a compute copy.
    pub fn invalidate(&mut self) -> Result<(), ShardError> {
        self.ring.invalidate()
    }

    /// Makes the compute copies follow the masters, and what is gathered stale. After every change of a master alone.
    pub fn refresh(&mut self) -> Result<(), ShardError> {
        self.invalidate()?;
        for unit in 0..self.units.len() {
            if let Some(mut compute) = self.compute(unit) {
                compute.copy_(&self.units[unit].master);
            }
        }
        Ok(())
    }

    /// Makes `unit`'s adapter whole; see [`Ring::gather`].
    pub fn gather(&mut self, unit: usize) -> Result<(), ShardError> {
        if self.layout(unit).padded == 0 { Ok(()) } else { self.ring.gather(unit) }
    }

    /// See [`Ring::prefetch_beside`].
    pub fn prefetch_beside(&mut self, unit: usize, current: usize) -> Result<(), ShardError> {
        if self.layout(unit).padded == 0 { Ok(()) } else { self.ring.prefetch_beside(unit, current) }
    }

    /// Entry `entry` of `unit`, gathered, in compute dtype.
    pub fn view(&self, unit: usize, entry: usize) -> Result<Tensor, ShardError> {
        self.ring.view(unit, entry)
    }

    /// Where `unit`'s backward adds the gradient of entry `entry`: an fp32 view of the entry's shape.
    pub fn gradient_view(&self, unit: usize, entry: usize) -> Tensor {
        let own = &self.units[unit];
        let flat = own.full.as_ref().or(self.scratch.as_ref()).unwrap_or(&own.gradient);
        let range = self.elements(unit, entry);
        let shape: Vec<i64> = self.layout(unit).entries[entry].spec.shape.iter().map(|&n| n as i64).collect();
        flat.narrow(0, range.start as i64, range.len() as i64).view(&shape[..])
    }

    /// Before a step: all gradients are zero.
    pub fn zero_gradients(&mut self) {
        let buffers = self.units.iter_mut().flat_map(|unit| [Some(&mut unit.gradient), unit.full.as_mut()]);
        for buffer in buffers.chain([self.scratch.as_mut()]).flatten() {
            let _ = buffer.zero_();
        }
    }

    /// After `unit`'s backward of a micro-batch: with `reduce_gradients: micro_batch`, its gradient is reduced
    /// and added to this rank's piece.
    pub fn micro_batch_done(&mut self, unit: usize) -> Result<(), ShardError> {
        let Some(scratch) = &mut self.scratch else { return Ok(()) };
        let own = &mut self.units[unit];
        let n = own.gradient.numel() as i64;
        if n == 0 {
            return Ok(());
        }
        let mut full = scratch.narrow(0, 0, n * self.shard.size() as i64);
        let piece = Tensor::empty([n], (Kind::Float, full.device()));
        self.shard.reduce_scatter(&full, &piece)?;
        let _ = own.gradient.g_add_(&piece);
        let _ = full.zero_();
        Ok(())
    }

    /// After the last micro-batch: every rank has the gradient of its piece, summed over all ranks.
    pub fn step_done(&mut self) -> Result<(), ShardError> {
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

    /// The whole fp32 masters of `unit` `[elements]`, on every rank of the shard group. Collective.
    pub fn whole_master(&self, unit: usize) -> Result<Tensor, ShardError> {
        self.whole(&self.units[unit].master)
    }

    /// The whole of a flat fp32 piece `[elements]`, on every rank of the shard group. Collective.
    pub fn whole(&self, piece: &Tensor) -> Result<Tensor, ShardError> {
        if self.shard.size() == 1 {
            return Ok(piece.shallow_clone());
        }
        let output =
            Tensor::empty([(piece.numel() * self.shard.size()) as i64], (Kind::Float, piece.device()));
        self.shard.all_gather(piece, &output)?;
        Ok(output)
    }
}

/// Bytes of alignment of an adapter region in `dtype`.
pub const fn align_bytes(dtype: DType) -> usize {
    ADAPTER_ALIGN * dtype.size()
}
