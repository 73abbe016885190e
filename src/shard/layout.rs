//! Layout of regions: the owner of each byte of each tensor. Pure: no tensors, no ranks of a real run.
//!
//! A region is one flat buffer: tensors one after another, each aligned, the whole padded so that it cuts into
//! equal pieces. Rank i of the shard group owns the i-th contiguous piece, so that one all-gather of the pieces
//! *is* the buffer that a unit computes from. Offsets do not depend on the number of shards; only the padding at
//! the end does, which is what lets any world read what another world stored.

use super::storage::Storage;
use crate::{dtype::DType, mesh::Mesh};
use std::ops::Range;

/// Alignment of a tensor in a base region (bytes): a cache line, and what vector loads like.
pub const BASE_ALIGN: usize = 64;

/// Kind of region of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Region {
    /// Cut over a block.
    Dense,
    /// Tensors of single experts: cut over the ranks of a block that have the same experts.
    Experts,
}

impl Region {
    /// Ranks over which a region of this kind is cut.
    pub fn shards(self, mesh: &Mesh) -> usize {
        match self {
            Self::Dense => mesh.block(),
            Self::Experts => mesh.block() / mesh.expert(),
        }
    }
}

/// A run of a region's tensor that comes from one tensor of the model files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Name in the model files.
    pub tensor: String,
    /// First element of the run in that tensor (elements).
    pub start: usize,
    /// Its length (elements).
    pub elements: usize,
}

/// A tensor of a region, made of spans in row order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntrySpec {
    pub name: String,
    pub shape: Vec<usize>,
    pub storage: Storage,
    pub spans: Vec<Span>,
}

impl EntrySpec {
    /// The whole tensor `tensor` of the model files, in plain numbers.
    pub fn whole(name: &str, tensor: String, shape: &[usize], dtype: DType) -> Self {
        let span = Span { tensor, start: 0, elements: shape.iter().product() };
        Self { name: name.into(), shape: shape.to_vec(), storage: Storage::Plain(dtype), spans: vec![span] }
    }
}

/// A placed tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub spec: EntrySpec,
    /// First byte in the region.
    pub offset: usize,
}

impl Entry {
    pub fn elements(&self) -> usize {
        self.spec.shape.iter().product()
    }

    /// Bytes of the tensor, padding not included. Each span of a packed tensor begins with a tile of its own.
    pub fn bytes(&self) -> usize {
        let EntrySpec { storage, spans, .. } = &self.spec;
        match spans.is_empty() {
            true => storage.bytes(self.elements()),
            false => spans.iter().map(|span| storage.bytes(span.elements)).sum(),
        }
    }
}

/// A run of elements of one file tensor that lies in a rank's piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Name in the model files.
    pub tensor: String,
    /// Elements of that tensor.
    pub range: Range<usize>,
    pub storage: Storage,
    /// First byte in the rank's piece.
    pub at: usize,
}

/// One flat buffer of a unit, cut over a shard group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionLayout {
    pub name: String,
    pub entries: Vec<Entry>,
    /// Bytes of the whole buffer: a multiple of shards × the alignment of all entries, so that a shard border cuts no
    /// tile.
    pub padded: usize,
    pub shards: usize,
}

impl RegionLayout {
    /// Places `specs` one after another at multiples of `align` bytes, packed ones at multiples of their tile too.
    pub fn new(name: impl Into<String>, specs: Vec<EntrySpec>, shards: usize, align: usize) -> Self {
        let align = specs.iter().fold(align, |align, spec| spec.storage.align(align));
        let mut end = 0usize;
        let mut entries = Vec::with_capacity(specs.len());
        for spec in specs {
            let offset = end.next_multiple_of(align);
            let entry = Entry { spec, offset };
            end = offset + entry.bytes();
            entries.push(entry);
        }
        Self { name: name.into(), entries, padded: end.next_multiple_of(align * shards), shards }
    }

    /// Bytes that each rank owns.
    pub fn piece_bytes(&self) -> usize {
        self.padded / self.shards
    }

    /// The region's bytes that `rank` of the shard group owns.
    pub fn piece(&self, rank: usize) -> Range<usize> {
        let bytes = self.piece_bytes();
        rank * bytes..(rank + 1) * bytes
    }

    /// Runs of file tensors in the piece of `rank`: the plan for reading it, and for writing a merged base back. Every
    /// element of every entry is in exactly one rank's list.
    pub fn reads(&self, rank: usize) -> Vec<Piece> {
        let own = self.piece(rank);
        let mut reads = Vec::new();
        for entry in &self.entries {
            let storage = entry.spec.storage;
            let mut begin = entry.offset;
            for span in &entry.spec.spans {
                let end = begin + storage.bytes(span.elements);
                let (from, to) = (begin.max(own.start), end.min(own.end));
                if from < to {
                    let element = |byte| span.start + storage.element_at(byte - begin).min(span.elements);
                    let (tensor, at) = (span.tensor.clone(), from - own.start);
                    reads.push(Piece { tensor, range: element(from)..element(to), storage, at });
                }
                begin = end;
            }
        }
        reads
    }

