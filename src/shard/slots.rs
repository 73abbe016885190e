//! Slots that hold gathered units while they compute.
//!
//! Unit u goes to slot u mod K. A gather writes the pieces of all ranks straight into the slot, and the weights
//! of a unit are views of it: nothing is allocated or copied. Because slots are overwritten, nothing that
//! survives a unit may refer to a slot, and each slot carries the unit that it holds; every use asserts it.
//! With one rank the views are of the shards themselves, and there are no slots.
//!
//! Ranks of one host may lay their pieces side by side in shared memory ([`SlotPool::share`]). Then a unit is whole
//! where its pieces lie, a gather copies nothing, and a slot is only the set of pages that count for a rank's RSS.

use super::{EntrySpec, Piece, RegionLayout, ShardError, Span, Storage};
use crate::{
    comm::{Communicator, PAGE, Pending, Reduce, SharedMemory},
    device::Staging,
    quant::Format,
    weights::WeightSource,
};
use std::{collections::BTreeMap, ops::Range, rc::Rc};
use tch::{Device, Kind, Tensor};

/// Bytes of tiles that are packed at a time: a part of [`Staging`].
const PACKED_BYTES: usize = 4 << 20;

struct Slot {
    /// `[bytes of the largest unit]` u8; nothing where units are shared.
    buffer: Tensor,
    /// The unit that the buffer holds, or will hold when `pending` is done.
    unit: Option<usize>,
    pending: Option<Pending>,
}

/// The sharded regions of like units (decoder layers, vocabulary chunks) and the slots they share.
pub struct SlotPool {
    name: &'static str,
    pub(super) layouts: Vec<RegionLayout>,
    /// This rank's piece of each unit: `[piece bytes]` u8.
    pub(super) shards: Vec<Tensor>,
    slots: Vec<Slot>,
    shared: Option<SharedUnits>,
    pub(super) comm: Rc<dyn Communicator>,
}

/// Pieces of all ranks in shared memory.
struct SharedUnits {
    memory: SharedMemory,
    /// Each unit `[padded bytes]` u8, and its range in the memory.
    units: Vec<(Tensor, Range<usize>)>,
}

impl SharedUnits {
    /// The other ranks' pieces of `unit`: those before and those behind this rank's.
    fn of_others(&self, unit: usize, comm: &dyn Communicator) -> [Range<usize>; 2] {
        let all = self.units[unit].1.clone();
        let piece = all.len() / comm.size();
        let own = all.start + comm.rank() * piece;
        [all.start..own, own + piece..all.end]
    }

    /// Maps the pages of the others' pieces of `unit` at once.
    fn fetch(&self, unit: usize, comm: &dyn Communicator) {
        self.of_others(unit, comm).iter().for_each(|range| self.memory.fetch(range));
    }

    /// Drops the pages of the others' pieces of `unit` from RSS (MADV_DONTNEED).
    fn release(&self, unit: usize, comm: &dyn Communicator) {
        self.of_others(unit, comm).iter().for_each(|range| self.memory.release(range));
    }
}

impl SlotPool {
    /// A pool over `layouts` with `slots` slots; pieces are zero until filled. All layouts are cut over `comm`.
    pub fn new(
        name: &'static str,
        layouts: Vec<RegionLayout>,
        slots: usize,
        comm: Rc<dyn Communicator>,
        device: Device,
    ) -> Self {
        let zeros = |bytes: usize| Tensor::zeros([bytes as i64], (Kind::Uint8, device));
        let shards = layouts.iter().map(|layout| zeros(layout.piece_bytes())).collect();
        let largest = layouts.iter().map(|layout| layout.padded).max().unwrap_or(0);
        let slots = if comm.size() == 1 { 0 } else { slots.clamp(1, layouts.len().max(1)) };
        let empty = || Tensor::empty([largest as i64], (Kind::Uint8, device));
        let slot = |_| Slot { buffer: empty(), unit: None, pending: None };
        Self { name, layouts, shards, slots: (0..slots).map(slot).collect(), shared: None, comm }
    }

    /// Moves the pieces into memory that all ranks of the host share, where there is such memory. [`load`](Self::load)
    /// follows; later changes go through [`update`](Self::update). Collective.
    pub fn share(&mut self) -> Result<(), ShardError> {
        if self.slots.is_empty() || self.shared.is_some() {
            return Ok(());
        }
        let ends = self.layouts.iter().scan(0, |end, layout| {
            let start = *end;
            *end = (start + layout.padded).next_multiple_of(PAGE);
            Some(start..start + layout.padded)
        });
        let ranges: Vec<Range<usize>> = ends.collect();
        let bytes = ranges.last().map_or(0, |last| last.end);
        let Some(memory) = self.comm.share(bytes)? else { return Ok(()) };
        for ((shard, layout), range) in self.shards.iter_mut().zip(&self.layouts).zip(&ranges) {
            let start = range.start + self.comm.rank() * layout.piece_bytes();
            *shard = memory.tensor(&(start..start + layout.piece_bytes()));
        }
        for slot in &mut self.slots {
            slot.buffer = Tensor::empty([0], (Kind::Uint8, Device::Cpu));
        }
        let units = ranges.into_iter().map(|range| (memory.tensor(&range), range)).collect();
        self.shared = Some(SharedUnits { memory, units });
        Ok(())
    }

