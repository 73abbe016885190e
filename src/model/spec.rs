//! What a decoder-only model computes, whatever its family calls it: the normalised form of a config.json.

use crate::lora::MoeNames;

/// How rotary frequencies are stretched for longer contexts.
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

/// Rotary embedding of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeSpec {
    pub theta: f64,
    pub scaling: RopeScaling,
}

/// What RMSNorm of q and k before the rotation runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head (Qwen3).
    Head,
    /// All heads together (OLMoE).
    All,
}

/// The layers whose MLP is a mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    /// Per layer: whether it has experts, or one dense MLP.
    pub layers: Vec<bool>,
    pub experts: usize,
    /// How many experts a token goes to.
    pub top_k: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub normalise: bool,
    /// Width of an expert.
    pub width: usize,
    /// Width of the expert that all tokens go to, weighted by a sigmoid of its own (Qwen2-MoE).
    pub shared_width: Option<usize>,
    pub names: MoeNames,
}

/// Sizes and switches of one model. `heads × head_dim` may differ from `hidden_size`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// Width of a dense MLP.
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope: RopeSpec,
    pub tie_word_embeddings: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: Option<QkNorm>,
    /// q, k and v are cut off at ± this, before the rotation (OLMoE).
    pub clip_qkv: Option<f64>,
    pub moe: Option<MoeSpec>,
    /// Per layer: how many tokens a query sees, itself included; `None` for all.
    pub layer_windows: Vec<Option<usize>>,
    /// Standard deviation of a random initialisation.
    pub initializer_range: f64,
}

impl ModelSpec {
    /// The experts of layer `layer`, if it has any.
    pub fn moe_of(&self, layer: usize) -> Option<&MoeSpec> {
        self.moe.as_ref().filter(|moe| moe.layers[layer])
    }

    /// Widths of the norms of q and k.
    pub fn qk_norm_widths(&self) -> Option<[usize; 2]> {
        self.qk_norm.map(|over| match over {
            QkNorm::Head => [self.head_dim; 2],
            QkNorm::All => [self.num_heads, self.num_kv_heads].map(|heads| heads * self.head_dim),
        })
    }

    /// HF names and shapes of all tensors of the model.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let (q, kv) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            let attention = [
                ("self_attn.q_proj", q, hidden, self.qkv_bias),
                ("self_attn.k_proj", kv, hidden, self.qkv_bias),
                ("self_attn.v_proj", kv, hidden, self.qkv_bias),
                ("self_attn.o_proj", hidden, q, self.o_bias),
            ];
            for (name, output, input, bias) in attention {
                add(&format!("{name}.weight"), &[output, input]);
                if bias {
                    add(&format!("{name}.bias"), &[output]);
                }
            }
            if let Some([query, key]) = self.qk_norm_widths() {
                add("self_attn.q_norm.weight", &[query]);
                add("self_attn.k_norm.weight", &[key]);
            }
            match self.moe_of(layer) {
                None => {
                    let wide = self.intermediate_size;
                    for (name, output, input) in
                        [("gate_proj", wide, hidden), ("up_proj", wide, hidden), ("down_proj", hidden, wide)]
                    {
                        add(&format!("mlp.{name}.weight"), &[output, input]);
                        if self.mlp_bias {
                            add(&format!("mlp.{name}.bias"), &[output]);
                        }
                    }
                }
                Some(moe) => moe.tensors(hidden, add),
            }
            let mut add = |name: &str| {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), vec![hidden]));
            };
            add("input_layernorm");
            add("post_attention_layernorm");
        }
        tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        tensors
    }
}

impl MoeSpec {
    fn tensors(&self, hidden: usize, mut add: impl FnMut(&str, &[usize])) {
        let MoeNames { block, gate, up, down } = self.names;
        add(&format!("{block}.gate.weight"), &[self.experts, hidden]);
        for expert in 0..self.experts {
            add(&format!("{block}.experts.{expert}.{gate}.weight"), &[self.width, hidden]);
            add(&format!("{block}.experts.{expert}.{up}.weight"), &[self.width, hidden]);
            add(&format!("{block}.experts.{expert}.{down}.weight"), &[hidden, self.width]);
        }
        if let Some(width) = self.shared_width {
            add(&format!("{block}.shared_expert.gate_proj.weight"), &[width, hidden]);
            add(&format!("{block}.shared_expert.up_proj.weight"), &[width, hidden]);
            add(&format!("{block}.shared_expert.down_proj.weight"), &[hidden, width]);
            add(&format!("{block}.shared_expert_gate.weight"), &[1, hidden]);
        }
    }
}

impl RopeSpec {
    /// Radians per position of each pair: `[head_dim / 2]`, as transformers computes them.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let plain = (0..head_dim / 2).map(|i| 1.0 / self.theta.powf(2.0 * i as f64 / head_dim as f64));
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