    /// The entry called `name`.
    pub fn index(&self, name: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.spec.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Format;
    use proptest::prelude::*;

    fn spec(name: &str, shape: &[usize], dtype: DType) -> EntrySpec {
        EntrySpec::whole(name, name.into(), shape, dtype)
    }

    #[test]
    fn borders_may_cut_a_tensor_and_a_span() {
        let fused = EntrySpec {
            name: "qkv".into(),
            shape: vec![6, 5],
            storage: Storage::Plain(DType::F32),
            spans: vec![
                Span { tensor: "q".into(), start: 0, elements: 20 },
                Span { tensor: "k".into(), start: 0, elements: 10 },
            ],
        };
        let layout = RegionLayout::new("layer", vec![fused], 3, 16);
        assert_eq!((layout.padded, layout.piece_bytes()), (144, 48));
        let piece = |tensor: &str, range, at| Piece {
            tensor: tensor.into(),
            range,
            storage: Storage::Plain(DType::F32),
            at,
        };
        assert_eq!(layout.reads(0), [piece("q", 0..12, 0)]);
        assert_eq!(layout.reads(1), [piece("q", 12..20, 0), piece("k", 0..4, 32)]);
        assert_eq!(layout.reads(2), [piece("k", 4..10, 0)]);
    }

    #[test]
    fn spans_of_a_packed_tensor_have_tiles_of_their_own() {
        let packed = Storage::Packed(Format::Nf4);
        let span = |tensor: &str, elements| Span { tensor: tensor.into(), start: 0, elements };
        let fused = EntrySpec {
            name: "qkv".into(),
            shape: vec![240, 10],
            storage: packed,
            spans: vec![span("q", 1600), span("k", 480), span("v", 320)],
        };
        let layout = RegionLayout::new("layer", vec![fused, spec("norm", &[3], DType::F32)], 1, BASE_ALIGN);
        // Two tiles of q, one each of k and v.
        assert_eq!(layout.entries[0].bytes(), 4 * 576);
        assert!(layout.entries[1].offset >= 4 * 576);
        let read = |tensor: &str, range, at| Piece { tensor: tensor.into(), range, storage: packed, at };
        assert_eq!(
            layout.reads(0)[..3],
            [read("q", 0..1600, 0), read("k", 0..480, 2 * 576), read("v", 0..320, 3 * 576)]
        );
    }

    #[test]
    fn a_rank_may_own_nothing_but_padding() {
        let layout = RegionLayout::new("tiny", vec![spec("norm", &[3], DType::F32)], 4, 64);
        assert_eq!(layout.padded, 256);
        assert_eq!(layout.reads(0).len(), 1);
        assert!((1..4).all(|rank| layout.reads(rank).is_empty()));
    }

    proptest! {
        #[test]
        fn reads_tile_every_tensor_and_borders_cut_no_tile(
            shapes in prop::collection::vec((1usize..40, 1usize..40, 0usize..5), 1..6),
            shards in 1usize..9,
        ) {
            let storages = [
                Storage::Plain(DType::F32),
                Storage::Plain(DType::Bf16),
                Storage::Packed(Format::Nf4),
                Storage::Packed(Format::NvFp4),
                Storage::Packed(Format::BlockFp8),
            ];
            let specs: Vec<_> = shapes.iter().enumerate().map(|(i, &(rows, columns, storage))| EntrySpec {
                storage: storages[storage],
                ..spec(&i.to_string(), &[rows, columns], DType::F32)
            }).collect();
            let layout = RegionLayout::new("unit", specs, shards, BASE_ALIGN);
            prop_assert_eq!(layout.padded % (BASE_ALIGN * shards), 0);
            let mut end = 0;
            for entry in &layout.entries {
                let (storage, tile) = (entry.spec.storage, entry.spec.storage.tile());
                prop_assert!(entry.offset % BASE_ALIGN == 0 && entry.offset >= end);
                end = entry.offset + entry.bytes();
                let mut next = 0;
                for rank in 0..shards {
                    for read in layout.reads(rank).into_iter().filter(|read| read.tensor == entry.spec.name) {
                        prop_assert_eq!(read.range.start, next);
                        prop_assert_eq!(read.range.start % tile.elements, 0);
                        prop_assert_eq!(layout.piece(rank).start + read.at, entry.offset + storage.bytes(read.range.start));
                        prop_assert!(read.at + storage.bytes(read.range.len()) <= layout.piece_bytes());
                        next = read.range.end;
                    }
                }
                prop_assert_eq!(next, entry.elements());
            }
            prop_assert!(end <= layout.padded);
        }
    }
}
