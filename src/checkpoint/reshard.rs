//! From the pieces that one world stored to the pieces that another one owns: pure range arithmetic.
//!
//! Masters and moments of a unit share one flat element space that is cut into equal pieces. Where a parameter lies
//! in it does not depend on the world; only the length of a piece does. Parameters are matched by name all the same,
//! because fused and split GEMMs order them differently and compute the same.

use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// One unit's flat element space and how it is cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitLayout {
    /// Elements that each shard owns.
    pub piece: usize,
    pub parameters: Vec<PlacedParameter>,
}

/// A logical parameter and its first element in its unit's flat space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacedParameter {
    /// `model.layers.3.self_attn.q_proj.lora_A`
    pub name: String,
    pub shape: [usize; 2],
    pub first: usize,
}

impl PlacedParameter {
    /// Its elements in the unit's flat space, or `None` if their numbers are none that memory could hold.
    pub(super) fn elements(&self) -> Option<Range<usize>> {
        let count = self.shape[0].checked_mul(self.shape[1])?;
        Some(self.first..self.first.checked_add(count)?)
    }
}

/// A run of elements to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// The stored shard and unit that have it, and where in that piece.
    pub shard: usize,
    pub stored_unit: usize,
    pub from: Range<usize>,
    /// The unit that takes it, and where in this rank's piece.
    pub unit: usize,
    pub to: usize,
}

/// Whether `units`, cut into `shards`, hold their parameters: what is read from a file may claim anything.
pub fn check(units: &[UnitLayout], shards: usize) -> Result<(), String> {
    if shards == 0 {
        return Err("it was cut into 0 shards".into());
    }
    let mut names = BTreeSet::new();
    for (index, unit) in units.iter().enumerate() {
        let all = unit.piece.checked_mul(shards).ok_or("its pieces are larger than memory")?;
        for parameter in &unit.parameters {
            let name = &parameter.name;
            if parameter.elements().is_none_or(|elements| elements.end > all) {
                return Err(format!("{name} reaches past the {all} elements of unit {index}"));
            }
            if !names.insert(name) {
                return Err(format!("{name} is there twice"));
            }
        }
    }
    Ok(())
}

/// What shard `shard` of the `own` layout copies from `stored` pieces; both have passed [`check`].
///
/// # Errors
/// In which parameters the two differ, in one line.
pub fn plan(stored: &[UnitLayout], own: &[UnitLayout], shard: usize) -> Result<Vec<Move>, String> {
    let placed = stored.iter().enumerate();
    let mut by_name: BTreeMap<&str, (usize, &PlacedParameter)> = placed
        .flat_map(|(unit, layout)| layout.parameters.iter().map(move |p| (p.name.as_str(), (unit, p))))
        .collect();
    let (mut moves, mut faults) = (Vec::new(), Vec::new());
    for (unit, layout) in own.iter().enumerate() {
        for parameter in &layout.parameters {
            let PlacedParameter { name, shape, first } = parameter;
            match by_name.remove(name.as_str()) {
                None => faults.push(format!("{name} is missing")),
                Some((_, found)) if found.shape != *shape => {
                    faults.push(format!("{name} is {:?}, expected {shape:?}", found.shape));
                }
                Some((stored_unit, found)) => {
                    let piece = shard * layout.piece..(shard + 1) * layout.piece;
                    let all = *first..first + shape[0] * shape[1];
                    let mine = all.start.max(piece.start)..all.end.min(piece.end);
                    // The same elements in the stored flat space, cut where its pieces end.
                    let stored_piece = stored[stored_unit].piece;
                    let mut at = mine.start;
                    while at < mine.end {
                        let source = found.first + (at - first);
                        let (shard, from) = (source / stored_piece, source % stored_piece);
                        let count = (mine.end - at).min(stored_piece - from);
                        let to = at - piece.start;
                        moves.push(Move { shard, stored_unit, from: from..from + count, unit, to });
                        at += count;
                    }
                }
            }
        }
    }
    faults.extend(by_name.keys().map(|name| format!("{name} is surplus")));
    if faults.is_empty() { Ok(moves) } else { Err(in_one_line(faults)) }
}

