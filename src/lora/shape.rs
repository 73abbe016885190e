//! Ranks and scales of adapters, one for all sites or another for some of them. Pure.

use super::targets::Site;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// Rank and scale of an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraShape {
    pub rank: usize,
    pub alpha: f64,
    /// Scales by alpha / √rank instead of alpha / rank.
    pub use_rslora: bool,
    /// Has trained magnitudes of W + ΔW's rows (DoRA).
    #[serde(default, skip_serializing_if = "is_false")]
    pub use_dora: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Ranks and scales of the adapters of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraShapes {
    /// The shape of every site that `by_site` does not name.
    #[serde(flatten)]
    pub common: LoraShape,
    /// Shapes that differ from it, by path of the site.
    pub by_site: BTreeMap<String, LoraShape>,
}

impl fmt::Display for LoraShape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let scaled = if self.use_rslora { " with rslora" } else { "" };
        let magnitudes = if self.use_dora { " with dora" } else { "" };
        write!(f, "rank {} and alpha {}{scaled}{magnitudes}", self.rank, self.alpha)
    }
}

impl LoraShape {
    /// A shape that scales by alpha / rank.
    pub const fn new(rank: usize, alpha: f64) -> Self {
        Self { rank, alpha, use_rslora: false, use_dora: false }
    }

    /// Factor of B·A.
    pub fn scaling(&self) -> f64 {
        self.alpha / Self::divisor(self.rank, self.use_rslora)
    }

    /// The same factor of B·A at another rank.
    pub fn of_rank(self, rank: usize) -> Self {
        let factor = Self::divisor(rank, self.use_rslora) / Self::divisor(self.rank, self.use_rslora);
        Self { rank, alpha: self.alpha * factor, ..self }
    }

    fn divisor(rank: usize, use_rslora: bool) -> f64 {
        if use_rslora { (rank as f64).sqrt() } else { rank as f64 }
    }
}

impl LoraShapes {
    /// The shapes of `sites`: the one that most of them have, and those that differ. `None` without a site.
    pub fn of_sites(sites: &[(&Site, LoraShape)]) -> Option<Self> {
        let mut counts: Vec<(LoraShape, usize)> = Vec::new();
        for (_, shape) in sites {
            match counts.iter_mut().find(|(seen, _)| seen == shape) {
                Some((_, count)) => *count += 1,
                None => counts.push((*shape, 1)),
            }
        }
        // Of several with as many sites, the first.
        let (common, _) = counts.into_iter().rev().max_by_key(|(_, count)| *count)?;
        let differing = sites.iter().filter(|(_, shape)| *shape != common);
        Some(Self { common, by_site: differing.map(|(site, shape)| (site.path(), *shape)).collect() })
    }

    /// True if an adapter has magnitudes.
    pub fn use_dora(&self) -> bool {
        self.common.use_dora || self.by_site.values().any(|shape| shape.use_dora)
    }

    /// The shape of `site`.
    pub fn of(&self, site: &Site) -> LoraShape {
        self.by_site.get(&site.path()).copied().unwrap_or(self.common)
    }
}

impl From<LoraShape> for LoraShapes {
    fn from(common: LoraShape) -> Self {
        Self { common, by_site: BTreeMap::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_stays_at_another_rank() {
        for (use_rslora, scaling) in [(false, 2.0), (true, 4.0)] {
            let shape = LoraShape { use_rslora, ..LoraShape::new(4, 8.0) };
            assert_eq!(shape.scaling(), scaling);
            let twice = shape.of_rank(8);
            assert_eq!(twice.rank, 8);
            assert!((twice.scaling() - scaling).abs() < 1e-12);
        }
    }
}
