//! Dropout of the rows that adapters read, as PEFT's `lora_dropout`: h = s · (m ⊙ x)·Aᵀ with a mask m of 0 and
//! 1/(1 − p), for each part of an adapter its own. The frozen part of the layer sees x as it is.
//!
//! An element of a mask is a function of the part's key, the key of the row's token, and the column, so that every pass
//! over a row, on whatever rank or device, makes the same mask and none is kept.

use super::{
    Backend, BoundAdapter, GroupedLinear, LoraHiddenGrad, Part, RowSegments, Segment, add_hidden,
    add_product, backend, columns, hidden_of, rows_of,
};
use crate::{
    ops::{
        Buffer,
        cpu::{Rows, each_row},
    },
    rng::{self, Stream},
};
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// The dropout of an adapter's parts.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// p: the share of elements that become zero.
    pub rate: f64,
    /// Keys of the parts, in their order.
    pub parts: Vec<Stream>,
}

/// A layer of which an adapter has a dropout, for rows with keys.
pub(super) struct Dropped<'a> {
    layer: GroupedLinear<'a>,
    /// The same rows without adapters.
    frozen: RowSegments,
    keys: Rc<[u64]>,
}

impl<'a> Dropped<'a> {
    /// `None` for rows without keys, as in evaluation, and layers without dropout.
    pub(super) fn of(rows: &Tensor, layer: GroupedLinear<'a>) -> Option<Self> {
        let keys = layer.segments.keys()?.clone();
        layer.named_adapters().find(|adapter| adapter.dropout.is_some())?;
        let frozen = RowSegments::of_device(&[0, rows.size()[0]], Rc::from([None]), rows.device());
        Some(Self { layer, frozen, keys })
    }

    fn base(&self) -> GroupedLinear<'_> {
        GroupedLinear { linear: self.layer.linear, segments: &self.frozen }
    }

    /// The mask of the rows of `segment` for the `part`-th part `[rows, width]`, like `x`; `None` without dropout.
    fn mask(&self, segment: &Segment, adapter: &BoundAdapter, part: usize, x: &Tensor) -> Option<Tensor> {
        let dropout = adapter.dropout.as_ref()?;
        let keys = &self.keys[segment.rows.start as usize..segment.rows.end as usize];
        let (stream, width) = (dropout.parts[part], self.layer.linear.input());
        let mask = if x.device() == Device::Cpu {
            host_mask(stream, keys, width, dropout.rate)
        } else {
            device_mask(stream, keys, width, dropout.rate, x.device())
        };
        Some(mask.to_kind(x.kind()))
    }

    /// m ⊙ `x` for the rows of `segment`.
    fn masked(&self, segment: &Segment, adapter: &BoundAdapter, part: usize, x: &Tensor) -> Tensor {
        match self.mask(segment, adapter, part, x) {
            Some(mask) => x * mask,
            None => x.shallow_clone(),
        }
    }
}

/// The mask of rows with `keys` in a part with `stream`: `[keys, width]` fp32. Element i of a row is 0 where the i-th
/// uniform number of the stream for the row's key is below `rate`, else 1 / (1 − rate).
fn host_mask(stream: Stream, keys: &[u64], width: i64, rate: f64) -> Tensor {
    let mask = Tensor::empty([keys.len() as i64, width], (Kind::Float, Device::Cpu));
    let (rate, kept) = (rate as f32, (1.0 / (1.0 - rate)) as f32);
    each_row([], [Rows::<f32>::of(&mask)], [], |row, [], [to], []| {
        let stream = stream.keyed(keys[row]);
        for (i, to) in (0..).zip(to) {
            *to = if stream.uniform(i) < rate { 0.0 } else { kept };
        }
    });
    mask
}

