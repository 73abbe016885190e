//! Targets: from names to the logical adapters that a run trains. Pure.
//!
//! A *site* is one adapter: a leaf (`q_proj`) on a slice of a linear layer's output, or a fused target
//! (`qkv_proj`) on the whole of it. Base GEMMs may be fused or split; sites do not depend on that.

use super::shape::LoraShapes;
use std::collections::{BTreeMap, BTreeSet};
use wildmatch::WildMatch;

/// Kind of module that a site adapts; the key of [`LORA_MAPPING`](super::LORA_MAPPING).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SiteKind {
    Linear,
    /// A linear layer of every expert.
    Experts,
}

/// The experts of a layer that each have a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    pub count: usize,
    /// Experts of one token.
    pub top_k: usize,
    pub names: MoeNames,
}

/// Names of the tensors of a mixture of experts in the model files: `{block}.experts.{e}.{gate}.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeNames {
    pub block: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

impl MoeNames {
    /// Names of most families, and of module paths in all of them.
    pub const MLP: Self = Self { block: "mlp", gate: "gate_proj", up: "up_proj", down: "down_proj" };

    /// The name of `gate_proj`, `up_proj` or `down_proj`.
    pub fn leaf(&self, leaf: &str) -> &'static str {
        match leaf {
            "gate_proj" => self.gate,
            "up_proj" => self.up,
            _ => self.down,
        }
    }
}

/// Leaves that one fused target covers: q, k, v of an attention, gate and up of an MLP, or a single projection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Projection {
    /// Dotted path of the parent module: `model.layers.3.self_attn`.
    pub parent: String,
    /// The fused target's name (`qkv_proj`); `None` for a projection that is one leaf.
    pub fused: Option<&'static str>,
    /// Leaves in output order, with their widths.
    pub leaves: Vec<(&'static str, usize)>,
    /// Width of the input.
    pub input: usize,
    /// The routed experts that each have such a projection; `None` for a dense one.
    pub experts: Option<Experts>,
}

/// The tensor of the model's files that `leaf` of the module `parent` is, of expert `copy` where it has experts.
pub fn file_tensor(parent: &str, experts: Option<Experts>, copy: usize, leaf: &str) -> String {
    let Some(experts) = experts else { return format!("{parent}.{leaf}.weight") };
    // Modules are below `mlp` in all families, and in the files below the family's own name.
    let layer = parent.strip_suffix("mlp.experts").unwrap_or(parent);
    format!("{layer}{}.experts.{copy}.{}.weight", experts.names.block, experts.names.leaf(leaf))
}

/// One adapter: A `[rank, input]`, B `[Σ leaf widths, rank]`; or one of each expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    pub kind: SiteKind,
    pub parent: String,
    /// The target's own name: a leaf or a fused name.
    pub name: &'static str,
    /// The leaves that it covers, with their widths.
    pub leaves: Vec<(&'static str, usize)>,
    /// First output column, counted over the projection's leaves.
    pub first: usize,
    pub input: usize,
    pub experts: Option<Experts>,
    /// The factor that all experts share.
    pub shared: Option<Factor>,
}

/// One of the two factors of the product B·A, or DoRA's magnitudes beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factor {
    A,
    B,
    Magnitude,
}

impl Factor {
    /// The last part of the names of its parameters.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::A => "lora_A",
            Self::B => "lora_B",
            Self::Magnitude => "lora_magnitude_vector",
        }
    }

    /// The factors of an adapter, with magnitudes or without.
    pub fn all(use_dora: bool) -> &'static [Self] {
        if use_dora { &[Self::A, Self::B, Self::Magnitude] } else { &[Self::A, Self::B] }
    }
}

impl Projection {
    /// The sites of its leaves, in output order.
    pub fn leaf_sites(&self) -> Vec<Site> {
        let mut first = 0;
        let site = |&(leaf, width): &(&'static str, usize)| {
            first += width;
            self.site(leaf, vec![(leaf, width)], first - width)
        };
        self.leaves.iter().map(site).collect()
    }

    /// The site of its fused target.
    pub fn fused_site(&self) -> Option<Site> {
        self.fused.map(|name| self.site(name, self.leaves.clone(), 0))
    }

    fn site(&self, name: &'static str, leaves: Vec<(&'static str, usize)>, first: usize) -> Site {
        let kind = if self.experts.is_some() { SiteKind::Experts } else { SiteKind::Linear };
        let (parent, input, experts) = (self.parent.clone(), self.input, self.experts);
        Site { kind, parent, name, leaves, first, input, experts, shared: None }
    }
}

