//! From the pieces that one world stored to the pieces that another one owns: pure range arithmetic.
//!
//! The master and the optimizer's state tensors of a region share one flat element space that is cut into equal pieces.
//! Parameters are matched by name: another world cuts the space elsewhere, other groups of experts order it otherwise,
//! and fused and split GEMMs place the same parameters differently.

use crate::shard::{FlatRegion, PlacedParameter};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// Regions that are cut over `shards` shards.
#[derive(Clone, Copy, Debug)]
pub struct Cut<'a> {
    pub regions: &'a [FlatRegion],
    pub shards: usize,
}

impl Cut<'_> {
    /// The number of the piece of `region` that shard `shard` owns.
    fn piece_of(self, region: &FlatRegion, shard: usize) -> usize {
        let groups = region.expert_groups;
        shard % groups * (self.shards / groups) + shard / groups
    }

    /// The shard that owns piece `piece` of `region`.
    fn shard_of(self, region: &FlatRegion, piece: usize) -> usize {
        let groups = region.expert_groups;
        let each = self.shards / groups;
        piece % each * groups + piece / each
    }
}

/// A run of elements to copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move<'a> {
    /// The stored shard and region that have it, and its place in that piece.
    pub shard: usize,
    pub stored: &'a FlatRegion,
    pub from: Range<usize>,
    /// The region that takes it, and its first place in this rank's piece.
    pub own: &'a FlatRegion,
    pub to: usize,
}

/// Checks that the regions hold their parameters and no name is there twice: a file may claim anything.
///
/// # Errors
/// The first contradiction, in one line.
pub fn check(Cut { regions, shards }: Cut) -> Result<(), String> {
    if shards == 0 {
        return Err("it was cut into 0 shards".into());
    }
    let (mut names, mut region_names) = (BTreeSet::new(), BTreeSet::new());
    for region in regions {
        let FlatRegion { name: of, piece, expert_groups: groups, parameters } = region;
        let all = piece.checked_mul(shards).ok_or("its pieces are larger than memory")?;
        if !region_names.insert(of) {
            return Err(format!("region {of} is there twice"));
        }
        if *groups == 0 || !shards.is_multiple_of(*groups) {
            return Err(format!("region {of} has {groups} groups of experts over {shards} shards"));
        }
        for parameter in parameters {
            let name = &parameter.name;
            if parameter.elements().is_none_or(|elements| elements.end > all) {
                return Err(format!("{name} reaches past the {all} elements of region {of}"));
            }
            if !names.insert(name) {
                return Err(format!("{name} is there twice"));
            }
        }
    }
    Ok(())
}

/// Lists the copies that give shard `shard` of `own` its pieces out of `stored`; both have passed [`check`].
///
/// # Errors
/// The parameters in which the two differ, in one line.
pub fn plan<'a>(stored: Cut<'a>, own: Cut<'a>, shard: usize) -> Result<Vec<Move<'a>>, String> {
    let placed =
        |region: &'a FlatRegion| region.parameters.iter().map(move |p| (p.name.as_str(), (region, p)));
    let mut by_name: BTreeMap<&str, (&FlatRegion, &PlacedParameter)> =
        stored.regions.iter().flat_map(placed).collect();
    let (mut moves, mut faults) = (Vec::new(), Vec::new());
    for region in own.regions {
        let own_piece = own.piece_of(region, shard);
        let piece = own_piece * region.piece..(own_piece + 1) * region.piece;
        for parameter in &region.parameters {
            let PlacedParameter { name, shape, first } = parameter;
            match by_name.remove(name.as_str()) {
                None => faults.push(format!("{name} is missing")),
                Some((_, found)) if found.shape != *shape => {
                    faults.push(format!("{name} is {:?}, expected {shape:?}", found.shape));
                }
                Some((stored_region, found)) => {
                    let all = *first..first + shape[0] * shape[1];
                    let mine = all.start.max(piece.start)..all.end.min(piece.end);
                    // The same elements in the stored flat space, cut where its pieces end.
                    let mut at = mine.start;
                    while at < mine.end {
                        let source = found.first + (at - first);
                        let shard = stored.shard_of(stored_region, source / stored_region.piece);
                        let from = source % stored_region.piece;
                        let count = (mine.end - at).min(stored_region.piece - from);
                        let (from, to) = (from..from + count, at - piece.start);
                        moves.push(Move { shard, stored: stored_region, from, own: region, to });
                        at += count;
                    }
                }
            }
        }
    }
    faults.extend(by_name.keys().map(|name| format!("{name} is surplus")));
    if faults.is_empty() { Ok(moves) } else { Err(in_one_line(faults)) }
}

/// The first few faults of a list that may be as long as the model.
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
    fn layout(units: &[Vec<[usize; 2]>], shards: usize) -> Vec<FlatRegion> {
        layout_of_experts(units, shards, 1, 1)
    }

    /// The same of `experts` which each have all of the shapes, over `groups`.
    fn layout_of_experts(
        units: &[Vec<[usize; 2]>],
        shards: usize,
        experts: usize,
        groups: usize,
    ) -> Vec<FlatRegion> {
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
            FlatRegion { name: format!("{u}"), piece, expert_groups: groups, parameters }
        };
        units.iter().enumerate().map(unit).collect()
    }

    /// A value that says which element of which parameter it is.
    fn value(name: &str, element: usize) -> f64 {
        let code: u64 = name.bytes().fold(7, |code, byte| code * 31 + u64::from(byte));
        code as f64 * 1e5 + element as f64
    }

    /// The pieces of shard `shard`, by unit. The ranks with the same experts are `groups` apart.
    fn pieces(Cut { regions, shards }: Cut, shard: usize) -> Vec<Vec<f64>> {
        let piece = |unit: &FlatRegion| {
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
        regions.iter().map(piece).collect()
    }

    fn cut(regions: &[FlatRegion], shards: usize) -> Cut<'_> {
        Cut { regions, shards }
    }

    /// The pieces of shard `shard` of `own` after its moves out of `stored`.
    fn moved(stored: Cut, own: Cut, shard: usize) -> Vec<Vec<f64>> {
        let files: Vec<_> = (0..stored.shards).map(|shard| pieces(stored, shard)).collect();
        let mut mine: Vec<_> = own.regions.iter().map(|region| vec![0.0; region.piece]).collect();
        let place = |cut: Cut, region: &FlatRegion| cut.regions.iter().position(|r| r.name == region.name);
        for Move { shard, stored: region, from, own: to_region, to } in plan(stored, own, shard).unwrap() {
            let (source, target) = (place(stored, region).unwrap(), place(own, to_region).unwrap());
            mine[target][to..to + from.len()].copy_from_slice(&files[shard][source][from]);
        }
        mine
    }

    #[test]
    fn two_shards_become_three() {
        let shapes = [vec![[2, 3], [5, 2]]];
        let (two, three) = (layout(&shapes, 2), layout(&shapes, 3));
        assert_eq!((two[0].piece, three[0].piece), (12, 8));
        let moves = plan(cut(&two, 2), cut(&three, 3), 1).unwrap();
        let expected =
            |shard, from: Range<usize>, to| Move { shard, stored: &two[0], from, own: &three[0], to };
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
        let with = |change: &dyn Fn(&mut FlatRegion)| {
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
        let twice = [good[0].clone(), FlatRegion { parameters: vec![], ..good[0].clone() }];
        assert_eq!(check(cut(&twice, 2)), Err("region 0 is there twice".into()));
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
