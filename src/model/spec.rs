//! Description of a decoder-only model, independent of its family: the normalised form of a config.json.

use super::{
    declare::EntryForm,
    ffn::{Ffn, MoeSpec},
    layer::LayerPlan,
    mixer::Mixer,
};
use crate::dtype::DType;

/// Scaling of rotary frequencies for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// Llama 3.1: low frequencies divided by `factor`, a smooth ramp between the two wavelengths.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: f64,
    },
}

/// Rotary embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    pub scaling: RopeScaling,
    /// Columns of a head that are rotated, an even number.
    pub dim: usize,
}

/// RMSNorms of a layer, one before each half.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    pub eps: f64,
    /// Name in the layer's module, before the mixer.
    pub mixer: &'static str,
    /// Name in the layer's module, before the feed-forward network.
    pub ffn: &'static str,
}

impl NormSpec {
    /// The names that most families use.
    pub fn new(eps: f64) -> Self {
        Self { eps, mixer: "input_layernorm", ffn: "post_attention_layernorm" }
    }
}

/// One decoder layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerSpec {
    pub mixer: Mixer,
    pub ffn: Ffn,
    pub norms: NormSpec,
}

/// A model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub layers: Vec<LayerSpec>,
    /// ε of the final norm.
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    /// Standard deviation of a random initialisation.
    pub initializer_range: f64,
}

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";
pub(super) const FINAL_NORM: &str = "model.norm.weight";

impl ModelSpec {
    /// The routed experts of layer `layer`, if it has any.
    pub fn moe_of(&self, layer: usize) -> Option<&MoeSpec> {
        self.layers[layer].ffn.moe()
    }

    /// The routed experts of the first layer that has any. Layers of a model that have experts have as many.
    pub fn moe(&self) -> Option<&MoeSpec> {
        self.layers.iter().find_map(|layer| layer.ffn.moe())
    }

    /// The plans of all layers, for names, shapes, projections and costs, which do not depend on the form of the
    /// entries.
    pub fn layer_plans(&self) -> impl Iterator<Item = LayerPlan> {
        let form = EntryForm { compute: DType::F32, merge: true, experts: 0..0 };
        (0..self.layers.len()).map(move |layer| LayerPlan::new(self, layer, form.clone()))
    }

    /// HF names and shapes of all tensors of the model.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let vocab = vec![self.vocab_size, self.hidden_size];
        let mut tensors = vec![(EMBEDDING.to_owned(), vocab.clone())];
        tensors.extend(self.layer_plans().flat_map(|layer| layer.tensors().to_vec()));
        tensors.push((FINAL_NORM.to_owned(), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            tensors.push((HEAD.to_owned(), vocab));
        }
        tensors
    }
}

impl RopeSpec {
    /// Radians per position of each pair: `[dim / 2]`, as transformers computes them.
    pub fn inv_freq(&self) -> Vec<f32> {
        let plain = (0..self.dim / 2).map(|i| 1.0 / self.theta.powf(2.0 * i as f64 / self.dim as f64));
        let stretch = |frequency: f64| match self.scaling {
            RopeScaling::None => frequency,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let wavelength = std::f64::consts::TAU / frequency;
                let turns = original_max_position_embeddings / wavelength;
                if turns < low_freq_factor {
                    frequency / factor
                } else if turns > high_freq_factor {
                    frequency
                } else {
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        };
        plain.map(|frequency| stretch(frequency) as f32).collect()
    }
}
