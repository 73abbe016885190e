//! Arithmetic of a training step.

use crate::{
    lora::{LoraShapes, Site},
    model::ModelSpec,
};

/// Floating-point operations of forward and backward for a token of a document of `length` tokens: those of each
/// layer's halves ([`Half::flops`](crate::model::sublayer::Half::flops)), 4 a parameter of the head, 6 a LoRA parameter
/// that the token meets. The embedding lookup multiplies nothing; recomputation does not count.
pub fn flops_per_token(spec: &ModelSpec, sites: &[Site], shapes: &LoraShapes, length: usize) -> f64 {
    let layers: f64 =
        spec.layer_plans().map(|layer| layer.mixer.flops(length) + layer.ffn.flops(length)).sum();
    let head = spec.vocab_size * spec.hidden_size;
    let lora: usize = sites.iter().map(|site| site.parameters_met(shapes.of(site).rank)).sum();
    layers + 4.0 * head as f64 + 6.0 * lora as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lora::{LoraShape, MoeNames, targets::resolve},
        model::{
            DenseSpec, Ffn, GqaSpec, LayerSpec, Mixer, MoeSpec, NormSpec, QkNorm, RopeScaling, RopeSpec,
            base_plan::all_projections,
        },
    };

    #[test]
    fn counts_every_matrix_once() {
        let gqa = GqaSpec {
            num_heads: 3,
            num_kv_heads: 1,
            head_dim: 4,
            value_dim: 4,
            scale: None,
            rope: RopeSpec { theta: 10000.0, scaling: RopeScaling::None, dim: 4 },
            qkv_bias: true,
            o_bias: false,
            qk_norm: Some(QkNorm::Head),
            qk_norm_eps: 1e-6,
            clip_qkv: None,
            window: None,
        };
        let ffn = Ffn::Dense(DenseSpec { width: 16, bias: false });
        let layer = LayerSpec { mixer: Mixer::Gqa(gqa.clone()), ffn, norms: NormSpec::new(1e-6) };
        let mut spec = ModelSpec {
            vocab_size: 100,
            hidden_size: 8,
            layers: vec![layer; 2],
            rms_norm_eps: 1e-6,
            tie_word_embeddings: true,
            initializer_range: 0.2,
            quantization: None,
        };
        let five = LoraShapes::from(LoraShape::new(5, 10.0));
        let sites = resolve(&all_projections(&spec), Some(&["q_proj".to_owned()]), &[]).unwrap();
        // A layer: q, o [12, 8], k, v [4, 8], gate, up, down [16, 8]; the head [100, 8].
        let frozen = 2 * (2 * 96 + 2 * 32 + 3 * 128) + 800;
        let lora = 2 * 5 * (8 + 12);
        let expected = |seen: usize| (4 * frozen + 6 * lora + 6 * 12 * seen) as f64;
        assert_eq!(flops_per_token(&spec, &sites, &five, 10), expected(10 + 10));
        spec.tie_word_embeddings = false;
        assert_eq!(flops_per_token(&spec, &sites, &five, 10), expected(10 + 10));
        // With 5 experts of width 3 in layer 1, of which a token meets 2: less a dense MLP, more a router and those
        // two.
        let mut moe = spec.clone();
        let names = MoeNames::MLP;
        let (experts, top_k, width) = (5, 2, 3);
        moe.layers[1].ffn =
            Ffn::Moe(MoeSpec { experts, top_k, normalise: true, width, shared_width: None, names });
        let met = frozen - 3 * 128 + 5 * 8 + 2 * 3 * (3 * 8);
        let without_lora = (4 * met + 6 * 12 * 20) as f64;
        assert_eq!(flops_per_token(&moe, &[], &five, 10), without_lora);
        let down = resolve(&all_projections(&moe), Some(&["*.experts.down_proj".to_owned()]), &[]).unwrap();
        // Of two experts: A [5, 3] and B [8, 5].
        assert_eq!(flops_per_token(&moe, &down, &five, 10), without_lora + (6 * 2 * 5 * (3 + 8)) as f64);
        // The queries of 10 tokens see 1, 2, 3, 4, 5, 5, 5, 5, 5, 5 = 40; the formula, in the mean, 37.5.
        for (layer, window) in spec.layers.iter_mut().zip([5, 50]) {
            layer.mixer = Mixer::Gqa(GqaSpec { window: Some(window), ..gqa.clone() });
        }
        assert_eq!(flops_per_token(&spec, &sites, &five, 10), expected(0) + 6.0 * 12.0 * (7.5 + 10.0));
    }
}
