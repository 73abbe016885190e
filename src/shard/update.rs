//! Changes of frozen tensors on the ranks that own them, as merges make them, and the scales of packed matrices.

use super::{EntrySpec, Piece, RegionLayout, ShardError, SlotPool, Storage, slots::typed};
use crate::comm::Reduce;
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// The scale beside the tiles of a matrix, before a change and after it; 1 where its format has none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scales {
    pub before: f32,
    pub after: f32,
}

/// A change of frozen tensors ([`SlotPool::update`]). `stored` is a view of the values that a piece has: plain ones
/// `[elements]`, packed ones `[tiles, bytes]` u8.
pub trait Change {
    /// The largest magnitude that `piece` will have, of a matrix in a format with a scale `before` of the matrix. The
    /// largest of all ranks makes the new scale; `None` of all of them keeps the old one.
    ///
    /// # Errors
    /// Those of the change.
    fn amax(&mut self, _piece: &Piece, _stored: &Tensor, _before: f32) -> Result<Option<f32>, ShardError> {
        Ok(None)
    }

    /// Changes `stored` in place.
    ///
    /// # Errors
    /// Those of the change.
    fn apply(&mut self, piece: &Piece, stored: &Tensor, scales: Scales) -> Result<(), ShardError>;
}

/// A function that keeps the scales of matrices.
impl<F: FnMut(&Piece, &Tensor) -> Result<(), ShardError>> Change for F {
    fn apply(&mut self, piece: &Piece, stored: &Tensor, _scales: Scales) -> Result<(), ShardError> {
        self(piece, stored)
    }
}

/// The first byte in the region of the scale of each matrix that has one, by name.
fn scale_places(layout: &RegionLayout) -> impl Iterator<Item = (&str, usize)> {
    let pairs = layout.entries.windows(2).filter(|pair| has_scales(&pair[0].spec));
    pairs.flat_map(|pair| {
        let spans = pair[0].spec.spans.iter().enumerate();
        spans.map(|(i, span)| (span.tensor.as_str(), pair[1].offset + i * size_of::<f32>()))
    })
}

fn has_scales(spec: &EntrySpec) -> bool {
    matches!(spec.storage, Storage::Packed(format) if format.has_global())
}

impl SlotPool {
    /// Changes this rank's piece of `unit` in place: `change` gets each range of a tensor that the piece holds
    /// ([`RegionLayout::reads`]). The next gather of every rank shows the new values. Collective: every rank calls it
    /// for the same units in the same order.
    ///
    /// # Errors
    /// The error of `change`, [`ShardError::UpdateElsewhere`] on the other ranks, or the error of a collective. The
    /// pieces of the unit are then partly changed.
    pub fn update(&mut self, unit: usize, change: &mut impl Change) -> Result<(), ShardError> {
        self.invalidate()?;
        // Shared pieces are read where they lie: no rank may still compute from them, nor read them half changed.
        self.comm.barrier()?;
        let before = self.scales(unit)?;
        let mut after = before.clone();
        let measured = self.new_scales(unit, &mut after, change)?;
        let scale = |scales: &BTreeMap<String, f32>, name: &str| scales.get(name).copied().unwrap_or(1.0);
        let changed = measured.and_then(|()| {
            self.visit(unit, |piece, stored| {
                let name = &piece.tensor;
                change.apply(
                    piece,
                    stored,
                    Scales { before: scale(&before, name), after: scale(&after, name) },
                )
            })?;
            self.put_scales(&self.layouts[unit], &after, &self.shards[unit])
        });
        // A rank that failed says so in place of the barrier: no other waits for it.
        let mut failed = [f64::from(u8::from(changed.is_err()))];
        self.comm.all_reduce_host(&mut failed, Reduce::Max)?;
        changed?;
        if failed[0] > 0.0 { Err(ShardError::UpdateElsewhere { unit }) } else { Ok(()) }
    }

