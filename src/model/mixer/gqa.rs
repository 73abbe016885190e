//! Grouped-query attention (Ainslie et al., 2023) with rotary positions.
//!
//! q|k|v = x·Wᵀ + b,  q, k ← norm(q), norm(k),  q|k|v clipped,  q, k rotated,  y = attention(q, k, v)·Wₒᵀ + bₒ
//!
//! Saved: q|k|v as attention saw them, its output and row sums, q|k before their norm with its statistics, the mask of
//! the clipped elements, LoRA activations.

use crate::{
    model::{
        attend::AttendSaved,
        context::BatchContext,
        declare::{Declarations, ProjectionId, TensorId},
        gathered::GatheredLayer,
        rope::RopeSpec,
        sublayer::{BackwardContext, CostSizes, MicroBatch, SubLayer},
    },
    ops::{
        Buffer,
        attention::Heads,
        linear::{self, GroupedLinear, Linear},
        norm,
        rope::{self, Rotated},
    },
    shard::ShardError,
};
use tch::Tensor;

/// Extent of the RMSNorm of q and k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head (Qwen3).
    Head,
    /// All heads together (OLMoE).
    All,
}

/// Sizes and switches. `heads × head_dim` may differ from the hidden size.
#[derive(Clone, Debug, PartialEq)]
pub struct GqaSpec {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    /// Width of a head of q and k.
    pub head_dim: usize,
    /// Width of a head of v.
    pub value_dim: usize,
    /// Factor of the scores; `None` for 1/√head_dim.
    pub scale: Option<f64>,
    /// Rotates the first `rope.dim` columns of each head of q and k.
    pub rope: RopeSpec,
    pub qkv_bias: bool,
    pub o_bias: bool,
    /// RMSNorm of q and k before the rotation.
    pub qk_norm: Option<QkNorm>,
    pub qk_norm_eps: f64,
    /// q, k and v are clipped to ± this before the rotation (OLMoE).
    pub clip_qkv: Option<f64>,
    /// Tokens that a query sees, itself included; `None` for all before it.
    pub window: Option<usize>,
}

impl GqaSpec {
    /// The heads as attention computes them.
    pub fn heads(&self) -> Heads {
        let [query, key_value, dim, value_dim] =
            [self.num_heads, self.num_kv_heads, self.head_dim, self.value_dim].map(|n| n as i64);
        let default = Heads::new(query, key_value, dim);
        let window = self.window.map(|window| window as i64);
        Heads { value_dim, scale: self.scale.unwrap_or(default.scale), window, ..default }
    }

    /// Columns of q, k and v.
    fn widths(&self) -> [usize; 3] {
        self.heads().widths().map(|width| width as usize)
    }

    /// Columns of the attention's output.
    fn output(&self) -> usize {
        self.num_heads * self.value_dim
    }
}

/// The sublayer.
#[derive(Debug)]
pub struct Gqa {
    spec: GqaSpec,
    layer: usize,
    hidden_size: usize,
    qkv: ProjectionId,
    o: ProjectionId,
    qk_norm: Option<[TensorId; 2]>,
}

/// Gathered weights.
pub struct Weights {
    qkv: Linear,
    o: Linear,
    /// Weights of q's and k's norms: `[head_dim]` fp32, or all heads' widths.
    qk_norm: Option<[Tensor; 2]>,
}

/// State up to attention; complete with the LoRA activations of the last projection.
pub struct Attended {
    unnormed: Option<UnnormedQk>,
    /// Mask of the clipped elements: bool, as q|k|v.
    clipped: Option<Tensor>,
    /// After norm and rotation.
    qkv: Buffer,
    out: Buffer,
    lse: Tensor,
    h_qkv: Option<Buffer>,
}

/// Tensors kept for backward.
pub struct Saved {
    attended: Attended,
    h_o: Option<Buffer>,
}

/// q|k before their norm `[tokens, (query + key_value)·dim]`, and the statistics of both norms.
struct UnnormedQk {
    qk: Buffer,
    r: [Tensor; 2],
}

impl Gqa {
    fn rotated(&self) -> Rotated {
        let heads = (self.spec.num_heads + self.spec.num_kv_heads) as i64;
        Rotated { heads, dim: self.spec.head_dim as i64 }
    }

    /// Columns of q and k together.
    fn qk_width(&self) -> usize {
        (self.spec.num_heads + self.spec.num_kv_heads) * self.spec.head_dim
    }

