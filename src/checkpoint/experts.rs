//! Adapters of routed experts as PEFT's `target_parameters` hold them.
//!
//! transformers has a layer's experts in two fused parameters, `gate_up_proj` `[experts, 2 · width, hidden]` and
//! `down_proj` `[experts, hidden, width]`. PEFT adapts each as a whole. For `n` ranks an expert (seen in PEFT 0.21.2):
//!
//! - lora_A `[experts · n, in]`: expert by expert
//! - lora_B `[out, n · experts]`: the experts of a rank side by side
//! - both parameters adapted, gate_up's keys are behind `base_layer`, because its wrapper is the inner one
//!
//! Independent adapters on gate and up are one of twice the rank: their A's one below the other, B block-diagonal.

use super::LogicalAdapter;
use crate::lora::{LoraShape, Site};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// The adapters on one fused parameter of a layer.
#[derive(Debug, PartialEq)]
pub(super) struct Group {
    /// Path of the layer's experts: `layers.3.mlp.experts`.
    pub parent: String,
    /// `gate_up_proj` or `down_proj`
    pub parameter: &'static str,
    /// Keys of lora_A and lora_B.
    pub keys: [String; 2],
    members: Vec<Member>,
    experts: usize,
    /// Rank and scale of each adapter.
    shape: LoraShape,
    input: usize,
    output: usize,
}

/// One adapter of a group.
#[derive(Debug, PartialEq)]
struct Member {
    /// Place in the list of all adapters.
    index: usize,
    /// Rows of the parameter that the adapter adds to.
    rows: Range<usize>,
}

const GATE_UP: &str = "gate_up_proj";
const DOWN: &str = "down_proj";

/// The groups that the adapters of experts among `adapters` form.
pub(super) fn groups(adapters: &[LogicalAdapter]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (index, adapter) in adapters.iter().enumerate() {
        let (Some(experts), Some((leaf, width))) = (adapter.experts, adapter.leaves.first()) else {
            continue;
        };
        let (parameter, first, output) = match leaf.as_str() {
            "gate_proj" => (GATE_UP, 0, 2 * width),
            "up_proj" => (GATE_UP, *width, 2 * width),
            _ => (DOWN, 0, *width),
        };
        let member = Member { index, rows: first..first + adapter.output() };
        let parent = adapter.parent.trim_start_matches("model.");
        match groups.iter_mut().find(|group| group.parent == parent && group.parameter == parameter) {
            Some(group) => group.members.push(member),
            None => groups.push(Group {
                parent: parent.to_owned(),
                parameter,
                keys: Default::default(),
                members: vec![member],
                experts,
                shape: adapter.shape,
                input: adapter.input,
                output,
            }),
        }
    }
    let with_down: Vec<String> =
        groups.iter().filter(|group| group.parameter == DOWN).map(|group| group.parent.clone()).collect();
    for group in &mut groups {
        let is_inner = group.parameter == GATE_UP && with_down.contains(&group.parent);
        group.keys = keys(&format!("model.{}", group.parent), is_inner);
    }
    groups
}

/// Keys of lora_A and lora_B on a parameter of the experts `parent`, in the inner wrapper or in the outer.
pub(super) fn keys(parent: &str, is_inner: bool) -> [String; 2] {
    let inner = if is_inner { ".base_layer" } else { "" };
    ["lora_A", "lora_B"].map(|factor| format!("base_model.model.{parent}{inner}.{factor}.weight"))
}

/// True if `b` `[rows, columns]`, lora_B of gate and up of `experts` experts, has the first half of the ranks for gate
/// alone and the second for up alone.
pub(super) fn is_in_blocks(b: &[f32], rows: usize, columns: usize, experts: usize) -> bool {
    let halves = |place: usize, all: usize| 2 * place < all;
    let own = |at: usize| halves(at / columns, rows) == halves(at % columns / experts, columns / experts);
    b.iter().enumerate().all(|(at, &value)| value == 0.0 || own(at))
}

/// The names in `target_parameters` for `groups`. A name without a layer means every layer, and a wrapper too many
/// changes the keys of the others. So each layer is named where layers differ.
pub(super) fn parameters(groups: &[Group]) -> BTreeSet<String> {
    let of_layer = |parent: &str| -> BTreeSet<&str> {
        groups.iter().filter(|group| group.parent == parent).map(|group| group.parameter).collect()
    };
    let alike = groups.iter().all(|group| of_layer(&group.parent) == of_layer(&groups[0].parent));
    let name = |group: &Group| if alike { format!("mlp.experts.{}", group.parameter) } else { group.path() };
    groups.iter().map(name).collect()
}

/// The patterns of the `groups` that PEFT sees with another shape than `common`, with that shape. Several adapters are
/// one to PEFT; their pattern is of a form by which [`matches`] knows them.
pub(super) fn patterns(groups: &[Group], common: LoraShape) -> BTreeMap<String, LoraShape> {
    let gate_up = || groups.iter().filter(|group| group.parameter == GATE_UP);
    let alike = gate_up().all(|group| group.members.len() > 1 && group.whole() == groups[0].whole());
    let differing = groups.iter().filter(|group| group.whole() != common);
    let pattern = |group: &Group| match group.members.len() {
        1 => format!("model.{}", group.path()).replace('.', r"\."),
        _ if alike => EVERY_GATE_UP.to_owned(),
        _ => group.path().replace('.', r"\."),
    };
    differing.map(|group| (pattern(group), group.whole())).collect()
}