impl Site {
    /// Dotted path: `model.layers.3.self_attn.q_proj`.
    pub fn path(&self) -> String {
        format!("{}.{}", self.parent, self.name)
    }

    /// The site with one factor shared by all experts, if it has experts: A of projections that read the hidden
    /// states, B of those that write them (xorl's `moe_hybrid_shared_lora`).
    pub fn hybrid(self) -> Self {
        let shared = if self.name == "down_proj" { Factor::B } else { Factor::A };
        Self { shared: self.experts.map(|_| shared), ..self }
    }

    /// Copies of a factor: one for each expert, 1 if it is shared.
    pub fn copies(&self, factor: Factor) -> usize {
        let experts = self.experts.filter(|_| self.shared != Some(factor));
        experts.map_or(1, |experts| experts.count)
    }

    /// Dotted path of copy `copy` of a factor: `model.layers.3.mlp.experts.7.up_proj`, `….experts.shared.up_proj`.
    pub fn path_of(&self, factor: Factor, copy: usize) -> String {
        match self.experts {
            None => self.path(),
            Some(_) if self.shared == Some(factor) => format!("{}.shared.{}", self.parent, self.name),
            Some(_) => format!("{}.{copy}.{}", self.parent, self.name),
        }
    }

    /// Width of the output.
    pub fn output(&self) -> usize {
        self.leaves.iter().map(|(_, width)| width).sum()
    }

    /// Number of trainable elements: A and B, of all experts.
    pub fn parameters(&self, rank: usize) -> usize {
        rank * (self.copies(Factor::A) * self.input + self.copies(Factor::B) * self.output())
    }

    /// Elements of A and B that one token is multiplied with, those of each of its experts counted.
    pub fn parameters_met(&self, rank: usize) -> usize {
        self.experts.map_or(1, |experts| experts.top_k) * rank * (self.input + self.output())
    }
}

/// Why targets cannot be resolved.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("{target} matches nothing; this model has {known}")]
    NoMatch { target: String, known: String },
    #[error("{path} is adapted twice, by itself and by {fused}; name one of them")]
    Twice { path: String, fused: &'static str },
    #[error("the list is empty; leave it out for the default of the family")]
    Empty,
}

/// Every linear layer of the blocks, as PEFT means it.
const ALL_LINEAR: &str = "all-linear";

/// The sites of `projections` that `targets` name (`default` when null), in the order of `projections`.
pub fn resolve(
    projections: &[Projection],
    targets: Option<&[String]>,
    default: &[&str],
) -> Result<Vec<Site>, TargetError> {
    let owned: Vec<String>;
    let targets = match targets {
        Some(targets) => targets,
        None => {
            owned = default.iter().map(|name| name.to_string()).collect();
            &owned
        }
    };
    if targets.is_empty() {
        return Err(TargetError::Empty);
    }
    let patterns: Vec<Pattern> = targets.iter().map(|target| Pattern::new(target)).collect();
    let mut matched = vec![false; patterns.len()];
    let mut sites = Vec::new();
    for projection in projections {
        let mut wanted = |name: &str, fused: bool| {
            let mut any = false;
            for (pattern, matched) in patterns.iter().zip(&mut matched) {
                if pattern.matches(&projection.parent, name, fused) {
                    (*matched, any) = (true, true);
                }
            }
            any
        };
        let fused = projection.fused_site().filter(|site| wanted(site.name, true));
        for leaf in projection.leaf_sites() {
            if wanted(leaf.name, false) {
                if let Some(fused) = &fused {
                    return Err(TargetError::Twice { path: leaf.path(), fused: fused.name });
                }
                sites.push(leaf);
            }
        }
        sites.extend(fused);
    }
    if let Some(target) = matched.iter().position(|matched| !matched) {
        return Err(TargetError::NoMatch { target: targets[target].clone(), known: known(projections) });
    }
    Ok(sites)
}

