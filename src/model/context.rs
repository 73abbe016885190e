//! The part of a batch that layers compute with: adapters of its rows, rotary angles of its positions, its attention.

use super::{attend::Attend, rows::RowAdapters, spec::RopeSpec};
use crate::ops::rope::RopeTable;
use std::{cell::RefCell, rc::Rc};
use tch::{Device, Tensor};

/// cos and sin of each rotary embedding of a model, computed when a layer first asks.
pub struct RotaryTables {
    device: Device,
    tables: RefCell<Vec<(RopeSpec, RopeTable)>>,
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
    /// `[tokens]` i64, all below `longest`.
    positions: Tensor,
    longest: usize,
    angles: RefCell<Vec<(RopeSpec, [Tensor; 2])>>,
}

impl RotaryTables {
    /// Empty tables for tensors on `device`.
    pub fn new(device: Device) -> Self {
        Self { device, tables: RefCell::default() }
    }

    /// The angles at `positions` `[tokens]` i64, all below `longest`.
    pub fn at(self: &Rc<Self>, positions: &Tensor, longest: usize) -> Rotary {
        let positions = positions.shallow_clone();
        Rotary { tables: self.clone(), positions, longest, angles: RefCell::default() }
    }
}

impl Rotary {
    /// Given angles of one rotary embedding, each `[tokens, 1, rotary / 2]`, of any kind.
    #[cfg(test)]
    pub fn given(rope: RopeSpec, angles: [Tensor; 2]) -> Self {
        let tables = Rc::new(RotaryTables::new(Device::Cpu));
        let positions = Tensor::zeros([0], (tch::Kind::Int64, Device::Cpu));
        Self { tables, positions, longest: 0, angles: RefCell::new(vec![(rope, angles)]) }
    }

    /// cos and sin of `rope`, each `[tokens, 1, rotary / 2]` fp32.
    pub fn of(&self, rope: &RopeSpec) -> [Tensor; 2] {
        let mut angles = self.angles.borrow_mut();
        let found = index_of(&mut angles, rope, || {
            let mut tables = self.tables.tables.borrow_mut();
            let new = || RopeTable::new(&rope.inv_freq(), self.tables.device);
            let table = index_of(&mut tables, rope, new);
            let (cos, sin) = tables[table].1.at(&self.positions, self.longest);
            [cos, sin]
        });
        angles[found].1.each_ref().map(Tensor::shallow_clone)
    }
}

/// Index of the value of `key`, which `new` makes where there is none. A model has few different keys.
fn index_of<T>(all: &mut Vec<(RopeSpec, T)>, key: &RopeSpec, new: impl FnOnce() -> T) -> usize {
    all.iter().position(|(other, _)| other == key).unwrap_or_else(|| {
        all.push((*key, new()));
        all.len() - 1
    })
}
