//! A source with the numbers that its matrices have once they are packed: those that a quantised base computes with.

use super::{
    PackedForm, SourceError, TensorMeta, WeightSource, check_range,
    packed::{grid, read_unpacked},
    unknown,
};
use crate::{dtype::DType, quant::Format};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    ops::Range,
};

/// `source` with some matrices packed. They are packed where they are read, a MiB at a time; matrices that the source
/// has packed stay as they are.
pub struct AsPacked<'a> {
    source: &'a dyn WeightSource,
    /// Formats of the matrices that are packed, by name.
    formats: BTreeMap<String, Format>,
    /// Their scales, as far as they are known.
    scales: RefCell<HashMap<String, f32>>,
}

impl<'a> AsPacked<'a> {
    pub fn new(source: &'a dyn WeightSource, formats: BTreeMap<String, Format>) -> Self {
        Self { source, formats, scales: RefCell::default() }
    }

    /// The scale of the matrix `name`, for which all of it is read once where its format has one.
    fn global(&self, name: &str, format: Format) -> Result<f32, SourceError> {
        if let Some(form) = self.source.packed(name).filter(|form| form.format == format) {
            return Ok(form.global);
        }
        if !format.has_global() {
            return Ok(1.0);
        }
        if let Some(&known) = self.scales.borrow().get(name) {
            return Ok(known);
        }
        let tiles = grid(self.source, name, format)?.tiles();
        let global = format.global(self.source.amax(name, format, 0..tiles)?);
        self.scales.borrow_mut().insert(name.to_owned(), global);
        Ok(global)
    }
}

impl WeightSource for AsPacked<'_> {
    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn meta(&self, name: &str) -> Option<TensorMeta> {
        self.source.meta(name)
    }

    fn read(&self, name: &str, range: Range<usize>, dtype: DType, out: &mut [u8]) -> Result<(), SourceError> {
        let Some(&format) = self.formats.get(name) else {
            return self.source.read(name, range, dtype, out);
        };
        check_range(name, &range, &self.meta(name).ok_or_else(|| unknown(name))?)?;
        let (grid, global) = (grid(self.source, name, format)?, self.global(name, format)?);
        read_unpacked(name, (grid, global), range, dtype, out, |run, packed| {
            self.source.read_packed(name, format, global, run, packed)
        })
    }

    /// `None` too where the scale of the matrix cannot be read; reading its values says why.
    fn packed(&self, name: &str) -> Option<PackedForm> {
        let format = *self.formats.get(name)?;
        Some(PackedForm { format, global: self.global(name, format).ok()? })
    }

    fn read_packed(
        &self,
        name: &str,
        format: Format,
        global: f32,
        tiles: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), SourceError> {
        self.source.read_packed(name, format, global, tiles, out)
    }

    fn amax(&self, name: &str, format: Format, tiles: Range<usize>) -> Result<f32, SourceError> {
        self.source.amax(name, format, tiles)
    }

    fn bytes_read(&self) -> u64 {
        self.source.bytes_read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{quant::Grid, weights::RandomSource};

    #[test]
    fn any_run_of_elements_is_that_of_the_packed_matrix() {
        let (rows, columns) = (150, 272);
        let tensors = ["w", "v"].map(|name| (name.to_owned(), vec![rows, columns])).to_vec();
        let source = RandomSource::new(tensors, 0.02, 3);
        for format in Format::ALL {
            let packed = AsPacked::new(&source, BTreeMap::from([("w".to_owned(), format)]));
            let grid = Grid { format, rows, columns };
            let form = packed.packed("w").unwrap();
            assert_eq!((form.format, form.global == 1.0), (format, !format.has_global()));
            let mut bytes = vec![0; grid.bytes()];
            packed.read_packed("w", format, form.global, 0..grid.tiles(), &mut bytes).unwrap();
            let mut whole = vec![0f32; rows * columns];
            grid.unpack(0..grid.tiles(), &bytes, form.global, &mut whole).unwrap();
            for range in [0..rows * columns, 5..9, 300..40_000, rows * columns - 1..rows * columns] {
                let mut found = vec![0f32; range.len()];
                packed.read("w", range.clone(), DType::F32, bytemuck::cast_slice_mut(&mut found)).unwrap();
                assert!(found == whole[range.clone()], "{format} {range:?}");
                let mut plain = [vec![0f32; range.len()], vec![0f32; range.len()]];
                let sources: [&dyn WeightSource; 2] = [&packed, &source];
                for (source, out) in sources.into_iter().zip(&mut plain) {
                    source.read("v", range.clone(), DType::F32, bytemuck::cast_slice_mut(out)).unwrap();
                }
                assert!(plain[0] == plain[1] && packed.packed("v").is_none());
            }
        }
    }
}