    /// Normalises q and k of `qkv` in place.
    fn normalise_qk(&self, qkv: &Tensor, weights: &[Tensor; 2]) -> UnnormedQk {
        let width = self.qk_width() as i64;
        let mut qk = Buffer::empty(&[qkv.size()[0], width], qkv.kind(), qkv.device());
        qk.copy_(&qkv.narrow(1, 0, width));
        let [q, k] = self.normed_parts(&qk, weights);
        let [q_out, k_out] = self.normed_parts(qkv, weights);
        let r = [(q, q_out, &weights[0]), (k, k_out, &weights[1])]
            .map(|(x, out, weight)| norm::forward_into(&x, weight, self.spec.qk_norm_eps, &out));
        UnnormedQk { qk, r }
    }

    /// q and k of `qkv` or `qk`, each as rows of its norm's width: `[tokens, heads, dim]`, or `[tokens, 1, heads·dim]`.
    fn normed_parts(&self, qkv: &Tensor, weights: &[Tensor; 2]) -> [Tensor; 2] {
        let [q, k, _] = self.spec.heads().widths();
        [(0, q, &weights[0]), (q, k, &weights[1])].map(|(first, columns, weight)| {
            let width = weight.size()[0];
            qkv.narrow(1, first, columns).unflatten(1, [columns / width, width])
        })
    }
}

impl SubLayer for Gqa {
    type Spec = GqaSpec;
    type Weights = Weights;
    type Intermediate = Attended;
    type Saved = Saved;
    type Replay = ();

    fn declare(spec: &GqaSpec, declare: &mut Declarations) -> Self {
        let (layer, hidden_size) = (declare.layer, declare.hidden_size);
        let [q, k, v] = spec.widths();
        let leaves = [("q_proj", q), ("k_proj", k), ("v_proj", v)];
        let qkv = declare.projection("self_attn", Some("qkv_proj"), &leaves, hidden_size, spec.qkv_bias);
        let o = declare.projection("self_attn", None, &[("o_proj", hidden_size)], spec.output(), spec.o_bias);
        let qk_norm = spec.qk_norm.map(|over| {
            let [q, k] = match over {
                QkNorm::Head => [spec.head_dim; 2],
                QkNorm::All => [q, k],
            };
            [declare.norm("self_attn.q_norm", q), declare.norm("self_attn.k_norm", k)]
        });
        Self { spec: spec.clone(), layer, hidden_size, qkv, o, qk_norm }
    }

    fn kept_bytes(&self, sizes: &CostSizes) -> usize {
        let (c, spec) = (sizes.element, &self.spec);
        let qkv: usize = spec.widths().iter().sum();
        let statistics = spec.qk_norm.map(|over| match over {
            QkNorm::Head => spec.num_heads + spec.num_kv_heads,
            QkNorm::All => 2,
        });
        let unnormed = statistics.map_or(0, |count| self.qk_width() * c + 4 * count);
        let clipped = if spec.clip_qkv.is_some() { qkv } else { 0 };
        let row_sums = 4 * spec.num_heads;
        (qkv + spec.output()) * c + row_sums + unnormed + clipped + sizes.lora_hidden(&[self.qkv, self.o])
    }

    /// The gradients of q|k|v and of attention's output. The keys and values of a document that a thread packs, and the
    /// fp32 sums of their gradients: of one thread, as ranks on CPUs mostly have.
    fn scratch_bytes(&self, element: usize, batch: MicroBatch) -> usize {
        let GqaSpec { head_dim, value_dim, .. } = self.spec;
        let gradients = (self.spec.widths().iter().sum::<usize>() + self.spec.output()) * element;
        let packed = head_dim * (2 * element + 4) + value_dim * (element + 4);
        batch.tokens * gradients + batch.longest * packed
    }

    /// A query sees half of the document's tokens in the mean; with a window w of s tokens, w·(1 − w/2s).
    fn flops(&self, length: usize) -> f64 {
        let spec = &self.spec;
        let matrices = self.hidden_size * (spec.widths().iter().sum::<usize>() + spec.output());
        let length = length as f64;
        let window = spec.window.map_or(length, |window| (window as f64).min(length));
        let twice_seen = window * (2.0 - window / length);
        4.0 * matrices as f64 + 3.0 * twice_seen * (spec.num_heads * (spec.head_dim + spec.value_dim)) as f64
    }