    /// True if no unit has to be sent: pieces are shared, or no other rank has any.
    pub fn is_shared(&self) -> bool {
        self.shared.is_some() || self.slots.is_empty() || self.layouts.iter().all(|layout| layout.padded == 0)
    }

    /// Number of units.
    pub fn len(&self) -> usize {
        self.layouts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.layouts.is_empty()
    }

    pub fn layout(&self, unit: usize) -> &RegionLayout {
        &self.layouts[unit]
    }

    /// This rank's piece of `unit`: `[piece bytes]` u8.
    pub fn shard(&self, unit: usize) -> &Tensor {
        &self.shards[unit]
    }

    /// Fills this rank's pieces from `source`, reading no other byte. Collective where they are shared.
    pub fn load(&self, source: &dyn WeightSource, staging: &mut Staging) -> Result<(), ShardError> {
        for (layout, shard) in self.layouts.iter().zip(&self.shards) {
            let reads = layout.reads(self.comm.rank());
            let scales = self.global_scales(layout, &reads, source)?;
            self.put_scales(layout, &scales, shard)?;
            for read in reads {
                let dtype = match read.storage {
                    Storage::Plain(dtype) => dtype,
                    Storage::Packed(format) => {
                        let scale = scales.get(&read.tensor).copied().unwrap_or(1.0);
                        read_packed(&read, format, scale, source, shard, staging)?;
                        continue;
                    }
                };
                let (size, at) = (dtype.size(), read.at as i64);
                let target = shard.narrow(0, at, (read.range.len() * size) as i64);
                staging.send(&target, |first, bytes| {
                    let first = read.range.start + first / size;
                    source.read(&read.tensor, first..first + bytes.len() / size, dtype, bytes)?;
                    Ok::<_, ShardError>(())
                })?;
            }
        }
        if self.shared.is_some() {
            self.comm.barrier()?;
        }
        Ok(())
    }

    /// The scale beside the tiles of each matrix of `layout` that has one, by name: the source's, or that of its
    /// largest magnitude, on whichever ranks it lies. Collective if there is such a matrix.
    fn global_scales(
        &self,
        layout: &RegionLayout,
        reads: &[Piece],
        source: &dyn WeightSource,
    ) -> Result<BTreeMap<String, f32>, ShardError> {
        let (mut scales, mut amax) = (BTreeMap::new(), BTreeMap::new());
        for EntrySpec { storage, spans, .. } in layout.entries.iter().map(|entry| &entry.spec) {
            let Storage::Packed(format) = *storage else { continue };
            for Span { tensor, .. } in spans.iter().filter(|_| format.has_global()) {
                match source.packed(tensor).filter(|form| form.format == format) {
                    Some(form) => drop(scales.insert(tensor.clone(), form.global)),
                    None => drop(amax.insert(tensor.clone(), (format, 0f64))),
                }
            }
        }
        for read in reads {
            if let Some((format, most)) = amax.get_mut(&read.tensor) {
                let own = source.amax(&read.tensor, *format, tiles(read, *format))?;
                *most = f64::max(*most, own.into());
            }
        }
        if !amax.is_empty() {
            let mut all: Vec<f64> = amax.values().map(|(_, most)| *most).collect();
            self.comm.all_reduce_host(&mut all, Reduce::Max)?;
            let global = |((name, (format, _)), most): ((String, (Format, f64)), f64)| {
                (name, format.global(most as f32))
            };
            scales.extend(amax.into_iter().zip(all).map(global));
        }
        Ok(scales)
    }

    /// Gathers `unit` and waits for it. A unit that is still in its slot is not gathered again.
    pub fn gather(&mut self, unit: usize) -> Result<(), ShardError> {
        self.prefetch(unit)?;
        if let Some(slot) = self.slot_of(unit)
            && let Some(pending) = self.slots[slot].pending.take()
        {
            pending.wait()?;
        }
        Ok(())
    }

    /// Starts to gather `unit`, unless its slot holds it or a gather is under way. A unit without bytes leaves its slot
    /// alone.
    pub fn prefetch(&mut self, unit: usize) -> Result<(), ShardError> {
        let Some(index) = self.slot_of(unit).filter(|_| self.layouts[unit].padded > 0) else { return Ok(()) };
        let slot = &mut self.slots[index];
        if slot.unit == Some(unit) {
            return Ok(());
        }
        if let Some(pending) = slot.pending.take() {
            pending.wait()?;
        }
        let held = slot.unit.replace(unit);
        let output = match &self.shared {
            None => slot.buffer.narrow(0, 0, self.layouts[unit].padded as i64),
            Some(shared) => {
                if let Some(held) = held {
                    shared.release(held, &*self.comm);
                }
                shared.fetch(unit, &*self.comm);
                shared.units[unit].0.shallow_clone()
            }
        };
        slot.pending = Some(self.comm.start_all_gather(&self.shards[unit], &output)?);
        Ok(())
    }

