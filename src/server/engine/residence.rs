//! The adapters in a rank's memory, and those that go to disk when another one needs their room: pure.
//!
//! Every rank has pieces of the same sizes of each adapter, so that rank 0 decides for all.

use crate::server::request::ModelId;
use std::{cmp::Reverse, collections::BTreeMap};

/// Bytes that an adapter takes of a rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// As long as it is in memory.
    pub held: u64,
    /// Beside that, while it is updated or saved. One adapter is at a time.
    pub at_work: u64,
}

/// The adapters with their place.
#[derive(Debug)]
pub struct Residence {
    room: u64,
    turn: u64,
    adapters: BTreeMap<ModelId, Entry>,
}

#[derive(Debug)]
struct Entry {
    need: Need,
    in_memory: bool,
    /// The turn of its last use, and the time.
    used: u64,
    time: u64,
}

/// The adapters that leave memory and those that come back, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Moves {
    pub spill: Vec<ModelId>,
    pub restore: Vec<ModelId>,
}

impl Residence {
    /// No adapters yet; `room` bytes for them on a rank.
    pub fn new(room: u64) -> Self {
        Self { room, turn: 0, adapters: BTreeMap::new() }
    }

    pub fn room(&self) -> u64 {
        self.room
    }

    /// Bytes that the adapters in memory hold.
    pub fn held(&self) -> u64 {
        self.adapters.values().filter(|entry| entry.in_memory).map(|entry| entry.need.held).sum()
    }

    pub fn is_in_memory(&self, model: &ModelId) -> bool {
        self.adapters.get(model).is_some_and(|entry| entry.in_memory)
    }

    pub fn need(&self, model: &ModelId) -> Need {
        self.adapters.get(model).map(|entry| entry.need).unwrap_or_default()
    }

    /// The time at which `model` was used last.
    pub fn last_used(&self, model: &ModelId) -> u64 {
        self.adapters.get(model).map_or(0, |entry| entry.time)
    }

    /// Adds an adapter that is in memory, at `time`.
    pub fn add(&mut self, model: ModelId, need: Need, time: u64) {
        self.turn += 1;
        self.adapters.insert(model, Entry { need, in_memory: true, used: self.turn, time });
    }

    pub fn remove(&mut self, model: &ModelId) {
        self.adapters.remove(model);
    }

    /// Says that `model` is in memory now, or on disk.
    pub fn moved(&mut self, model: &ModelId, in_memory: bool) {
        if let Some(entry) = self.adapters.get_mut(model) {
            entry.in_memory = in_memory;
        }
    }

    /// Says that `models` are used, at `time`.
    pub fn used(&mut self, models: &[ModelId], time: u64) {
        self.turn += 1;
        for model in models {
            if let Some(entry) = self.adapters.get_mut(model) {
                (entry.used, entry.time) = (self.turn, time);
            }
        }
    }

    /// True if an adapter of `need` fits with no other in memory.
    pub fn fits_alone(&self, need: Need) -> bool {
        fits(self.room, [need])
    }

    /// True if `models` fit in memory with no other.
    pub fn fit_together(&self, models: &[&ModelId]) -> bool {
        fits(self.room, models.iter().map(|model| self.need(model)))
    }

    /// The moves after which `wanted` are in memory, with room for one more of `new`. Those leave that were used
    /// longest ago, and no more than have to. `None`: all of it has no room.
    pub fn moves(&self, wanted: &[ModelId], new: Option<Need>) -> Option<Moves> {
        let is_wanted = |model: &ModelId| wanted.contains(model);
        let restore: Vec<ModelId> =
            wanted.iter().filter(|model| !self.is_in_memory(model)).cloned().collect();
        let fixed: Vec<Need> = wanted.iter().map(|model| self.need(model)).chain(new).collect();
        let mut others: Vec<(&ModelId, &Entry)> =
            self.adapters.iter().filter(|(model, entry)| entry.in_memory && !is_wanted(model)).collect();
        others.sort_by_key(|(_, entry)| Reverse(entry.used));
        let mut spill = Vec::new();
        // Without anything new nothing has to leave: what is in memory has been let in.
        let grows = new.is_some() || !restore.is_empty();
        while grows && !fits(self.room, fixed.iter().copied().chain(others.iter().map(|other| other.1.need)))
        {
            spill.push(others.pop()?.0.clone());
        }
        Some(Moves { spill, restore })
    }
}

/// True if adapters of `needs` fit in `room` together: what all hold, and the work of the largest.
fn fits(room: u64, needs: impl IntoIterator<Item = Need>) -> bool {
    let (held, at_work) = needs.into_iter().fold((0, 0), |(held, at_work): (u64, u64), need| {
        (held.saturating_add(need.held), at_work.max(need.at_work))
    });
    held.saturating_add(at_work) <= room
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> ModelId {
        ModelId::new(name).unwrap()
    }

    fn ids(names: &[&str]) -> Vec<ModelId> {
        names.iter().map(|name| id(name)).collect()
    }

    fn need(held: u64, at_work: u64) -> Need {
        Need { held, at_work }
    }

    /// a, b and c of 3 bytes each in memory, b used last.
    fn three(room: u64) -> Residence {
        let mut residence = Residence::new(room);
        for name in ["b", "a", "c"] {
            residence.add(id(name), need(3, 1), 10);
        }
        residence.used(&ids(&["b"]), 11);
        residence
    }

    #[test]
    fn those_used_longest_ago_make_room_and_no_more_than_have_to() {
        let residence = three(10);
        let moves = |wanted: &[&str], new| {
            let moves: Option<Moves> = residence.moves(&ids(wanted), new);
            moves.map(|moves| moves.spill)
        };
        assert_eq!(moves(&["a", "b", "c"], None), Some(vec![]));
        assert_eq!(moves(&[], Some(need(1, 0))), Some(ids(&["a"])));
        assert_eq!(moves(&[], Some(need(4, 1))), Some(ids(&["a", "c"])));
        assert_eq!(moves(&[], Some(need(9, 1))), Some(ids(&["a", "c", "b"])));
        assert_eq!(moves(&[], Some(need(9, 2))), None);
        assert_eq!(moves(&["a"], Some(need(1, 3))), Some(ids(&["c"])));
        assert_eq!((residence.held(), residence.room()), (9, 10));
        assert_eq!(["a", "b", "x"].map(|name| residence.last_used(&id(name))), [10, 11, 0]);
    }

    #[test]
    fn an_adapter_comes_back_in_place_of_another() {
        let mut residence = three(10);
        residence.moved(&id("a"), false);
        residence.add(id("d"), need(3, 1), 12);
        assert_eq!(residence.moves(&ids(&["d"]), None), Some(Moves::default()));
        let moves = residence.moves(&ids(&["a", "b"]), None).unwrap();
        assert_eq!((moves.spill, moves.restore), (ids(&["c"]), ids(&["a"])));
        residence.remove(&id("c"));
        let moves = residence.moves(&ids(&["a", "b"]), None).unwrap();
        assert_eq!((moves.spill, moves.restore), (vec![], ids(&["a"])));
    }

    #[test]
    fn the_work_of_the_largest_counts_once() {
        let residence = three(10);
        let (a, b, c) = (id("a"), id("b"), id("c"));
        assert!(residence.fit_together(&[&a, &b, &c]));
        assert!(!three(9).fit_together(&[&a, &b, &c]) && three(9).fit_together(&[&a, &b]));
        assert!(residence.fits_alone(need(8, 2)) && !residence.fits_alone(need(9, 2)));
        assert!(!residence.fits_alone(need(u64::MAX, 2)));
    }
}
