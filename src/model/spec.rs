//! Description of a decoder-only model, independent of its family: the normalised form of a config.json.

use super::{
    declare::EntryForm,
    ffn::{Ffn, MoeSpec},
    layer::LayerPlan,
    mixer::Mixer,
    quantized::Quantization,
};
use crate::dtype::DType;

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
#[derive(Clone, Debug, PartialEq)]
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
    /// Storage of the linear layers, if they are quantised.
    pub quantization: Option<Quantization>,
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
        let form = EntryForm { compute: DType::F32, merge: true, experts: 0..0, quantization: None };
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
