//! Adapter regions by name: the flat element space of a region with the parameters in it ([`FlatRegion`]), and the
//! piece of it that a rank owns ([`OwnedPiece`]).
//!
//! Optimizers update pieces, and checkpoints store them. Both know regions, parameters and state tensors by name.

use crate::comm::Communicator;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use tch::Tensor;

/// The flat element space of an adapter region, cut into pieces of equal length, one a shard.
///
/// Offsets of parameters do not depend on the world; the length of a piece does. An expert region holds one group of
/// experts after another, each cut over the ranks that have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlatRegion {
    /// `layers.3`, or `layers.3.experts`; unique in an adapter.
    pub name: String,
    /// Elements of a piece.
    pub piece: usize,
    /// Groups of experts that divide the space: shard s owns a piece of group s mod `expert_groups`. 1 in a dense
    /// region.
    pub expert_groups: usize,
    pub parameters: Vec<PlacedParameter>,
}

/// A logical parameter and its first element in the flat space of its region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedParameter {
    /// `model.layers.3.self_attn.q_proj.lora_A`; unique in an adapter.
    pub name: String,
    /// Rows and columns; elements lie row by row.
    pub shape: [usize; 2],
    pub first: usize,
}

impl PlacedParameter {
    /// Its elements in the flat space; `None` where their numbers overflow, as those of a broken file may.
    pub fn elements(&self) -> Option<Range<usize>> {
        let count = self.shape[0].checked_mul(self.shape[1])?;
        Some(self.first..self.first.checked_add(count)?)
    }
}

/// This rank's piece of one adapter region. Tensors are flat, `[piece elements]`.
pub struct OwnedPiece<'a> {
    pub region: &'a FlatRegion,
    /// Elements of the region's flat space that this rank owns.
    pub owned: Range<usize>,
    /// fp32
    pub master: &'a Tensor,
    /// fp32, reduced over all ranks.
    pub gradient: &'a Tensor,
    /// The master in compute dtype, which the region is gathered from; `None` where the region is empty.
    pub compute: Option<Tensor>,
    /// The ranks that own the pieces of this flat space, or of this rank's group of experts. Rank i owns the i-th.
    pub shards: &'a dyn Communicator,
}

/// The part of a parameter that lies in a rank's piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedPart<'a> {
    pub parameter: &'a PlacedParameter,
    /// Elements of the parameter, row by row; all of them where the piece holds the whole parameter.
    pub elements: Range<usize>,
    /// Place of the first of them in the piece.
    pub at: usize,
}

impl<'a> OwnedPiece<'a> {
    /// The parameters of which this rank owns elements, in the order of the region.
    pub fn parts(&self) -> impl Iterator<Item = OwnedPart<'a>> {
        let owned = self.owned.clone();
        self.region.parameters.iter().filter_map(move |parameter| {
            let all = parameter.elements()?;
            let (from, to) = (all.start.max(owned.start), all.end.min(owned.end));
            (from < to).then(|| OwnedPart {
                parameter,
                elements: from - all.start..to - all.start,
                at: from - owned.start,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::World;

    #[test]
    fn parts_are_what_a_border_leaves_of_each_parameter() {
        let placed = |name: &str, shape, first| PlacedParameter { name: name.into(), shape, first };
        let parameters = vec![placed("a", [2, 5], 0), placed("b", [3, 2], 12), placed("c", [1, 4], 20)];
        let region = FlatRegion { name: "layers.0".into(), piece: 8, expert_groups: 1, parameters };
        let (flat, alone) =
            (Tensor::zeros([8], tch::kind::FLOAT_CPU), World::start().unwrap().group("world", 0));
        let parts = |rank: usize| {
            let piece = OwnedPiece {
                region: &region,
                owned: rank * 8..(rank + 1) * 8,
                master: &flat,
                gradient: &flat,
                compute: None,
                shards: &*alone,
            };
            let named = |part: OwnedPart| (part.parameter.name.clone(), part.elements, part.at);
            piece.parts().map(named).collect::<Vec<_>>()
        };
        assert_eq!(parts(0), [("a".into(), 0..8, 0)]);
        assert_eq!(parts(1), [("a".into(), 8..10, 0), ("b".into(), 0..4, 4)]);
        assert_eq!(parts(2), [("b".into(), 4..6, 0), ("c".into(), 0..4, 4)]);
    }

    #[test]
    fn parameters_beyond_all_numbers_have_no_elements() {
        let of = |shape, first| PlacedParameter { name: "a".into(), shape, first }.elements();
        assert_eq!(of([2, 3], 4), Some(4..10));
        assert_eq!(of([usize::MAX, 2], 0), None);
        assert_eq!(of([1, 1], usize::MAX), None);
    }
}
