//! Ranks and alphas by regular expressions over module names, as PEFT's `rank_pattern` and `alpha_pattern`. Pure.

use super::{
    shape::{LoraShape, LoraShapes},
    targets::Site,
};
use crate::config::{ExportFormat, LoraArgs};
use fancy_regex::Regex;
use serde_json::{Map, Value};

/// Compiled patterns of ranks and alphas. The first that matches a name counts, as in PEFT (0.21.2,
/// `get_pattern_key`): whole, or the end of it behind a dot.
pub struct Patterns {
    common: LoraShape,
    ranks: Vec<Pattern>,
    alphas: Vec<Pattern>,
}

struct Pattern {
    text: String,
    regex: Regex,
    value: f64,
}

/// The fault of a pattern, and the field that it stands in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{fault}")]
pub struct PatternError {
    /// `rank_pattern` or `alpha_pattern`
    pub field: &'static str,
    pub fault: String,
}

const RANKS: &str = "rank_pattern";
const ALPHAS: &str = "alpha_pattern";

/// The shapes of `sites` by section `lora`.
///
/// # Errors
/// Those of [`Patterns::new`] and [`Patterns::shapes`], and what the format of saved experts cannot hold.
pub fn shapes_of(args: &LoraArgs, sites: &[Site]) -> Result<LoraShapes, PatternError> {
    let &LoraArgs { lora_rank: rank, lora_alpha: alpha, use_rslora, use_dora, .. } = args;
    let common = LoraShape { rank, alpha, use_rslora, use_dora };
    let shapes = Patterns::new(common, &args.rank_pattern, &args.alpha_pattern)?.shapes(sites)?;
    if args.lora_export_format != ExportFormat::Peft {
        return Ok(shapes);
    }
    for gate in sites.iter().filter(|site| site.experts.is_some() && site.name == "gate_proj") {
        let up = sites.iter().find(|site| site.parent == gate.parent && site.name == "up_proj");
        let (own, others) = (shapes.of(gate), up.map(|up| shapes.of(up)));
        if let Some(other) = others.filter(|other| *other != own) {
            let fault = format!(
                "{} has {own}, and up_proj of the same experts {other}; PEFT holds both in one adapter of one rank and \
                 alpha: give them the same, or set lora.lora_export_format: per_expert",
                gate.path()
            );
            return Err(PatternError { field: if other.rank == own.rank { ALPHAS } else { RANKS }, fault });
        }
    }
    Ok(shapes)
}

impl Patterns {
    /// Patterns of `ranks` and `alphas`, numbers by regular expression; `common` is the shape where none matches.
    ///
    /// # Errors
    /// The first text that is no regular expression.
    pub fn new(
        common: LoraShape,
        ranks: &Map<String, Value>,
        alphas: &Map<String, Value>,
    ) -> Result<Self, PatternError> {
        Ok(Self { common, ranks: compiled(RANKS, ranks)?, alphas: compiled(ALPHAS, alphas)? })
    }

    /// Rank and scale of the module `path`.
    pub fn shape_of(&self, path: &str) -> LoraShape {
        let of = |patterns: &[Pattern]| {
            patterns.iter().find(|pattern| pattern.matches(path)).map(|pattern| pattern.value)
        };
        LoraShape {
            rank: of(&self.ranks).map_or(self.common.rank, |rank| rank as usize),
            alpha: of(&self.alphas).unwrap_or(self.common.alpha),
            ..self.common
        }
    }

    /// The shapes of `sites`. A fused target has one shape: a pattern matches its own name, or those of all its leaves
    /// alike.
    ///
    /// # Errors
    /// A pattern that matches no site, and a fused target whose leaves would have several shapes.
    pub fn shapes(&self, sites: &[Site]) -> Result<LoraShapes, PatternError> {
        for (field, patterns) in [(RANKS, &self.ranks), (ALPHAS, &self.alphas)] {
            let is_met = |pattern: &&Pattern| sites.iter().flat_map(names).any(|name| pattern.matches(&name));
            if let Some(Pattern { text, .. }) = patterns.iter().find(|pattern| !is_met(pattern)) {
                let fault = format!("{text:?} matches no target of the adapter");
                return Err(PatternError { field, fault });
            }
        }
        let mut shapes = LoraShapes::from(self.common);
        for site in sites {
            let own = self.shape_of_site(site)?;
            if own != self.common {
                shapes.by_site.insert(site.path(), own);
            }
        }
        Ok(shapes)
    }

    fn shape_of_site(&self, site: &Site) -> Result<LoraShape, PatternError> {
        let by_name = self.shape_of(&site.path());
        if site.leaves.len() < 2 || by_name != self.common {
            return Ok(by_name);
        }
        let leaves: Vec<String> = leaves(site).collect();
        let own = self.shape_of(&leaves[0]);
        let Some(other) = leaves.iter().map(|leaf| self.shape_of(leaf)).find(|other| *other != own) else {
            return Ok(own);
        };
        let field = if other.rank == own.rank { ALPHAS } else { RANKS };
        let (name, path) = (site.name, &leaves[0]);
        let fault = format!(
            "{name} is one adapter, but {path} would have {own} and another of its leaves {other}; name the leaves in \
             lora_target_modules"
        );
        Err(PatternError { field, fault })
    }
}

