//! Parts of the layers that backward recomputes: one method for the first layers, the next lighter one for the others.
//! So there is a way between each two methods for every number of layers.

use crate::config::CheckpointingMethod::{self, Auto, NoRecompute, RecomputeFullLayer, Selective};
use serde::{Deserialize, Serialize};

/// Recompute of the layers in backward. The first layers do, as their activations live longest: while they are
/// recomputed, those of the layers behind them are free already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recompute {
    /// The method of the first layers.
    method: CheckpointingMethod,
    /// So many layers have it.
    layers: usize,
}

impl From<CheckpointingMethod> for Recompute {
    /// `method` in all layers. [`Auto`] is full recompute, which takes the least memory, until something is chosen.
    fn from(method: CheckpointingMethod) -> Self {
        let method = if method == Auto { RecomputeFullLayer } else { method };
        Self { method, layers: usize::MAX }
    }
}

impl Recompute {
    /// `method` in the first `layers` layers, the next lighter one in the others.
    pub fn first(layers: usize, method: CheckpointingMethod) -> Self {
        Self { layers, ..Self::from(method) }
    }

    /// All ways of a model of `layers` layers, the least recompute first.
    pub fn ways(layers: usize) -> impl Iterator<Item = Self> {
        let by_layer = |method| (1..=layers).map(move |n| Self::first(n, method));
        [Self::from(NoRecompute)].into_iter().chain(by_layer(Selective)).chain(by_layer(RecomputeFullLayer))
    }

    /// The method of layer `layer`.
    pub fn of(self, layer: usize) -> CheckpointingMethod {
        match self.method {
            method if layer < self.layers => method,
            Auto | RecomputeFullLayer => Selective,
            Selective | NoRecompute => NoRecompute,
        }
    }

    /// The method that all of `layers` layers have, if it is one.
    pub fn method(self, layers: usize) -> Option<CheckpointingMethod> {
        (self.layers >= layers).then_some(self.method)
    }

    /// It for people, in a model of `layers` layers.
    pub fn told(self, layers: usize) -> String {
        let name = |method| match method {
            Auto | RecomputeFullLayer => "recompute_full_layer",
            Selective => "selective",
            NoRecompute => "no_recompute",
        };
        match self.method(layers) {
            Some(method) => name(method).to_owned(),
            None => format!(
                "{} in the first {} of {layers} layers, {} in the others",
                name(self.method),
                self.layers,
                name(self.of(self.layers))
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_go_from_no_recompute_to_full_layer_by_layer() {
        let letters = |way: Recompute| {
            let letter = |layer| match way.of(layer) {
                NoRecompute => '.',
                Selective => 's',
                RecomputeFullLayer | Auto => 'F',
            };
            (0..3).map(letter).collect::<String>()
        };
        let ways: Vec<_> = Recompute::ways(3).map(letters).collect();
        assert_eq!(ways, ["...", "s..", "ss.", "sss", "Fss", "FFs", "FFF"]);
        for (method, expected) in
            [(NoRecompute, "..."), (Selective, "sss"), (RecomputeFullLayer, "FFF"), (Auto, "FFF")]
        {
            assert_eq!(letters(method.into()), expected);
        }
    }

    #[test]
    fn a_way_is_told_by_the_names_of_the_field() {
        let told = |way: Recompute| way.told(3);
        assert_eq!(told(Auto.into()), "recompute_full_layer");
        assert_eq!(told(Recompute::first(3, Selective)), "selective");
        let mixed = told(Recompute::first(2, RecomputeFullLayer));
        assert_eq!(mixed, "recompute_full_layer in the first 2 of 3 layers, selective in the others");
    }
}
