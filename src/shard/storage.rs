//! Storage of a tensor's elements: plain numbers, or packed blocks of codes with their scales. Pure.

use crate::{
    dtype::DType,
    quant::{Format, Tile},
};

/// Storage of a tensor's elements in a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Numbers of a dtype, one after another.
    Plain(DType),
    /// Whole tiles one after another, each with its scales; the last may be filled up. Elements are counted tile by
    /// tile, those that fill up squares at the edges of a matrix too. A format with a scale of the matrix has it in the
    /// next entry of the region, in fp32, one for each span.
    Packed(Format),
}

impl Storage {
    /// Its tile; of plain numbers, the elements of 64 bytes.
    pub fn tile(self) -> Tile {
        match self {
            Self::Plain(dtype) => {
                Tile { elements: super::layout::BASE_ALIGN / dtype.size(), bytes: super::layout::BASE_ALIGN }
            }
            Self::Packed(format) => format.tile(),
        }
    }

    /// Bytes of `elements` elements.
    pub fn bytes(self, elements: usize) -> usize {
        match self {
            Self::Plain(dtype) => elements * dtype.size(),
            Self::Packed(format) => elements.div_ceil(format.tile().elements) * format.tile().bytes,
        }
    }

    /// First element at byte `byte`, a border of elements or tiles.
    pub fn element_at(self, byte: usize) -> usize {
        match self {
            Self::Plain(dtype) => byte / dtype.size(),
            Self::Packed(format) => byte / format.tile().bytes * format.tile().elements,
        }
    }

    /// Alignment in bytes of its entries and of shard borders, given that of plain numbers.
    pub fn align(self, plain: usize) -> usize {
        match self {
            Self::Plain(_) => plain,
            Self::Packed(format) => least_common_multiple(plain, format.tile().bytes),
        }
    }
}

/// The least common multiple of two positive numbers.
pub(super) fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_tiles_of_each_storage() {
        let bf16 = Storage::Plain(DType::Bf16);
        assert_eq!((bf16.tile(), bf16.bytes(5)), (Tile { elements: 32, bytes: 64 }, 10));
        let packed = Storage::Packed(Format::Nf4);
        assert_eq!([0, 1, 1024, 1025].map(|n| packed.bytes(n)), [0, 576, 576, 1152]);
        assert_eq!((packed.element_at(1152), packed.align(64), bf16.align(64)), (2048, 576, 64));
    }
}
