//! libtorch's GEMMs, one after another: for every dtype, on every device.

use super::{
    Backend, GroupedLinear, LoraHiddenGrad, add_hidden, add_product, columns, hidden_of, rows_of,
    with_columns,
};
use crate::ops::Buffer;
use tch::Tensor;

/// A layer computed so.
pub(super) struct Plain<'a>(pub GroupedLinear<'a>);

impl Plain<'_> {
    /// Multiplies h or g by each segment's alpha / rank. Segments of one adapter that follow each other are one pass.
    fn scale(&self, hidden: &Tensor) {
        for (adapter, rows) in self.0.segments.adapter_runs() {
            let bound = adapter.and_then(|adapter| self.0.linear.adapters.get(adapter)?.as_ref());
            if let Some(adapter) = bound {
                adapter.scale(&hidden_of(hidden, &rows, adapter));
            }
        }
    }
}

impl Backend for Plain<'_> {
    fn forward(&self, x: &Tensor, add: Option<&Tensor>) -> (Buffer, Option<Buffer>) {
        let linear = self.0.linear;
        let y = Buffer::empty(&[x.size()[0], linear.output()], x.kind(), x.device());
        for (group, rows) in self.0.segments.base_runs() {
            let (x, y, add) = (rows_of(x, &rows), rows_of(&y, &rows), add.map(|add| rows_of(add, &rows)));
            for (base, range) in with_columns(&linear.bases) {
                let mut y = columns(&y, &range);
                let weight = base.weight.of(group).tensor().tr();
                // The sum starts from what is added, which saves a pass and a rounding.
                let added = add.as_ref().map(|add| columns(add, &range));
                let _ = match added.or_else(|| base.bias.as_ref().map(Tensor::shallow_clone)) {
                    Some(start) => start.addmm_out(&y, &x, &weight),
                    None => x.mm_out(&y, &weight),
                };
                if let (Some(_), Some(bias)) = (&add, &base.bias) {
                    let _ = y.g_add_(bias);
                }
            }
        }
        let h = self.lora_hidden(x);
        if let Some(h) = &h {
            add_hidden(&y, h, self.0);
        }
        (y, h)
    }

    fn lora_hidden(&self, x: &Tensor) -> Option<Buffer> {
        let h = self.0.lora_hidden_like(x)?;
        for (segment, adapter) in self.0.adapted() {
            let to = hidden_of(&h, &segment.rows, adapter);
            let _ = rows_of(x, &segment.rows).mm_out(&to, &adapter.a.of(segment.base).tr());
        }
        self.scale(&h);
        Some(h)
    }

    fn backward_input(&self, d_y: &Tensor) -> (Buffer, LoraHiddenGrad) {
        let linear = self.0.linear;
        let d_x = Buffer::empty(&[d_y.size()[0], linear.input()], d_y.kind(), d_y.device());
        for (group, rows) in self.0.segments.base_runs() {
            let (d_y, mut d_x) = (rows_of(d_y, &rows), rows_of(&d_x, &rows));
            for (i, (base, range)) in with_columns(&linear.bases).enumerate() {
                let (d_part, weight) = (columns(&d_y, &range), base.weight.of(group).tensor());
                let _ = if i == 0 { d_part.mm_out(&d_x, &weight) } else { d_x.addmm_(&d_part, &weight) };
            }
        }
        let Some(g) = self.0.lora_hidden_like(d_y) else { return (d_x, LoraHiddenGrad(None)) };
        for (segment, adapter) in self.0.adapted() {
            let (d_y, g) = (rows_of(d_y, &segment.rows), hidden_of(&g, &segment.rows, adapter));
            for part in &adapter.parts {
                let b = part.b.of(segment.base);
                let _ = columns(&d_y, &part.out).mm_out(&columns(&g, &part.ranks), &b);
            }
        }
        self.scale(&g);
        for (segment, adapter) in self.0.adapted() {
            let g = hidden_of(&g, &segment.rows, adapter);
            let _ = rows_of(&d_x, &segment.rows).addmm_(&g, &adapter.a.of(segment.base));
        }
        (d_x, LoraHiddenGrad(Some(g)))
    }

    fn backward_parameters(&self, d_y: &Tensor, x: &Tensor, h: &Tensor, g: &Tensor) {
        for (segment, adapter) in self.0.adapted() {
            let [d_y, x] = [d_y, x].map(|tensor| rows_of(tensor, &segment.rows));
            let [h, g] = [h, g].map(|tensor| hidden_of(tensor, &segment.rows, adapter));
            let gradient = &adapter.gradient;
            for (part, d_b) in adapter.parts.iter().zip(&gradient.b) {
                let d_b = d_b.of(segment.base);
                add_product(&d_b, &columns(&d_y, &part.out).tr(), &columns(&h, &part.ranks));
            }
            add_product(&gradient.a.of(segment.base), &g.tr(), &x);
        }
    }
}