    fn bind(&self, layer: &GatheredLayer) -> Result<Weights, ShardError> {
        let qk_norm = self.qk_norm.map(|[q, k]| Ok::<_, ShardError>([layer.tensor(q)?, layer.tensor(k)?]));
        Ok(Weights { qkv: layer.linear(self.qkv)?, o: layer.linear(self.o)?, qk_norm: qk_norm.transpose()? })
    }

    fn intermediate(
        &self,
        weights: &Weights,
        x: Buffer,
        _replay: Option<&()>,
        batch: &BatchContext,
    ) -> Result<Attended, ShardError> {
        let segments = batch.adapters.dense();
        let (mut qkv, h_qkv) = linear::forward(&x, GroupedLinear { linear: &weights.qkv, segments }, None);
        drop(x);
        let unnormed = weights.qk_norm.as_ref().map(|weights| self.normalise_qk(&qkv, weights));
        let clipped = self.spec.clip_qkv.map(|most| {
            let clipped = qkv.abs().gt(most);
            let _ = qkv.clamp_(-most, most);
            clipped
        });
        let [cos, sin] = batch.rotary.of(&self.spec.rope);
        rope::forward(&qkv, self.rotated(), &cos, &sin);
        let (out, lse) = batch.attend.forward(self.layer, &qkv, self.spec.heads())?;
        Ok(Attended { unnormed, clipped, qkv, out, lse, h_qkv })
    }

    fn output(
        &self,
        weights: &Weights,
        attended: Attended,
        add: &Tensor,
        batch: &BatchContext,
    ) -> Result<(Buffer, Saved), ShardError> {
        let o = GroupedLinear { linear: &weights.o, segments: batch.adapters.dense() };
        let (y, h_o) = linear::forward(&attended.out, o, Some(add));
        Ok((y, Saved { attended, h_o }))
    }

    fn skip_output(&self, weights: &Weights, attended: Attended, batch: &BatchContext) -> Saved {
        let o = GroupedLinear { linear: &weights.o, segments: batch.adapters.dense() };
        let h_o = linear::lora_hidden(&attended.out, o);
        Saved { attended, h_o }
    }

    fn replay(_saved: &Saved) {}

