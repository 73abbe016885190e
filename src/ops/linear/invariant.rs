//! Forwards with one order of sums for each row, see [`batch_invariant`]. Adapters are added by segment to
//! what the base gave, for a sum over both would depend on the segments beside. Backwards are libtorch's GEMMs.

use super::{Backend, GroupedLinear, LoraHiddenGrad, Plain, columns, hidden_of, rows_of, with_columns};
use crate::ops::{
    Buffer, batch_invariant,
    cpu::dots::{Start, multiply},
};
use tch::Tensor;

/// A layer computed so.
pub(super) struct Invariant<'a>(GroupedLinear<'a>);

impl<'a> Invariant<'a> {
    /// `None` unless forwards on `rows` have to be batch-invariant.
    pub(super) fn of(rows: &Tensor, layer: GroupedLinear<'a>) -> Option<Self> {
        batch_invariant::is_on(rows).then_some(Self(layer))
    }
}

impl Backend for Invariant<'_> {
    fn forward(&self, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
        let linear = self.0.linear;
        let y = Buffer::empty(&[x.size()[0], linear.output()], x.kind(), x.device());
        for (group, rows) in self.0.segments.base_runs() {
            let (x, y, add) = (rows_of(x, &rows), rows_of(&y, &rows), add.map(|add| rows_of(add, &rows)));
            for (base, range) in with_columns(&linear.bases) {
                let added = add.as_ref().map(|add| columns(add, &range));
                let start = Start { rows: added.as_ref(), bias: base.bias.as_ref(), scale: 1.0 };
                base.weight.factor(group).multiply_invariant(&x, start, &columns(&y, &range));
            }
        }
        let h = self.lora_hidden(x);
        if let Some(h) = &h {
            for (segment, adapter) in self.0.adapted() {
                let (y, h) = (rows_of(&y, &segment.rows), hidden_of(h, &segment.rows, adapter));
                for part in &adapter.parts {
                    let to = columns(&y, &part.out);
                    let start = Start { rows: Some(&to), ..Start::NOTHING };
                    multiply(&columns(&h, &part.ranks), &part.b.of(segment.base), start, &to);
                }
            }
        }
        (y, h)
    }

    fn lora_hidden(&self, x: &Tensor) -> Option<Buffer> {
        let h = self.0.lora_hidden_like(x)?;
        for (segment, adapter) in self.0.adapted() {
            let (x, a) = (rows_of(x, &segment.rows), adapter.a.of(segment.base));
            for (ranks, scale) in adapter.scales() {
                let start = Start { scale, ..Start::NOTHING };
                multiply(&x, &rows_of(&a, &ranks), start, &columns(&rows_of(&h, &segment.rows), &ranks));
            }
        }
        Some(h)
    }

    fn backward_input(&self, d_y: &Tensor) -> (Buffer, LoraHiddenGrad) {
        Plain(self.0).backward_input(d_y)
    }

    fn backward_parameters(&self, d_y: &Tensor, x: &Tensor, h: &Tensor, g: &Tensor) {
        Plain(self.0).backward_parameters(d_y, x, h, g);
    }
}