    /// Replaces `scales` by those after `change`. Collective if there is one. The result within is that of `change` on
    /// this rank: it has to wait until all ranks have been here.
    fn new_scales(
        &self,
        unit: usize,
        scales: &mut BTreeMap<String, f32>,
        change: &mut impl Change,
    ) -> Result<Result<(), ShardError>, ShardError> {
        if scales.is_empty() {
            return Ok(Ok(()));
        }
        // Below 0: nothing is said.
        let mut most: BTreeMap<&str, f64> = scales.keys().map(|name| (name.as_str(), -1.0)).collect();
        let measured = self.visit(unit, |piece, stored| {
            if let (Some(most), Some(&before)) =
                (most.get_mut(piece.tensor.as_str()), scales.get(&piece.tensor))
            {
                *most = change.amax(piece, stored, before)?.map_or(*most, |own| most.max(own.into()));
            }
            Ok::<_, ShardError>(())
        });
        let mut all: Vec<f64> = most.into_values().collect();
        self.comm.all_reduce_host(&mut all, Reduce::Max)?;
        let formats = self.layouts[unit].entries.iter().filter(|entry| has_scales(&entry.spec));
        let formats: BTreeMap<&str, Storage> = formats
            .flat_map(|entry| entry.spec.spans.iter().map(|span| (span.tensor.as_str(), entry.spec.storage)))
            .collect();
        for ((name, scale), most) in scales.iter_mut().zip(all) {
            if let (true, Some(Storage::Packed(format))) = (most >= 0.0, formats.get(name.as_str())) {
                *scale = format.global(most as f32);
            }
        }
        Ok(measured)
    }

    /// The scale beside the tiles of each matrix of `unit` that has one, by name. Collective if there is such a matrix.
    ///
    /// # Errors
    /// That of the collective.
    pub fn scales(&self, unit: usize) -> Result<BTreeMap<String, f32>, ShardError> {
        let layout = &self.layouts[unit];
        let (own, mut scales) = (layout.piece(self.comm.rank()), BTreeMap::new());
        for (name, place) in scale_places(layout) {
            let mut scale = 0f64;
            if own.contains(&place) {
                let bytes =
                    self.shards[unit].f_narrow(0, (place - own.start) as i64, size_of::<f32>() as i64)?;
                scale = bytes.f_view_dtype(Kind::Float)?.f_to_device(Device::Cpu)?.f_double_value(&[0])?;
            }
            scales.insert(name.to_owned(), scale);
        }
        if scales.is_empty() {
            return Ok(BTreeMap::new());
        }
        let mut all: Vec<f64> = scales.values().copied().collect();
        self.comm.all_reduce_host(&mut all, Reduce::Max)?;
        Ok(scales.into_keys().zip(all).map(|(name, scale)| (name, scale as f32)).collect())
    }

    /// Writes what this rank owns of the matrices' scales.
    pub(super) fn put_scales(
        &self,
        layout: &RegionLayout,
        scales: &BTreeMap<String, f32>,
        shard: &Tensor,
    ) -> Result<(), ShardError> {
        let own = layout.piece(self.comm.rank());
        for (name, place) in scale_places(layout).filter(|(_, place)| own.contains(place)) {
            let Some(scale) = scales.get(name) else { continue };
            let target = shard.f_narrow(0, (place - own.start) as i64, size_of::<f32>() as i64)?;
            target.f_view_dtype(Kind::Float)?.f_copy_(&Tensor::f_from_slice(&[*scale])?)?;
        }
        Ok(())
    }

    /// Calls `each` with each range of a tensor that this rank's piece of `unit` holds, and its values as [`Change`]
    /// has them.
    ///
    /// # Errors
    /// Those of `each`.
    pub fn visit<E: From<ShardError>>(
        &self,
        unit: usize,
        mut each: impl FnMut(&Piece, &Tensor) -> Result<(), E>,
    ) -> Result<(), E> {
        self.layouts[unit].reads(self.comm.rank()).iter().try_for_each(|piece| {
            let bytes = piece.storage.bytes(piece.range.len()) as i64;
            let values = self.shards[unit].f_narrow(0, piece.at as i64, bytes).map_err(ShardError::from)?;
            each(piece, &typed(&values, piece.storage)?)
        })
    }
}