/// Dotted paths of the leaves of `projections` that `names` name, as targets are named.
///
/// # Errors
/// A name matches nothing.
pub fn named(projections: &[Projection], names: &[String]) -> Result<BTreeSet<String>, TargetError> {
    let mut paths = BTreeSet::new();
    for name in names {
        let pattern = Pattern::new(name);
        let mut any = false;
        for projection in projections {
            let whole =
                projection.fused.is_some_and(|fused| pattern.matches(&projection.parent, fused, true));
            for site in projection.leaf_sites() {
                if whole || pattern.matches(&projection.parent, site.name, false) {
                    any = true;
                    paths.insert(site.path());
                }
            }
        }
        if !any {
            return Err(TargetError::NoMatch { target: name.clone(), known: known(projections) });
        }
    }
    Ok(paths)
}

fn known(projections: &[Projection]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for projection in projections {
        for name in projection.leaves.iter().map(|(leaf, _)| *leaf).chain(projection.fused) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    format!("{} and {ALL_LINEAR}", names.join(", "))
}

/// Trainable parameters by target name, in the order of first appearance by name.
pub fn parameters_by_name(sites: &[Site], shapes: &LoraShapes) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for site in sites {
        let shape = shapes.of(site);
        let magnitudes = if shape.use_dora { site.output() } else { 0 };
        *counts.entry(site.name).or_default() += site.parameters(shape.rank) + magnitudes;
    }
    counts
}

enum Pattern {
    AllLinear,
    Leaf(String),
    /// A glob over the dotted path; `[0-7]` ranges are expanded into alternatives.
    Glob(Vec<WildMatch>),
}

impl Pattern {
    fn new(target: &str) -> Self {
        if target == ALL_LINEAR {
            Self::AllLinear
        } else if target.contains(['*', '?', '[', '.']) {
            Self::Glob(expand(target).iter().map(|glob| WildMatch::new(glob)).collect())
        } else {
            Self::Leaf(target.to_owned())
        }
    }

    fn matches(&self, parent: &str, name: &str, fused: bool) -> bool {
        match self {
            Self::AllLinear => !fused,
            Self::Leaf(leaf) => leaf == name,
            Self::Glob(globs) => {
                // A glob may start at any component: `layers.3.*` means `model.layers.3.*`. A fused name is meant
                // only when the glob ends in it, or `*_proj` would adapt everything twice.
                let path = format!("{parent}.{name}");
                let starts = std::iter::once(0).chain(path.match_indices('.').map(|(at, _)| at + 1));
                let mut suffixes = starts.map(|at| &path[at..]);
                suffixes.any(|suffix| {
                    globs.iter().any(|glob| {
                        glob.matches(suffix) && (!fused || glob.to_string().rsplit('.').next() == Some(name))
                    })
                })
            }
        }
    }
}

/// Characters of a target at most, and of all globs that it stands for: 200 layers of 256 experts take 2 MB. What is
/// longer stays literal, and matches nothing.
const LONGEST: usize = 1000;
const MOST: usize = 4 << 20;