/// The pattern of the fused gate and up of all layers' experts.
const EVERY_GATE_UP: &str = r".*experts\.gate_up_proj";

/// True if `pattern` is what [`patterns`] writes for independent gate and up of the experts `parent`, a dotted path.
pub(super) fn matches(pattern: &str, parent: &str) -> bool {
    let path = format!("{parent}.{GATE_UP}").replace('.', r"\.");
    pattern == EVERY_GATE_UP || path.ends_with(&format!(r"\.{pattern}"))
}

/// The dotted path of the parameter that `site` of a layer's experts is a part of.
pub(super) fn parameter_of(site: &Site) -> String {
    format!("{}.{}", site.parent, if site.name == DOWN { DOWN } else { GATE_UP })
}

impl Group {
    /// `layers.3.mlp.experts.gate_up_proj`
    fn path(&self) -> String {
        format!("{}.{}", self.parent, self.parameter)
    }

    /// Rank and scale of all its adapters as one.
    fn whole(&self) -> LoraShape {
        self.shape.of_rank(self.ranks())
    }

    /// Ranks of an expert, summed over its adapters.
    pub fn ranks(&self) -> usize {
        self.members.len() * self.shape.rank
    }

    /// Shapes of lora_A and lora_B.
    pub fn shapes(&self) -> [[usize; 2]; 2] {
        let all = self.experts * self.ranks();
        [[all, self.input], [self.output, all]]
    }

    /// Values of lora_A and lora_B.
    pub fn fuse(&self, adapters: &[LogicalAdapter]) -> [Vec<f32>; 2] {
        let a_size = self.shape.rank * self.input;
        let mut a = Vec::with_capacity(self.experts * self.members.len() * a_size);
        for expert in 0..self.experts {
            for member in &self.members {
                a.extend_from_slice(&adapters[member.index].a[expert * a_size..(expert + 1) * a_size]);
            }
        }
        let mut b = vec![0.0; self.output * self.experts * self.ranks()];
        self.each_of_b(|at, member, from| b[at] = adapters[member].b[from]);
        [a, b]
    }

    /// Fills the adapters from lora_A and lora_B of the right shapes. Returns a value that belongs to none of them, if
    /// there is one.
    pub fn split(&self, a: &[f32], b: &[f32], adapters: &mut [LogicalAdapter]) -> Option<f32> {
        let a_size = self.shape.rank * self.input;
        for (place, part) in a.chunks_exact(a_size).enumerate() {
            adapters[self.members[place % self.members.len()].index].a.extend_from_slice(part);
        }
        for member in &self.members {
            adapters[member.index].b = vec![0.0; self.experts * member.rows.len() * self.shape.rank];
        }
        let mut rest = b.to_vec();
        self.each_of_b(|at, member, to| adapters[member].b[to] = std::mem::take(&mut rest[at]));
        rest.into_iter().find(|&x| x != 0.0)
    }

