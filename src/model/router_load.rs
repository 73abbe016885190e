//! Balance of the routers of a step: sums over the tokens of each layer, and the statistics made from them.

use crate::ops::cpu::values;
use tch::{Device, Tensor};

/// Sums of one step over this rank's tokens.
#[derive(Debug, Default)]
pub struct RouterLoad {
    /// `[layers with experts, 2, experts]` fp64 on the model's device; `None` before the first tokens.
    sums: Option<Tensor>,
}

/// Statistics of a step over all layers with experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouterReport {
    /// Tokens of the busiest expert ÷ mean of its layer, the largest over the layers.
    pub max_over_mean: f64,
    /// Entropy of the distribution of choices over the experts of a layer, in nats, mean over the layers. An even one
    /// has ln(experts).
    pub entropy: f64,
    /// E · Σ f·P over the experts, with f the share of tokens that choose one and P its mean probability, over all
    /// layers together: transformers' `load_balancing_loss_func` (after Fedus et al., 2021) without its coefficient. It
    /// has no gradient.
    pub aux_loss: f64,
}

impl RouterLoad {
    /// Adds the loads of a micro-batch, `[2, experts]` of each layer with experts: see
    /// [`SubLayer::router_load`](super::sublayer::SubLayer::router_load).
    pub fn add(&mut self, layers: &[Tensor]) {
        if layers.is_empty() {
            return;
        }
        let load = Tensor::stack(layers, 0);
        self.sums = Some(self.sums.take().map_or_else(|| load.shallow_clone(), |sums| sums + &load));
    }

    /// Choices of each expert, then the sums of their probabilities, layer by layer; to be summed over ranks. Empty for
    /// a model without experts.
    pub fn sums(&self) -> Vec<f64> {
        self.sums.as_ref().map_or_else(Vec::new, |sums| values(&sums.to_device(Device::Cpu)))
    }
}

impl RouterReport {
    /// Statistics of sums over all ranks; a token has `top_k` of `experts`. `None` without experts or tokens.
    pub fn new(sums: &[f64], experts: usize, top_k: usize) -> Option<Self> {
        let layers: Vec<_> =
            sums.chunks_exact((2 * experts).max(1)).map(|layer| layer.split_at(experts)).collect();
        let choices: f64 = layers.iter().flat_map(|(choices, _)| *choices).sum();
        if choices == 0.0 {
            return None;
        }
        let tokens = choices / top_k as f64;
        let (mut max_over_mean, mut entropy) = (0f64, 0.0);
        let mut over_layers = vec![[0.0; 2]; experts];
        for (choices, probabilities) in &layers {
            let total: f64 = choices.iter().sum();
            let most = choices.iter().fold(0f64, |most, &n| most.max(n));
            max_over_mean = max_over_mean.max(most * experts as f64 / total);
            let shares = choices.iter().map(|n| n / total).filter(|&share| share > 0.0);
            entropy -= shares.map(|share| share * share.ln()).sum::<f64>() / layers.len() as f64;
            for (sum, (n, p)) in over_layers.iter_mut().zip(choices.iter().zip(*probabilities)) {
                *sum = [sum[0] + n, sum[1] + p];
            }
        }
        let products = over_layers.iter().map(|[n, p]| n / tokens * (p / tokens));
        Some(Self { max_over_mean, entropy, aux_loss: experts as f64 * products.sum::<f64>() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_and_uneven_loads() {
        // Two layers of 4 experts, 6 tokens of 2 choices each.
        let even = [3.0, 3.0, 3.0, 3.0, 1.5, 1.5, 1.5, 1.5].repeat(2);
        let report = RouterReport::new(&even, 4, 2).unwrap();
        assert_eq!((report.max_over_mean, report.aux_loss), (1.0, 2.0));
        assert!((report.entropy - 4f64.ln()).abs() < 1e-15);
        let one = [vec![6.0, 6.0, 0.0, 0.0, 3.0, 3.0, 0.0, 0.0], even[..8].to_vec()].concat();
        let report = RouterReport::new(&one, 4, 2).unwrap();
        assert_eq!(report.max_over_mean, 2.0);
        assert!((report.entropy - 1.5 * 2f64.ln()).abs() < 1e-15);
        // f = (9, 9, 3, 3) / 12, P = (4.5, 4.5, 1.5, 1.5) / 12.
        assert!((report.aux_loss - 4.0 * 2.0 * (9.0 * 4.5 + 3.0 * 1.5) / 144.0).abs() < 1e-15);
        assert_eq!(RouterReport::new(&[0.0; 8], 4, 2), None);
        assert_eq!(RouterReport::new(&[], 0, 1), None);
    }
}
