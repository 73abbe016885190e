//! Arithmetic of a training step.

use crate::{
    lora::Site,
    model::{ModelSpec, MoeSpec},
};

/// Floating-point operations that a token of a document of `length` tokens costs in forward and backward:
///
/// 4 · frozen matrix parameters (of experts those that it goes to; head included, embedding lookup not: y and dx, no dW) + 6 · LoRA parameters
/// + 6 · length · heads · head_dim a layer for causal attention. What is computed twice does not count twice.
pub fn flops_per_token(spec: &ModelSpec, sites: &[Site], rank: usize, length: usize) -> f64 {
    let matrices = spec.tensors().into_iter().filter(|(_, shape)| shape.len() == 2);
    let frozen: usize = matrices.map(|(_, shape)| shape.iter().product::<usize>()).sum();
    // A token meets only those experts that it goes to.
    let unmet = |moe: &MoeSpec| 3 * (moe.experts - moe.top_k) * moe.width * spec.hidden_size;
    let unmet: usize = (0..spec.num_layers).filter_map(|layer| spec.moe_of(layer)).map(unmet).sum();
    // Tied, the embedding's matrix is the head's; otherwise the lookup multiplies nothing.
    let lookup = if spec.tie_word_embeddings { 0 } else { spec.vocab_size * spec.hidden_size };
    let lora: usize = sites.iter().map(|site| site.parameters_met(rank)).sum();
    let length = length as f64;
    // A query sees s/2 tokens on average; with a window of w, w·(1 − w/2s).
    let windows = spec.layer_windows.iter().map(|window| window.map_or(length, |w| (w as f64).min(length)));
    let seen: f64 = windows.map(|window| window * (2.0 - window / length)).sum();
    4.0 * (frozen - unmet - lookup) as f64
        + 6.0 * (lora as f64 + seen * (spec.num_heads * spec.head_dim) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lora::{MoeNames, targets::resolve},
        model::{QkNorm, RopeScaling, RopeSpec, base_plan::all_projections},
    };

    #[test]
    fn counts_every_matrix_once() {
        let mut spec = ModelSpec {
            vocab_size: 100,
            hidden_size: 8,
            intermediate_size: 16,
            num_layers: 2,
            num_heads: 3,
            num_kv_heads: 1,
            head_dim: 4,
            rms_norm_eps: 1e-6,
            rope: RopeSpec { theta: 10000.0, scaling: RopeScaling::None },
            tie_word_embeddings: true,
            qkv_bias: true,
            o_bias: false,
            mlp_bias: false,
            qk_norm: Some(QkNorm::Head),
            clip_qkv: None,
            moe: None,
            layer_windows: vec![None, None],
            initializer_range: 0.2,
        };
        let sites = resolve(&all_projections(&spec), Some(&["q_proj".to_owned()]), &[]).unwrap();
        // A layer: q, o [12, 8], k, v [4, 8], gate, up, down [16, 8]; the head [100, 8].
        let frozen = 2 * (2 * 96 + 2 * 32 + 3 * 128) + 800;
        let lora = 2 * 5 * (8 + 12);
        let expected = |seen: usize| (4 * frozen + 6 * lora + 6 * 12 * seen) as f64;
        assert_eq!(flops_per_token(&spec, &sites, 5, 10), expected(10 + 10));
        spec.tie_word_embeddings = false;
        assert_eq!(flops_per_token(&spec, &sites, 5, 10), expected(10 + 10));
        // With 5 experts of width 3 in layer 1, of which a token meets 2: less a dense MLP, more a router and those two.
        let mut moe = spec.clone();
        let names = MoeNames::MLP;
        let (experts, top_k, width) = (5, 2, 3);
        let layers = vec![false, true];
        moe.moe = Some(MoeSpec { layers, experts, top_k, normalise: true, width, shared_width: None, names });
        let met = frozen - 3 * 128 + 5 * 8 + 2 * 3 * (3 * 8);
        let without_lora = (4 * met + 6 * 12 * 20) as f64;
        assert_eq!(flops_per_token(&moe, &[], 5, 10), without_lora);
        let down = resolve(&all_projections(&moe), Some(&["*.experts.down_proj".to_owned()]), &[]).unwrap();
        // Of two experts: A [5, 3] and B [8, 5].
        assert_eq!(flops_per_token(&moe, &down, 5, 10), without_lora + (6 * 2 * 5 * (3 + 8)) as f64);
        // The queries of 10 tokens see 1, 2, 3, 4, 5, 5, 5, 5, 5, 5 = 40; the formula, in the mean, 37.5.
        spec.layer_windows = vec![Some(5), Some(50)];
        assert_eq!(flops_per_token(&spec, &sites, 5, 10), expected(0) + 6.0 * 12.0 * (7.5 + 10.0));
    }
}