    fn backward(
        &self,
        weights: &Weights,
        d_y: &Tensor,
        x: impl FnOnce() -> Buffer,
        Saved { attended, h_o }: Saved,
        context: &BackwardContext,
    ) -> Result<Buffer, ShardError> {
        let Attended { unnormed, clipped, qkv, out, lse, h_qkv } = attended;
        let BackwardContext { batch, attend } = context;
        let segments = batch.adapters.dense();
        let o = GroupedLinear { linear: &weights.o, segments };
        let (d_out, g) = linear::backward_input(d_y, o);
        linear::backward_parameters(d_y, &out, h_o.as_deref(), &g, o);
        let saved = AttendSaved { qkv: &qkv, out: &out, lse: &lse };
        let mut d_qkv = attend.backward(self.layer, &d_out, saved, self.spec.heads())?;
        drop((d_out, out, qkv));
        let [cos, sin] = batch.rotary.of(&self.spec.rope);
        rope::backward(&d_qkv, self.rotated(), &cos, &sin);
        if let Some(clipped) = clipped {
            let _ = d_qkv.masked_fill_(&clipped, 0.0);
        }
        if let (Some(weights), Some(UnnormedQk { qk, r })) = (&weights.qk_norm, unnormed) {
            let both = self.normed_parts(&d_qkv, weights).into_iter().zip(self.normed_parts(&qk, weights));
            for (((d, x), weight), r) in both.zip(weights).zip(&r) {
                norm::backward_into(&d, &x, weight, r);
            }
        }
        let qkv = GroupedLinear { linear: &weights.qkv, segments };
        let (d_x, g) = linear::backward_input(&d_qkv, qkv);
        linear::backward_parameters(&d_qkv, &x(), h_qkv.as_deref(), &g, qkv);
        Ok(d_x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::DType,
        model::{
            attend::WithinDocuments, context::Rotary, declare::EntryForm, rope::RopeScaling,
            rows::RowAdapters,
        },
        ops::{
            attention::Documents,
            linear::{AdapterGradient, Base, BoundAdapter, Matrices, Part},
            testing::{autograd, distance, leaf},
        },
    };
    use std::rc::Rc;
    use tch::{Device, Kind};

    const HIDDEN: i64 = 20;
    const RANK: i64 = 3;
    const LENGTHS: [usize; 2] = [7, 4];
    const EPS: f64 = 1e-6;

    /// A linear layer with bias and an adapter on all columns: W, b, A, B.
    fn linear(output: i64, input: i64) -> [Tensor; 4] {
        [&[output, input][..], &[output], &[RANK, input], &[output, RANK]].map(leaf)
    }

    /// The same as operands, with zero gradients of A and B.
    fn bound([w, b, lora_a, lora_b]: &[Tensor; 4]) -> Linear {
        let shared = |tensor: &Tensor| Matrices::Shared(tensor.detach());
        let zeros = |tensor: &Tensor| Matrices::Shared(tensor.detach().zeros_like());
        let part = Part { out: 0..w.size()[0], ranks: 0..RANK, scaling: 0.5, b: shared(lora_b) };
        let gradient = AdapterGradient { a: zeros(lora_a), b: vec![zeros(lora_b)] };
        let adapter =
            BoundAdapter { a: shared(lora_a), parts: vec![part], dropout: None, magnitudes: None, gradient };
        let base = Base { weight: shared(w).into(), bias: Some(b.detach()) };
        Linear { bases: vec![base], adapters: vec![Some(adapter)] }
    }

    fn applied([w, b, lora_a, lora_b]: &[Tensor; 4], x: &Tensor) -> Tensor {
        x.matmul(&w.tr()) + b + x.matmul(&lora_a.tr()).matmul(&lora_b.tr()) * 0.5
    }

    /// The formulas by libtorch's operations, one document and head at a time.
    fn reference(
        spec: &GqaSpec,
        x: &Tensor,
        [qkv, o]: [&[Tensor; 4]; 2],
        norms: &Option<[Tensor; 2]>,
        [cos, sin]: [&Tensor; 2],
    ) -> Tensor {
        let [query, key_value, dim, value_dim] =
            [spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.value_dim].map(|n| n as i64);
        let all = applied(qkv, x);
        let part = |first, heads, dim| all.narrow(1, first, heads * dim).reshape([-1, heads, dim]);
        let clipped =
            |part: Tensor| spec.clip_qkv.map_or(part.shallow_clone(), |most| part.clamp(-most, most));
        let turned = |part: Tensor, norm: Option<&Tensor>| {
            let normed = norm.map_or(part.shallow_clone(), |weight| {
                let rows = part.reshape([x.size()[0], -1, weight.size()[0]]);
                let mean = rows.square().mean_dim(-1, true, None::<Kind>);
                (&rows * (mean + EPS).rsqrt() * weight).reshape(part.size())
            });
            let clipped = clipped(normed);
            let half = spec.rope.dim as i64 / 2;
            let (a, b) = (clipped.narrow(2, 0, half), clipped.narrow(2, half, half));
            let rest = clipped.slice(2, 2 * half, None, 1);
            Tensor::cat(&[&a * cos - &b * sin, &b * cos + &a * sin, rest], 2)
        };
        let q = turned(part(0, query, dim), norms.as_ref().map(|norms| &norms[0]));
        let k = turned(part(query * dim, key_value, dim), norms.as_ref().map(|norms| &norms[1]));
        let v = clipped(part((query + key_value) * dim, key_value, value_dim));
        let (mut rows, mut start) = (Vec::new(), 0);
        for length in LENGTHS.map(|length| length as i64) {
            let position = Tensor::arange(length, (Kind::Int64, Device::Cpu));
            let age = position.unsqueeze(1) - position.unsqueeze(0);
            let window = spec.window.map_or(i64::MAX, |window| window as i64);
            let hidden = age.lt(0).logical_or(&age.ge(window));
            let heads: Vec<Tensor> = (0..query)
                .map(|head| {
                    let own = |part: &Tensor, head| part.narrow(0, start, length).select(1, head);
                    let key_value = head / (query / key_value);
                    let scale = spec.scale.unwrap_or(1.0 / (dim as f64).sqrt());
                    let scores = own(&q, head).matmul(&own(&k, key_value).tr()) * scale;
                    let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, None::<Kind>);
                    weights.matmul(&own(&v, key_value))
                })
                .collect();
            rows.push(Tensor::cat(&heads, 1));
            start += length;
        }
        applied(o, &Tensor::cat(&rows, 0))
    }