    /// Calls `each(place in lora_B, adapter, place in its B)` for every element of every B.
    fn each_of_b(&self, mut each: impl FnMut(usize, usize, usize)) {
        let columns = self.experts * self.ranks();
        for (place, Member { index, rows }) in self.members.iter().enumerate() {
            for expert in 0..self.experts {
                for (row, at_row) in rows.clone().enumerate() {
                    for rank in 0..self.shape.rank {
                        let column = (place * self.shape.rank + rank) * self.experts + expert;
                        let own = (expert * rows.len() + row) * self.shape.rank + rank;
                        each(at_row * columns + column, *index, own);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::MoeNames;

    fn adapter(leaves: &[(&str, usize)], input: usize, from: f32) -> LogicalAdapter {
        let leaves: Vec<(String, usize)> =
            leaves.iter().map(|(leaf, width)| (leaf.to_string(), *width)).collect();
        let output: usize = leaves.iter().map(|(_, width)| width).sum();
        let values = |n: usize, from: f32| (0..n).map(|i| from + i as f32).collect::<Vec<_>>();
        LogicalAdapter {
            parent: "model.layers.1.mlp.experts".into(),
            leaves,
            shape: LoraShape::new(2, 4.0),
            input,
            experts: Some(3),
            names: MoeNames::MLP,
            shared: None,
            a: values(3 * 2 * input, from),
            b: values(3 * output * 2, -from),
            magnitude: Vec::new(),
        }
    }

    /// B·A of one expert, from PEFT's own reading of the two tensors (`get_delta_weight`).
    fn delta(group: &Group, [a, b]: &[Vec<f32>; 2], expert: usize) -> Vec<f32> {
        let (experts, ranks) = (3, group.ranks());
        let mut delta = vec![0.0; group.output * group.input];
        for o in 0..group.output {
            for i in 0..group.input {
                for r in 0..ranks {
                    let b = b[o * ranks * experts + r * experts + expert];
                    delta[o * group.input + i] += b * a[(expert * ranks + r) * group.input + i];
                }
            }
        }
        delta
    }

    #[test]
    fn independent_gate_and_up_are_blocks_of_one() {
        let adapters = [
            adapter(&[("gate_proj", 2)], 3, 1.0),
            adapter(&[("up_proj", 2)], 3, 50.0),
            adapter(&[("down_proj", 3)], 2, 9.0),
        ];
        let groups = groups(&adapters);
        assert_eq!(groups.len(), 2);
        let prefix = "base_model.model.model.layers.1.mlp.experts";
        assert_eq!(groups[0].keys[0], format!("{prefix}.base_layer.lora_A.weight"));
        assert_eq!(groups[1].keys[1], format!("{prefix}.lora_B.weight"));
        assert_eq!((groups[0].ranks(), groups[0].shapes()), (4, [[12, 3], [4, 12]]));
        let fused = groups[0].fuse(&adapters);
        for expert in 0..3 {
            let whole = delta(&groups[0], &fused, expert);
            for (place, adapter) in adapters[..2].iter().enumerate() {
                let (a, b) = (&adapter.a[expert * 6..][..6], &adapter.b[expert * 4..][..4]);
                let product = |o: usize, i: usize| b[o * 2] * a[i] + b[o * 2 + 1] * a[3 + i];
                for (o, i) in (0..2).flat_map(|o| (0..3).map(move |i| (o, i))) {
                    assert_eq!(whole[(place * 2 + o) * 3 + i], product(o, i));
                }
            }
        }
        let mut back = adapters.clone().map(|adapter| LogicalAdapter { a: vec![], b: vec![], ..adapter });
        for group in &groups {
            let [a, b] = group.fuse(&adapters);
            assert_eq!(group.split(&a, &b, &mut back), None);
        }
        assert_eq!(back, adapters);
        let [a, mut b] = groups[0].fuse(&adapters);
        b[6] = 7.0;
        assert_eq!(groups[0].split(&a, &b, &mut back), Some(7.0), "gate's rows and up's ranks");
    }

    #[test]
    fn layers_that_differ_are_named() {
        let both = [adapter(&[("gate_proj", 2)], 3, 1.0), adapter(&[("up_proj", 2)], 3, 1.0)];
        let in_layer = |layer: usize, adapter: &LogicalAdapter| LogicalAdapter {
            parent: format!("model.layers.{layer}.mlp.experts"),
            ..adapter.clone()
        };
        let alike: Vec<_> = [1, 11].iter().flat_map(|&l| both.iter().map(move |a| in_layer(l, a))).collect();
        let groups = groups(&alike);
        assert_eq!(parameters(&groups).into_iter().collect::<Vec<_>>(), ["mlp.experts.gate_up_proj"]);
        let twice = LoraShape::new(4, 8.0);
        let patterns =
            |groups: &[Group]| patterns(groups, LoraShape::new(2, 4.0)).into_iter().collect::<Vec<_>>();
        assert_eq!(patterns(&groups), [(EVERY_GATE_UP.to_owned(), twice)]);

        let down = adapter(&[("down_proj", 3)], 2, 9.0);
        let differ =
            [in_layer(1, &both[0]), in_layer(1, &both[1]), in_layer(11, &both[1]), in_layer(11, &down)];
        let groups = super::groups(&differ);
        let names: Vec<_> = parameters(&groups).into_iter().collect();
        let [gate_up, other] = ["layers.1.mlp.experts.gate_up_proj", "layers.11.mlp.experts.gate_up_proj"];
        assert_eq!(names, [gate_up, "layers.11.mlp.experts.down_proj", other]);
        let patterns = patterns(&groups);
        assert_eq!(patterns, [(gate_up.replace('.', r"\."), twice)]);
        assert!(matches(&patterns[0].0, "model.layers.1.mlp.experts"));
        assert!(!matches(&patterns[0].0, "model.layers.11.mlp.experts"));
    }

    #[test]
    fn one_of_the_two_is_half_of_the_parameter() {
        for (leaf, rows) in [("gate_proj", 0..2), ("up_proj", 2..4)] {
            let adapters = [adapter(&[(leaf, 2)], 3, 1.0)];
            let group = groups(&adapters).remove(0);
            assert_eq!(group.keys[0], "base_model.model.model.layers.1.mlp.experts.lora_A.weight");
            let whole = delta(&group, &group.fuse(&adapters), 1);
            let touched: Vec<usize> =
                (0..4).filter(|o| whole[o * 3..][..3].iter().any(|&x| x != 0.0)).collect();
            assert_eq!(touched, rows.collect::<Vec<_>>());
        }
        let adapters = [adapter(&[("gate_proj", 2), ("up_proj", 2)], 3, 1.0)];
        assert_eq!((groups(&adapters)[0].ranks(), groups(&adapters)[0].shapes()), (2, [[6, 3], [4, 6]]));
    }
}
