//! The part of a batch that layers compute with: adapters of its rows, rotary angles of its positions, its attention.

use super::{attend::Attend, rope::RopeSpec, rows::RowAdapters};
use crate::ops::rope::RopeTable;
use std::{cell::RefCell, rc::Rc};
use tch::{Device, Tensor};

/// Most tables that are kept. Dynamic NTK has one for each length of a document beyond the model's.
const MOST_TABLES: usize = 16;

/// Neighbouring tokens of a batch that are of one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub tokens: usize,
    /// Length of the document, up to the last of them.
    pub length: usize,
}

/// cos and sin of each rotary embedding of a model and each length that its frequencies depend on, computed when a
/// layer first asks.
pub struct RotaryTables {
    device: Device,
    tables: RefCell<Vec<((RopeSpec, usize), RopeTable)>>,
}

/// A flat batch as layers need it.
pub struct BatchContext<'a> {
    pub adapters: Rc<RowAdapters>,
    pub attend: &'a dyn Attend,
    pub rotary: Rotary,
}

/// cos and sin at the positions of a batch.
pub struct Rotary {
    tables: Rc<RotaryTables>,
    /// `[tokens]` i64
    positions: Tensor,
    extents: Rc<[Extent]>,
    angles: RefCell<Vec<(RopeSpec, [Tensor; 2])>>,
}

impl RotaryTables {
    /// Empty tables for tensors on `device`.
    pub fn new(device: Device) -> Self {
        Self { device, tables: RefCell::default() }
    }

    /// The angles at `positions` `[tokens]` i64 of the tokens of `extents`.
    pub fn at(self: &Rc<Self>, positions: &Tensor, extents: &Rc<[Extent]>) -> Rotary {
        let (positions, extents) = (positions.shallow_clone(), extents.clone());
        Rotary { tables: self.clone(), positions, extents, angles: RefCell::default() }
    }

    /// cos and sin of `rope` at `positions`, all below `longest`, of documents of `scaled_length`.
    fn of(&self, rope: &RopeSpec, scaled_length: usize, positions: &Tensor, longest: usize) -> [Tensor; 2] {
        let (mut tables, key) = (self.tables.borrow_mut(), (rope.clone(), scaled_length));
        if tables.len() >= MOST_TABLES && tables.iter().all(|(other, _)| *other != key) {
            tables.clear();
        }
        let new = || RopeTable::new(&rope.inv_freq(scaled_length), rope.attention_factor(), self.device);
        let table = index_of(&mut tables, &key, new);
        let (cos, sin) = tables[table].1.at(positions, longest);
        [cos, sin]
    }
}

impl Rotary {
    /// Given angles of one rotary embedding, each `[tokens, 1, rotary / 2]`, of any kind.
    #[cfg(test)]
    pub fn given(rope: RopeSpec, angles: [Tensor; 2]) -> Self {
        let tables = Rc::new(RotaryTables::new(Device::Cpu));
        let positions = Tensor::zeros([0], (tch::Kind::Int64, Device::Cpu));
        Self { tables, positions, extents: Rc::new([]), angles: RefCell::new(vec![(rope, angles)]) }
    }

    /// cos and sin of `rope`, each `[tokens, 1, rotary / 2]` fp32.
    pub fn of(&self, rope: &RopeSpec) -> [Tensor; 2] {
        let mut angles = self.angles.borrow_mut();
        let found = index_of(&mut angles, rope, || self.computed(rope));
        angles[found].1.each_ref().map(Tensor::shallow_clone)
    }

    /// cos and sin of all tokens: one look-up for neighbouring documents with the same frequencies.
    fn computed(&self, rope: &RopeSpec) -> [Tensor; 2] {
        let mut first = 0;
        let same = |a: &Extent, b: &Extent| rope.scaled_length(a.length) == rope.scaled_length(b.length);
        let parts = self.extents.chunk_by(same).map(|extents| {
            let tokens: usize = extents.iter().map(|extent| extent.tokens).sum();
            let longest = extents.iter().map(|extent| extent.length).max().unwrap_or(0);
            let positions = self.positions.narrow(0, first as i64, tokens as i64);
            first += tokens;
            self.tables.of(rope, rope.scaled_length(extents[0].length), &positions, longest)
        });
        let mut parts: Vec<[Tensor; 2]> = parts.collect();
        match parts.len() {
            0 => self.tables.of(rope, rope.scaled_length(0), &self.positions, 0),
            1 => parts.remove(0),
            _ => [0, 1].map(|i| Tensor::cat(&parts.iter().map(|part| &part[i]).collect::<Vec<_>>(), 0)),
        }
    }
}

/// Index of the value of `key`, which `new` makes where there is none. A model has few different keys.
fn index_of<K: PartialEq + Clone, T>(all: &mut Vec<(K, T)>, key: &K, new: impl FnOnce() -> T) -> usize {
    all.iter().position(|(other, _)| other == key).unwrap_or_else(|| {
        all.push((key.clone(), new()));
        all.len() - 1
    })
}