/// The same mask by operations of `device`, to which the keys alone are copied. Integers of 64 bits wrap there, too.
fn device_mask(stream: Stream, keys: &[u64], width: i64, rate: f64, device: Device) -> Tensor {
    let keys: Vec<i64> = keys.iter().map(|&key| stream.keyed(key).key() as i64).collect();
    let keys = Tensor::from_slice(&keys).view([-1, 1]).to_device(device);
    // A right shift of libtorch repeats the sign.
    let shifted =
        |z: &Tensor, by: i64| z.bitwise_right_shift_tensor_scalar(by).bitwise_and((1i64 << (64 - by)) - 1);
    let counter = Tensor::arange(width, (Kind::Int64, device)) + 1;
    let [step, first, second] = rng::SPLIT_MIX.map(|factor| factor as i64);
    let z = keys + counter * step;
    let z = z.bitwise_xor_tensor(&shifted(&z, 30)) * first;
    let z = z.bitwise_xor_tensor(&shifted(&z, 27)) * second;
    let z = z.bitwise_xor_tensor(&shifted(&z, 31));
    let uniform = shifted(&z, 40).to_kind(Kind::Float) / (1i64 << 24) as f64;
    uniform.ge(f64::from(rate as f32)).to_kind(Kind::Float) * f64::from((1.0 / (1.0 - rate)) as f32)
}

/// The rows of A, or of its gradient, that are `part`'s.
fn own_rows(a: &Tensor, part: &Part) -> Tensor {
    rows_of(a, &part.ranks)
}