    fn cases() -> [GqaSpec; 4] {
        let rope = |dim| RopeSpec { theta: 1e4, scaling: RopeScaling::None, dim };
        let plain = GqaSpec {
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 8,
            value_dim: 8,
            scale: None,
            rope: rope(8),
            qkv_bias: true,
            o_bias: true,
            qk_norm: None,
            qk_norm_eps: EPS,
            clip_qkv: None,
            window: None,
        };
        [
            GqaSpec { qk_norm: Some(QkNorm::Head), ..plain.clone() },
            GqaSpec { qk_norm: Some(QkNorm::All), clip_qkv: Some(0.7), window: Some(3), ..plain.clone() },
            GqaSpec { scale: Some(0.3), value_dim: 6, rope: rope(4), ..plain.clone() },
            GqaSpec { head_dim: 12, value_dim: 5, rope: rope(2), qk_norm: Some(QkNorm::Head), ..plain },
        ]
    }

    #[test]
    fn matches_autograd_and_recomputes_what_backward_needs() {
        let tokens = LENGTHS.iter().sum::<usize>();
        for spec in cases() {
            let form = EntryForm { compute: DType::F32, merge: true, experts: 0..0, quantization: None };
            let gqa = Gqa::declare(&spec, &mut Declarations::new(0, HIDDEN as usize, form));
            let widths = spec.heads().widths();
            let (x, d_y) = (leaf(&[tokens as i64, HIDDEN]), leaf(&[tokens as i64, HIDDEN]).detach());
            let qkv = linear(widths.iter().sum(), HIDDEN);
            let o = linear(HIDDEN, spec.output() as i64);
            let norm_widths = spec.qk_norm.map(|over| match over {
                QkNorm::Head => [spec.head_dim as i64; 2],
                QkNorm::All => [widths[0], widths[1]],
            });
            let norms = norm_widths.map(|widths| widths.map(|width| leaf(&[width]).detach()));
            let angles = leaf(&[tokens as i64, 1, spec.rope.dim as i64 / 2]).detach();
            let (cos, sin) = (angles.cos(), angles.sin());
            let expected = reference(&spec, &x, [&qkv, &o], &norms, [&cos, &sin]);
            let leaves = [&x, &qkv[2], &qkv[3], &o[2], &o[3]];
            let gradients = autograd(&expected, &d_y, &leaves);

            let _guard = tch::no_grad_guard();
            let documents = Documents::new(&LENGTHS, Device::Cpu);
            let attend = WithinDocuments(&documents);
            let batch = BatchContext {
                adapters: Rc::new(RowAdapters::one(tokens)),
                attend: &attend,
                rotary: Rotary::given(spec.rope.clone(), [cos, sin]),
            };
            let x = || Buffer::from(x.detach().copy());
            for skips_output in [false, true] {
                let qk_norm = norms.as_ref().map(|norms| norms.each_ref().map(Tensor::shallow_clone));
                let weights = Weights { qkv: bound(&qkv), o: bound(&o), qk_norm };
                let attended = gqa.intermediate(&weights, x(), None, &batch).unwrap();
                let saved = if skips_output {
                    gqa.skip_output(&weights, attended, &batch)
                } else {
                    let add = x();
                    let (y, saved) = gqa.output(&weights, attended, &add, &batch).unwrap();
                    assert!(distance(&y, &(&expected + &*add)) < 1e-11, "{spec:?}");
                    saved
                };
                let context = BackwardContext { batch: &batch, attend: &attend };
                let d_x = gqa.backward(&weights, &d_y, x, saved, &context).unwrap();
                let of = |linear: &Linear| {
                    let gradient = &linear.adapters[0].as_ref().unwrap().gradient;
                    [gradient.a.of(0), gradient.b[0].of(0)]
                };
                let [[d_a, d_b], [d_a_o, d_b_o]] = [of(&weights.qkv), of(&weights.o)];
                for (i, (ours, exact)) in
                    [&d_x, &d_a, &d_b, &d_a_o, &d_b_o].into_iter().zip(&gradients).enumerate()
                {
                    let most = 1.0 + exact.abs().max().double_value(&[]);
                    assert!(distance(ours, exact) / most < 1e-11, "{spec:?}: gradient {i}");
                }
            }
        }
    }
}
