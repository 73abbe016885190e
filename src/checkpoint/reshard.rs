//! From the pieces that one world stored to the pieces that another one owns: pure range arithmetic.
//!
//! Masters and moments of a unit share one flat element space that is cut into equal pieces. Where a parameter lies
//! in it does not depend on the world, only the length of a piece does; but that of experts lies one group of experts after
//! another. Parameters are matched by name all the same,
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
    /// Into how many groups of experts the space is divided; shard s owns a piece of group s mod that. 1 where nothing
    /// belongs to single experts.
    #[serde(default = "one")]
    pub expert_groups: usize,
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

const fn one() -> usize {
    1
}

/// Units that are cut over as many shards.
#[derive(Clone, Copy, Debug)]
pub struct Cut<'a> {
    pub units: &'a [UnitLayout],
    pub shards: usize,
}

impl Cut<'_> {
    /// Which piece of `unit` shard `shard` owns.
    fn piece_of(self, unit: usize, shard: usize) -> usize {
        let groups = self.units[unit].expert_groups;
        shard % groups * (self.shards / groups) + shard / groups
    }

    /// Which shard owns piece `piece` of `unit`.
    fn shard_of(self, unit: usize, piece: usize) -> usize {
        let groups = self.units[unit].expert_groups;
        let each = self.shards / groups;
        piece % each * groups + piece / each
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

/// Whether the units hold their parameters: what is read from a file may claim anything.
pub fn check(Cut { units, shards }: Cut) -> Result<(), String> {
    if shards == 0 {
        return Err("it was cut into 0 shards".into());
    }
    let mut names = BTreeSet::new();
    for (index, unit) in units.iter().enumerate() {
        let all = unit.piece.checked_mul(shards).ok_or("its pieces are larger than memory")?;
        if unit.expert_groups == 0 || !shards.is_multiple_of(unit.expert_groups) {
            let groups = unit.expert_groups;
            return Err(format!("unit {index} has {groups} groups of experts over {shards} shards"));
        }
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

/// What shard `shard` of `own` copies from the `stored` pieces; both have passed [`check`].
///
/// # Errors
/// In which parameters the two differ, in one line.
pub fn plan(stored: Cut, own: Cut, shard: usize) -> Result<Vec<Move>, String> {
    let placed = stored.units.iter().enumerate();
    let mut by_name: BTreeMap<&str, (usize, &PlacedParameter)> = placed
        .flat_map(|(unit, layout)| layout.parameters.iter().map(move |p| (p.name.as_str(), (unit, p))))
        .collect();
    let (mut moves, mut faults) = (Vec::new(), Vec::new());
    for (unit, layout) in own.units.iter().enumerate() {
        let own_piece = own.piece_of(unit, shard);
        for parameter in &layout.parameters {
            let PlacedParameter { name, shape, first } = parameter;
            match by_name.remove(name.as_str()) {
                None => faults.push(format!("{name} is missing")),
                Some((_, found)) if found.shape != *shape => {
                    faults.push(format!("{name} is {:?}, expected {shape:?}", found.shape));
                }
                Some((stored_unit, found)) => {
                    let piece = own_piece * layout.piece..(own_piece + 1) * layout.piece;
                    let all = *first..first + shape[0] * shape[1];
                    let mine = all.start.max(piece.start)..all.end.min(piece.end);
                    // The same elements in the stored flat space, cut where its pieces end.
                    let stored_piece = stored.units[stored_unit].piece;
                    let mut at = mine.start;
                    while at < mine.end {
                        let source = found.first + (at - first);
                        let shard = stored.shard_of(stored_unit, source / stored_piece);
                        let from = source % stored_piece;
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
        layout_of_experts(units, shards, 1, 1)
    }

    /// The same of `experts` which each have all of the shapes, over `groups`.
    fn layout_of_experts(
        units: &[Vec<[usize; 2]>],
        shards: usize,
        experts: usize,
        groups: usize,
    ) -> Vec<UnitLayout> {
        let unit = |(u, shapes): (usize, &Vec<[usize; 2]>)| {
            let (mut parameters, mut piece) = (Vec::new(), 0);
            for group in 0..groups {
                let mut end = 0usize;
                for expert in group * experts / groups..(group + 1) * experts / groups {
                    for (i, shape) in shapes.iter().enumerate() {
                        let first = end.next_multiple_of(ALIGN);
                        end = first + shape[0] * shape[1];
                        let name =
                            if experts == 1 { format!("{u}.{i}") } else { format!("{u}.{expert}.{i}") };
                        parameters.push((group, PlacedParameter { name, shape: *shape, first }));
                    }
                }
                let each = shards / groups;
                piece = end.next_multiple_of(ALIGN * each) / each;
            }
            let of_group = piece * shards / groups;
            let place = |(group, parameter): (usize, PlacedParameter)| PlacedParameter {
                first: group * of_group + parameter.first,
                ..parameter
            };
            let parameters = parameters.into_iter().map(place).collect();
            UnitLayout { piece, expert_groups: groups, parameters }
        };
        units.iter().enumerate().map(unit).collect()
    }

    /// A value that says which element of which parameter it is.
    fn value(name: &str, element: usize) -> f64 {
        let code: u64 = name.bytes().fold(7, |code, byte| code * 31 + u64::from(byte));
        code as f64 * 1e5 + element as f64
    }

    /// The pieces of shard `shard`, by unit. The ranks with the same experts are `groups` apart.
    fn pieces(Cut { units, shards }: Cut, shard: usize) -> Vec<Vec<f64>> {
        let unit = |unit: &UnitLayout| {
            let mut piece = vec![0.0; unit.piece];
            let (group, place) = (shard % unit.expert_groups, shard / unit.expert_groups);
            let own = group * shards / unit.expert_groups + place;
            for parameter in &unit.parameters {
                for (element, at) in parameter.elements().unwrap().enumerate() {
                    if at / unit.piece == own {
                        piece[at % unit.piece] = value(&parameter.name, element);
                    }
                }
            }
            piece
        };
        units.iter().map(unit).collect()
    }

    fn cut(units: &[UnitLayout], shards: usize) -> Cut<'_> {
        Cut { units, shards }
    }

    /// What shard `shard` of `own` has after making its moves out of `stored`.
    fn moved(stored: Cut, own: Cut, shard: usize) -> Vec<Vec<f64>> {
        let files: Vec<_> = (0..stored.shards).map(|shard| pieces(stored, shard)).collect();
        let mut mine: Vec<_> = own.units.iter().map(|unit| vec![0.0; unit.piece]).collect();
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
        let moves = plan(cut(&two, 2), cut(&three, 3), 1).unwrap();
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
            assert_eq!(moved(cut(&split, 2), cut(&fused, 2), shard), pieces(cut(&fused, 2), shard));
        }
    }

    #[test]
    fn what_differs_is_named() {
        let stored = layout(&[vec![[2, 3], [5, 2]], vec![[1, 1]]], 1);
        let mut own = layout(&[vec![[2, 3], [5, 2]]], 1);
        own[0].parameters[1].shape = [5, 4];
        own[0].parameters[0].name = "other".into();
        let message = plan(cut(&stored, 1), cut(&own, 1), 0).unwrap_err();
        for part in ["other is missing", "0.1 is [5, 2], expected [5, 4]", "0.0 is surplus", "1.0 is surplus"]
        {
            assert!(message.contains(part), "{part} in {message}");
        }
    }

    #[test]
    fn layouts_that_cannot_be_are_refused() {
        let good = layout(&[vec![[2, 3]]], 2);
        assert_eq!(check(cut(&good, 2)), Ok(()));
        assert!(check(cut(&good, 0)).is_err());
        let with = |change: &dyn Fn(&mut UnitLayout)| {
            let mut units = good.clone();
            change(&mut units[0]);
            check(cut(&units, 2))
        };
        assert!(with(&|unit| unit.piece = 2).is_err());
        assert!(with(&|unit| unit.expert_groups = 0).is_err());
        assert!(with(&|unit| unit.expert_groups = 3).is_err());
        assert!(with(&|unit| unit.piece = usize::MAX).is_err());
        assert!(with(&|unit| unit.parameters[0].first = usize::MAX).is_err());
        assert!(with(&|unit| unit.parameters[0].shape = [usize::MAX, 2]).is_err());
        assert!(with(&|unit| unit.parameters.push(unit.parameters[0].clone())).is_err());
    }

    /// Shards, and groups that divide them and 12 experts.
    fn shards_and_groups() -> impl Strategy<Value = (usize, usize)> {
        (1usize..4, prop::sample::select(vec![1usize, 2, 3, 4]))
            .prop_map(|(each, groups)| (each * groups, groups))
    }

    proptest! {
        #[test]
        fn every_element_arrives_whatever_the_worlds(
            shapes in prop::collection::vec(prop::collection::vec([1usize..9, 1usize..9], 0..4), 1..4),
            from in 1usize..9, to in 1usize..9,
        ) {
            let (stored, own) = (layout(&shapes, from), layout(&shapes, to));
            let (stored, own) = (cut(&stored, from), cut(&own, to));
            prop_assert_eq!(check(stored), Ok(()));
            for shard in 0..to {
                prop_assert_eq!(moved(stored, own, shard), pieces(own, shard));
            }
        }

        #[test]
        fn experts_arrive_whatever_their_groups(
            shapes in prop::collection::vec(prop::collection::vec([1usize..6, 1usize..6], 0..4), 1..3),
            (from, from_groups) in shards_and_groups(), (to, to_groups) in shards_and_groups(),
        ) {
            let stored = layout_of_experts(&shapes, from, 12, from_groups);
            let own = layout_of_experts(&shapes, to, 12, to_groups);
            let (stored, own) = (cut(&stored, from), cut(&own, to));
            prop_assert_eq!(check(stored), Ok(()));
            for shard in 0..to {
                prop_assert_eq!(moved(stored, own, shard), pieces(own, shard));
            }
        }
    }
}