    /// Starts to gather `unit` if that leaves the slot of `current` alone.
    pub fn prefetch_beside(&mut self, unit: usize, current: usize) -> Result<(), ShardError> {
        if self.slot_of(unit) == self.slot_of(current) {
            return Ok(());
        }
        self.prefetch(unit)
    }

    /// Overwrites the slot of `unit` with NaN after use, for debugging: a later read shows.
    pub fn poison(&mut self, unit: usize) {
        let Some(slot) = self.slot_of(unit).map(|index| &mut self.slots[index]) else { return };
        if slot.unit == Some(unit) && slot.pending.is_none() {
            slot.unit = None;
            // Shared pieces are the other ranks' too; a run with --debug does not share.
            let _ = slot.buffer.fill_(255);
        }
    }

    /// Empties the slots, after the shards have changed.
    pub fn invalidate(&mut self) -> Result<(), ShardError> {
        for slot in &mut self.slots {
            if let Some(pending) = slot.pending.take() {
                pending.wait()?;
            }
            if let Some((shared, unit)) = self.shared.as_ref().zip(slot.unit.take()) {
                shared.release(unit, &*self.comm);
            }
        }
        Ok(())
    }

    /// Entry `entry` of `unit`, a view in its dtype and shape, valid until another unit takes the slot.
    pub fn view(&self, unit: usize, entry: usize) -> Result<Tensor, ShardError> {
        let buffer = match self.slot_of(unit) {
            None => &self.shards[unit],
            Some(index) => {
                let slot = &self.slots[index];
                if slot.unit != Some(unit) || slot.pending.is_some() {
                    let held = slot.unit.map_or("nothing", |held| self.layouts[held].name.as_str());
                    return Err(ShardError::WrongUnit {
                        pool: self.name,
                        wanted: self.layouts[unit].name.clone(),
                        held: if slot.pending.is_some() {
                            format!("{held}, not yet gathered")
                        } else {
                            held.into()
                        },
                    });
                }
                self.shared.as_ref().map_or(&slot.buffer, |shared| &shared.units[unit].0)
            }
        };
        view(buffer, &self.layouts[unit], entry)
    }

    fn slot_of(&self, unit: usize) -> Option<usize> {
        (!self.slots.is_empty()).then(|| unit % self.slots.len())
    }
}

/// The tiles of a packed piece, counted in its matrix.
fn tiles(read: &Piece, format: Format) -> Range<usize> {
    let each = format.tile().elements;
    read.range.start / each..read.range.end.div_ceil(each)
}

/// Fills a packed piece of `shard` from the source, some tiles at a time.
fn read_packed(
    read: &Piece,
    format: Format,
    global: f32,
    source: &dyn WeightSource,
    shard: &Tensor,
    staging: &mut Staging,
) -> Result<(), ShardError> {
    let (all, bytes) = (tiles(read, format), format.tile().bytes);
    for first in all.clone().step_by(PACKED_BYTES / bytes) {
        let part = first..all.end.min(first + PACKED_BYTES / bytes);
        let at = read.at + (first - all.start) * bytes;
        staging.send(&shard.narrow(0, at as i64, (part.len() * bytes) as i64), |_, out| {
            source.read_packed(&read.tensor, format, global, part.clone(), out)?;
            Ok::<_, ShardError>(())
        })?;
    }
    Ok(())
}

/// Entry `entry` of a whole region in `buffer` `[bytes]` u8: a view of its dtype and shape, or of its packed tiles.
fn view(buffer: &Tensor, layout: &RegionLayout, entry: usize) -> Result<Tensor, ShardError> {
    let entry = &layout.entries[entry];
    let bytes = buffer.f_narrow(0, entry.offset as i64, entry.bytes() as i64)?;
    let values = typed(&bytes, entry.spec.storage)?;
    let shape: Vec<i64> = entry.spec.shape.iter().map(|&n| n as i64).collect();
    match entry.spec.storage {
        Storage::Plain(_) => Ok(values.f_view(&shape[..])?),
        Storage::Packed(_) => Ok(values),
    }
}

/// `bytes` `[bytes]` u8 as stored: plain numbers `[elements]` in their dtype, packed ones `[tiles, bytes of a tile]`
/// u8.
pub(super) fn typed(bytes: &Tensor, storage: Storage) -> Result<Tensor, ShardError> {
    Ok(match storage {
        Storage::Plain(dtype) => bytes.f_view_dtype(dtype.kind())?,
        Storage::Packed(format) => bytes.f_view([-1, format.tile().bytes as i64])?,
    })
}