impl Backend for Dropped<'_> {
    fn forward(&self, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
        let (y, _) = backend(x, self.base()).forward(x, add);
        let h = self.lora_hidden(x);
        if let Some(h) = &h {
            add_hidden(&y, h, self.layer);
        }
        (y, h)
    }

    fn lora_hidden(&self, x: &Tensor) -> Option<Buffer> {
        let h = self.layer.lora_hidden_like(x)?;
        for (segment, adapter) in self.layer.adapted() {
            let (x, h) = (rows_of(x, &segment.rows), hidden_of(&h, &segment.rows, adapter));
            let a = adapter.a.of(segment.base);
            for (i, part) in adapter.parts.iter().enumerate() {
                let to = columns(&h, &part.ranks);
                let _ = self.masked(&segment, adapter, i, &x).mm_out(&to, &own_rows(&a, part).tr());
            }
            adapter.scale(&h);
        }
        Some(h)
    }

    fn backward_input(&self, d_y: &Tensor) -> (Buffer, LoraHiddenGrad) {
        let (d_x, _) = backend(d_y, self.base()).backward_input(d_y);
        let Some(g) = self.layer.lora_hidden_like(d_y) else { return (d_x, LoraHiddenGrad(None)) };
        for (segment, adapter) in self.layer.adapted() {
            let [d_y, d_x] = [d_y, &*d_x].map(|tensor| rows_of(tensor, &segment.rows));
            let (mut d_x, g) = (d_x, hidden_of(&g, &segment.rows, adapter));
            let a = adapter.a.of(segment.base);
            for part in &adapter.parts {
                let _ = columns(&d_y, &part.out).mm_out(&columns(&g, &part.ranks), &part.b.of(segment.base));
            }
            adapter.scale(&g);
            for (i, part) in adapter.parts.iter().enumerate() {
                let d_masked = columns(&g, &part.ranks).mm(&own_rows(&a, part));
                let _ = d_x.g_add_(&self.masked(&segment, adapter, i, &d_masked));
            }
        }
        (d_x, LoraHiddenGrad(Some(g)))
    }

    fn backward_parameters(&self, d_y: &Tensor, x: &Tensor, h: &Tensor, g: &Tensor) {
        for (segment, adapter) in self.layer.adapted() {
            let [d_y, x] = [d_y, x].map(|tensor| rows_of(tensor, &segment.rows));
            let [h, g] = [h, g].map(|tensor| hidden_of(tensor, &segment.rows, adapter));
            let d_a = adapter.gradient.a.of(segment.base);
            for (i, (part, d_b)) in adapter.parts.iter().zip(&adapter.gradient.b).enumerate() {
                let d_b = d_b.of(segment.base);
                add_product(&d_b, &columns(&d_y, &part.out).tr(), &columns(&h, &part.ranks));
                let x = self.masked(&segment, adapter, i, &x);
                add_product(&own_rows(&d_a, part), &columns(&g, &part.ranks).tr(), &x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{
        linear::{
            AdapterGradient, Base, Linear, LoraHiddenGrad, Matrices, backward_input, backward_parameters,
            forward, lora_hidden,
        },
        testing::{autograd, distance, leaf},
    };

    const RATE: f64 = 0.3;

    #[test]
    fn a_device_makes_the_mask_of_the_host() {
        let (stream, keys) = (Stream::new(3, "site"), [0, 1, u64::MAX, 0x1234_5678_9ABC_DEF0]);
        let [host, device] =
            [host_mask(stream, &keys, 4000, RATE), device_mask(stream, &keys, 4000, RATE, Device::Cpu)];
        assert_eq!(host, device);
        let dropped = host.eq(0.0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
        assert!((dropped - RATE).abs() < 0.02, "{dropped}");
        assert!((host.max().double_value(&[]) - 1.0 / 0.7).abs() < 1e-6);
    }

    /// Two parts with masks of their own on a layer of three groups of columns, against autograd; rows without keys
    /// have no dropout.
    #[test]
    fn equals_autograd_through_the_masks() {
        let streams = ["first", "second"].map(|name| Stream::new(1, name));
        let keys: Vec<u64> = (0..7).map(|i| Stream::new(2, "row").bits(i)).collect();
        for with_keys in [true, false] {
            let (w, a, bias) = (leaf(&[10, 6]), leaf(&[5, 6]), leaf(&[10]));
            let (b_first, b_second) = (leaf(&[4, 2]), leaf(&[3, 3]));
            let (x, add, d_y) = (leaf(&[7, 6]), leaf(&[7, 10]).detach(), leaf(&[7, 10]).detach());
            let masked = |stream: Stream| {
                if with_keys {
                    &x * host_mask(stream, &keys, 6, RATE).to_kind(Kind::Double)
                } else {
                    &x * 1.0
                }
            };
            let h = Tensor::cat(
                &[
                    masked(streams[0]).matmul(&a.narrow(0, 0, 2).tr()) * 0.5,
                    masked(streams[1]).matmul(&a.narrow(0, 2, 3).tr()) * 2.0,
                ],
                1,
            );
            let parts = [
                h.narrow(1, 0, 2).matmul(&b_first.tr()),
                Tensor::zeros([7, 3], (Kind::Double, Device::Cpu)),
                h.narrow(1, 2, 3).matmul(&b_second.tr()),
            ];
            let y = x.matmul(&w.tr()) + &bias + &add + Tensor::cat(&parts, 1);
            let gradients = autograd(&y, &d_y, &[&x, &a, &b_first, &b_second]);

            let _guard = tch::no_grad_guard();
            let shared = |tensor: &Tensor| Matrices::Shared(tensor.detach());
            let sums = |tensor: &Tensor| Matrices::Shared(tensor.detach().zeros_like());
            let part = |out, ranks, scaling, b: &Tensor| Part { out, ranks, scaling, b: shared(b) };
            let adapter = BoundAdapter {
                a: shared(&a),
                parts: vec![part(0..4, 0..2, 0.5, &b_first), part(7..10, 2..5, 2.0, &b_second)],
                dropout: Some(Dropout { rate: RATE, parts: streams.to_vec() }),
                magnitudes: None,
                gradient: AdapterGradient { a: sums(&a), b: vec![sums(&b_first), sums(&b_second)] },
            };
            let base = Base { weight: shared(&w).into(), bias: Some(bias.detach()) };
            let linear = Linear { bases: vec![base], adapters: vec![Some(adapter)] };
            let segments = RowSegments::one(7);
            let segments = if with_keys { segments.with_keys(keys[..].into()) } else { segments };
            let layer = GroupedLinear { linear: &linear, segments: &segments };
            let (x, expected) = (x.detach(), [y.detach(), h.detach(), h.detach()]);
            let (found_y, found_h) = forward(&x, layer, Some(&add));
            let (d_x, g): (_, LoraHiddenGrad) = backward_input(&d_y, layer);
            backward_parameters(&d_y, &x, found_h.as_deref(), &g, layer);
            let again = lora_hidden(&x, layer).unwrap();
            let found = [found_y, found_h.unwrap(), again, d_x].map(|buffer| buffer.shallow_clone());
            let sums = &linear.adapters[0].as_ref().unwrap().gradient;
            let of_parameters = [&sums.a, &sums.b[0], &sums.b[1]].map(|sums| sums.of(0));
            for (i, (found, expected)) in
                found.iter().chain(&of_parameters).zip(expected.iter().chain(&gradients)).enumerate()
            {
                assert!(
                    distance(found, expected) < 1e-12,
                    "{with_keys}: {i} is {}",
                    distance(found, expected)
                );
            }
        }
    }
}