/// The first few of a list that may be as long as the model.
fn in_one_line(mut faults: Vec<String>) -> String {
    const SHOWN: usize = 4;
    if faults.len() > SHOWN {
        let more = faults.len() - SHOWN;
        faults.truncate(SHOWN);
        faults.push(format!("and {more} more"));
    }
    faults.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALIGN: usize = 4;

    /// Units of parameters laid out one after another, aligned, padded and cut as regions are.
    fn layout(units: &[Vec<[usize; 2]>], shards: usize) -> Vec<UnitLayout> {
        let unit = |(u, shapes): (usize, &Vec<[usize; 2]>)| {
            let mut end = 0usize;
            let place = |(i, shape): (usize, &[usize; 2])| {
                let first = end.next_multiple_of(ALIGN);
                end = first + shape[0] * shape[1];
                PlacedParameter { name: format!("{u}.{i}"), shape: *shape, first }
            };
            let parameters = shapes.iter().enumerate().map(place).collect();
            UnitLayout { piece: end.next_multiple_of(ALIGN * shards) / shards, parameters }
        };
        units.iter().enumerate().map(unit).collect()
    }

    /// A value that says which element of which parameter it is.
    fn value(name: &str, element: usize) -> f64 {
        let code: u64 = name.bytes().fold(7, |code, byte| code * 31 + u64::from(byte));
        code as f64 * 1e5 + element as f64
    }

    /// The pieces of shard `shard`, by unit.
    fn pieces(units: &[UnitLayout], shard: usize) -> Vec<Vec<f64>> {
        let unit = |unit: &UnitLayout| {
            let mut piece = vec![0.0; unit.piece];
            for parameter in &unit.parameters {
                for (element, at) in parameter.elements().unwrap().enumerate() {
                    if at / unit.piece == shard {
                        piece[at % unit.piece] = value(&parameter.name, element);
                    }
                }
            }
            piece
        };
        units.iter().map(unit).collect()
    }

    /// What shard `shard` of `own` has after making its moves out of `stored` over `shards`.
    fn moved(stored: &[UnitLayout], shards: usize, own: &[UnitLayout], shard: usize) -> Vec<Vec<f64>> {
        let files: Vec<_> = (0..shards).map(|shard| pieces(stored, shard)).collect();
        let mut mine: Vec<_> = own.iter().map(|unit| vec![0.0; unit.piece]).collect();
        for Move { shard, stored_unit, from, unit, to } in plan(stored, own, shard).unwrap() {
            mine[unit][to..to + from.len()].copy_from_slice(&files[shard][stored_unit][from]);
        }
        mine
    }

    #[test]
    fn two_shards_become_three() {
        let shapes = [vec![[2, 3], [5, 2]]];
        let (two, three) = (layout(&shapes, 2), layout(&shapes, 3));
        assert_eq!((two[0].piece, three[0].piece), (12, 8));
        let moves = plan(&two, &three, 1).unwrap();
        let expected = |shard, from: Range<usize>, to| Move { shard, stored_unit: 0, from, unit: 0, to };
        assert_eq!(moves, [expected(0, 8..12, 0), expected(1, 0..4, 4)]);
    }

    #[test]
    fn split_and_fused_layouts_exchange_by_name() {
        let split = layout(&[vec![[2, 3], [4, 2], [2, 3], [2, 2]]], 2);
        let mut fused = split.clone();
        // Fused: the two A's are neighbours.
        for (parameter, first) in fused[0].parameters.iter_mut().zip([0, 12, 6, 20]) {
            parameter.first = first;
        }
        for shard in 0..2 {
            assert_eq!(moved(&split, 2, &fused, shard), pieces(&fused, shard));
        }
    }

    #[test]
    fn what_differs_is_named() {
        let stored = layout(&[vec![[2, 3], [5, 2]], vec![[1, 1]]], 1);
        let mut own = layout(&[vec![[2, 3], [5, 2]]], 1);
        own[0].parameters[1].shape = [5, 4];
        own[0].parameters[0].name = "other".into();
        let message = plan(&stored, &own, 0).unwrap_err();
        for part in ["other is missing", "0.1 is [5, 2], expected [5, 4]", "0.0 is surplus", "1.0 is surplus"]
        {
            assert!(message.contains(part), "{part} in {message}");
        }
    }

    #[test]
    fn layouts_that_cannot_be_are_refused() {
        let good = layout(&[vec![[2, 3]]], 2);
        assert_eq!(check(&good, 2), Ok(()));
        assert!(check(&good, 0).is_err());
        let with = |change: &dyn Fn(&mut UnitLayout)| {
            let mut units = good.clone();
            change(&mut units[0]);
            check(&units, 2)
        };
        assert!(with(&|unit| unit.piece = 2).is_err());
        assert!(with(&|unit| unit.piece = usize::MAX).is_err());
        assert!(with(&|unit| unit.parameters[0].first = usize::MAX).is_err());
        assert!(with(&|unit| unit.parameters[0].shape = [usize::MAX, 2]).is_err());
        assert!(with(&|unit| unit.parameters.push(unit.parameters[0].clone())).is_err());
    }

    proptest! {
        #[test]
        fn every_element_arrives_whatever_the_worlds(
            shapes in prop::collection::vec(prop::collection::vec([1usize..9, 1usize..9], 0..4), 1..4),
            from in 1usize..9, to in 1usize..9,
        ) {
            let (stored, own) = (layout(&shapes, from), layout(&shapes, to));
            prop_assert_eq!(check(&stored, from), Ok(()));
            for shard in 0..to {
                prop_assert_eq!(moved(&stored, from, &own, shard), pieces(&own, shard));
            }
        }
    }
}