impl Pattern {
    fn matches(&self, path: &str) -> bool {
        self.regex.is_match(path).unwrap_or(false)
    }
}

fn compiled(field: &'static str, patterns: &Map<String, Value>) -> Result<Vec<Pattern>, PatternError> {
    let compiled = |(text, value): (&String, &Value)| {
        let regex = Regex::new(&format!(r"^(?:.*\.)?(?:{text})$")).map_err(|error| {
            let said = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            PatternError { field, fault: format!("{text:?} is no regular expression: {said}") }
        })?;
        Ok::<_, PatternError>(Pattern {
            text: text.clone(),
            regex,
            value: value.as_f64().unwrap_or_default(),
        })
    };
    patterns.iter().map(compiled).collect()
}

/// Dotted paths of the leaves of a site.
fn leaves(site: &Site) -> impl Iterator<Item = String> {
    site.leaves.iter().map(|(leaf, _)| format!("{}.{leaf}", site.parent))
}

/// The names that a pattern may match.
fn names(site: &Site) -> impl Iterator<Item = String> {
    std::iter::once(site.path()).chain(leaves(site))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::targets::{Projection, resolve};
    use serde_json::json;

    fn sites(targets: &[&str]) -> Vec<Site> {
        let layer = |l: usize| {
            let projection = |parent: &str, fused, leaves: &[(&'static str, usize)]| Projection {
                parent: format!("model.layers.{l}.{parent}"),
                fused,
                leaves: leaves.to_vec(),
                input: 6,
                experts: None,
            };
            [
                projection("self_attn", Some("qkv_proj"), &[("q_proj", 8), ("k_proj", 4), ("v_proj", 4)]),
                projection("mlp", None, &[("down_proj", 6)]),
            ]
        };
        let projections: Vec<Projection> = (0..12).flat_map(layer).collect();
        let targets: Vec<String> = targets.iter().map(|target| target.to_string()).collect();
        resolve(&projections, Some(&targets), &[]).unwrap()
    }

    fn shapes(ranks: Value, alphas: Value, sites: &[Site]) -> Result<LoraShapes, PatternError> {
        let map = |value: Value| value.as_object().unwrap().clone();
        Patterns::new(LoraShape::new(4, 8.0), &map(ranks), &map(alphas))?.shapes(sites)
    }

    #[test]
    fn the_first_pattern_that_matches_the_end_of_a_name_counts() {
        let ranks = json!({r"layers\.1\..*v_proj": 6, "v_proj": 3});
        let shapes = shapes(ranks, json!({"layers.1.*_proj": 1.5}), &sites(&["q_proj", "v_proj"])).unwrap();
        let of = |path: &str| {
            let shape = shapes.by_site.get(path).copied().unwrap_or(shapes.common);
            (shape.rank, shape.alpha)
        };
        assert_eq!(of("model.layers.0.self_attn.q_proj"), (4, 8.0));
        assert_eq!(of("model.layers.0.self_attn.v_proj"), (3, 8.0));
        assert_eq!(of("model.layers.1.self_attn.v_proj"), (6, 1.5));
        // A dot is any letter, so that layers 10 and 11 are matched, too.
        assert_eq!(of("model.layers.11.self_attn.v_proj"), (3, 1.5));
        assert_eq!(shapes.by_site.len(), 12 + 3);
    }

    #[test]
    fn a_fused_target_has_one_shape() {
        let fused = sites(&["qkv_proj"]);
        for ranks in [json!({"qkv_proj": 2}), json!({"[qkv]_proj": 2})] {
            let shapes = shapes(ranks, json!({}), &fused).unwrap();
            assert!(fused.iter().all(|site| shapes.of(site) == LoraShape::new(2, 8.0)));
        }
        let error = shapes(json!({"q_proj": 2}), json!({}), &fused).unwrap_err();
        assert_eq!(error.field, "rank_pattern");
        assert!(error.fault.contains("self_attn.q_proj would have rank 2 and alpha 8"), "{error}");
        let error = shapes(json!({}), json!({"[qk]_proj": 2}), &fused).unwrap_err();
        assert_eq!(error.field, "alpha_pattern");
    }

    #[test]
    fn what_matches_nothing_or_is_no_expression_is_refused() {
        let error = shapes(json!({"q_proj": 2, "o_proj": 3}), json!({}), &sites(&["q_proj"])).unwrap_err();
        assert_eq!(
            (error.field, error.fault.as_str()),
            ("rank_pattern", "\"o_proj\" matches no target of the adapter")
        );
        let error = shapes(json!({}), json!({"(q_proj": 2}), &sites(&["q_proj"])).unwrap_err();
        assert!(
            error.field == "alpha_pattern" && error.fault.contains("is no regular expression"),
            "{error}"
        );
    }
}