/// Expands each `[a-b]` or `[a,b]` of numbers into one glob per number; anything else stays literal.
fn expand(glob: &str) -> Vec<String> {
    let literal = || vec![glob.to_owned()];
    let Some((head, rest)) = glob.split_once('[').filter(|_| glob.len() <= LONGEST) else { return literal() };
    let Some((set, tail)) = rest.split_once(']') else { return literal() };
    let mut numbers = Vec::new();
    for item in set.split(',') {
        let (from, to) = item.split_once('-').unwrap_or((item, item));
        match (from.trim().parse::<usize>(), to.trim().parse::<usize>()) {
            // No model has so many layers: a larger range is a typing error and matches nothing.
            (Ok(from), Ok(to)) if to.saturating_sub(from) < 10_000 => numbers.extend(from..=to),
            _ => return literal(),
        }
    }
    let tails = expand(tail);
    if numbers.len() * tails.len() * glob.len() > MOST {
        return literal();
    }
    numbers.iter().flat_map(|n| tails.iter().map(move |tail| format!("{head}{n}{tail}"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::LoraShape;

    fn projections() -> Vec<Projection> {
        let layer = |l: usize| {
            let projection = |parent: &str, fused, leaves: &[(&'static str, usize)], input| Projection {
                parent: format!("model.layers.{l}.{parent}"),
                fused,
                leaves: leaves.to_vec(),
                input,
                experts: None,
            };
            [
                projection("self_attn", Some("qkv_proj"), &[("q_proj", 8), ("k_proj", 4), ("v_proj", 4)], 6),
                projection("self_attn", None, &[("o_proj", 6)], 8),
                projection("mlp", Some("gate_up_proj"), &[("gate_proj", 10), ("up_proj", 10)], 6),
                projection("mlp", None, &[("down_proj", 6)], 10),
            ]
        };
        (0..12).flat_map(layer).collect()
    }

    fn paths(targets: &[&str]) -> Result<Vec<String>, TargetError> {
        let targets: Vec<String> = targets.iter().map(|t| t.to_string()).collect();
        Ok(resolve(&projections(), Some(&targets), &[])?.iter().map(Site::path).collect())
    }

    #[test]
    fn leaves_fused_names_globs_and_all() {
        assert_eq!(paths(&["q_proj"]).unwrap().len(), 12);
        assert_eq!(paths(&["all-linear"]).unwrap().len(), 12 * 7);
        assert_eq!(paths(&["qkv_proj", "down_proj"]).unwrap().len(), 24);
        assert_eq!(paths(&["layers.[0-7].*.q_proj"]).unwrap().len(), 8);
        assert_eq!(
            paths(&["layers.[1,10].mlp.*_proj"]).unwrap(),
            [
                "model.layers.1.mlp.gate_proj",
                "model.layers.1.mlp.up_proj",
                "model.layers.1.mlp.down_proj",
                "model.layers.10.mlp.gate_proj",
                "model.layers.10.mlp.up_proj",
                "model.layers.10.mlp.down_proj",
            ]
        );
        assert_eq!(paths(&["layers.1.self_attn.qkv_proj"]).unwrap(), ["model.layers.1.self_attn.qkv_proj"]);
        assert_eq!(paths(&["*.qkv_proj"]).unwrap().len(), 12);
    }

    #[test]
    fn sites_know_their_columns() {
        let sites = resolve(&projections()[..1], Some(&["v_proj".into()]), &[]).unwrap();
        assert_eq!((sites[0].first, sites[0].output(), sites[0].input), (12, 4, 6));
        let sites = resolve(&projections(), None, &["qkv_proj"]).unwrap();
        assert_eq!((sites[0].first, sites[0].output()), (0, 16));
        assert_eq!(parameters_by_name(&sites, &LoraShape::new(2, 4.0).into())["qkv_proj"], 12 * 2 * (6 + 16));
    }

    #[test]
    fn experts_may_share_the_side_of_the_hidden_states() {
        let experts = Some(Experts { count: 5, top_k: 2, names: MoeNames::MLP });
        let parent = "model.layers.0.mlp.experts".to_owned();
        let of =
            |projection: &Projection| Projection { experts, parent: parent.clone(), ..projection.clone() };
        let projections: Vec<_> = projections()[2..4].iter().map(of).collect();
        let sites = resolve(&projections, None, &["up_proj", "down_proj"]).unwrap();
        assert_eq!(sites.iter().map(|site| site.parameters(2)).collect::<Vec<_>>(), [5 * 2 * 16; 2]);
        let sites: Vec<Site> = sites.into_iter().map(Site::hybrid).collect();
        // up: A [2, 6] shared, B [10, 2] of each; down: A [2, 10] of each, B [6, 2] shared.
        assert_eq!(sites.iter().map(|site| site.parameters(2)).collect::<Vec<_>>(), [12 + 5 * 20; 2]);
        assert_eq!(sites[0].path_of(Factor::A, 0), "model.layers.0.mlp.experts.shared.up_proj");
        assert_eq!(sites[1].path_of(Factor::A, 3), "model.layers.0.mlp.experts.3.down_proj");
        assert_eq!((sites[1].copies(Factor::A), sites[1].copies(Factor::B)), (5, 1));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let error = paths(&["q_proj", "w1"]).unwrap_err();
        assert!(
            matches!(&error, TargetError::NoMatch { target, known } if target == "w1" && known.contains("qkv_proj"))
        );
        assert!(matches!(paths(&["layers.[90-95].*"]), Err(TargetError::NoMatch { .. })));
        let [wide, long] = [40, 100_000].map(|sets| format!("layers.{}z", "[0-7]*".repeat(sets)));
        for target in [wide, long] {
            assert!(matches!(paths(&[&target]), Err(TargetError::NoMatch { .. })));
        }
        assert_eq!(expand("layers.[0-199].mlp.experts.[0-255].up_proj").len(), 200 * 256);
        assert!(matches!(paths(&["q_proj", "qkv_proj"]), Err(TargetError::Twice { fused: "qkv_proj", .. })));
        assert_eq!(paths(&[]), Err(TargetError::Empty));
    }
}
