//! Declarations of a decoder layer's frozen tensors: HF names, shapes, LoRA projections and entries of the layer's
//! regions, from one list. Each sublayer declares its own and keeps the ids, by which
//! [`GatheredLayer`](super::gathered::GatheredLayer) finds the gathered tensors. Pure.

use super::quantized::Quantization;
use crate::{
    dtype::DType,
    lora::targets::{Experts, Projection},
    quant::{Format, Grid},
    shard::{EntrySpec, Span, Storage},
};
use std::ops::Range;

/// A projection of a layer, with its adapter modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProjectionId(usize);

/// A frozen tensor of a layer that is no projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorId(usize);

/// Entries of the frozen tensors of a projection, of each GEMM.
#[derive(Clone, Debug)]
pub(super) struct BaseEntries {
    /// True for entries of the experts' region: `[own experts, Σ widths, input]`.
    pub experts: bool,
    pub gemms: Vec<GemmEntries>,
}

/// Entries of a GEMM.
#[derive(Clone, Debug)]
pub(super) struct GemmEntries {
    pub weight: usize,
    /// Format of the weight, if it is packed: see [`Storage::Packed`].
    pub format: Option<Format>,
    /// Rows of each leaf.
    pub widths: Vec<usize>,
    pub input: usize,
    pub bias: Option<usize>,
}

/// Name of a leaf and its rows.
type Leaf = (&'static str, usize);

/// Form of the region entries; HF names and projections do not depend on it.
#[derive(Clone, Debug)]
pub struct EntryForm {
    /// Dtype of matrices; norm weights are fp32.
    pub compute: DType,
    /// One GEMM for all leaves of a projection.
    pub merge: bool,
    /// Routed experts of this rank.
    pub experts: Range<usize>,
    pub quantization: Option<Quantization>,
}

impl EntryForm {
    /// The format of a leaf of `parent`, if it is quantised.
    fn format(&self, parent: &str, leaf: &str) -> Option<Format> {
        self.quantization.as_ref()?.of(parent, leaf)
    }

    /// Cuts `leaves` of `parent` into those that one GEMM computes: all if GEMMs are merged, but leaves that are stored
    /// alike.
    fn gemms<'a>(&self, parent: &str, leaves: &'a [Leaf]) -> Vec<(Option<Format>, &'a [Leaf])> {
        let format = |leaf: &Leaf| self.format(parent, leaf.0);
        let cut = leaves.chunk_by(|a, b| self.merge && format(a) == format(b));
        cut.map(|leaves| (format(&leaves[0]), leaves)).collect()
    }
}

/// The declarations of one layer.
#[derive(Debug)]
pub struct Declarations {
    /// Index of the layer.
    pub layer: usize,
    pub hidden_size: usize,
    form: EntryForm,
    pub(super) tensors: Vec<(String, Vec<usize>)>,
    pub(super) projections: Vec<Projection>,
    pub(super) bases: Vec<BaseEntries>,
    pub(super) dense: Vec<EntrySpec>,
    pub(super) experts: Vec<EntrySpec>,
}

impl ProjectionId {
    /// The `index`-th projection of a layer.
    pub(super) fn at(index: usize) -> Self {
        Self(index)
    }

    /// Index in the layer's list of projections.
    pub fn index(self) -> usize {
        self.0
    }
}

impl TensorId {
    /// Index of the entry in the layer's dense region.
    pub(super) fn entry(self) -> usize {
        self.0
    }
}

impl Declarations {
    /// No declarations yet, of layer `layer`.
    pub fn new(layer: usize, hidden_size: usize, form: EntryForm) -> Self {
        let (tensors, projections, bases) = (Vec::new(), Vec::new(), Vec::new());
        let (dense, experts) = (Vec::new(), Vec::new());
        Self { layer, hidden_size, form, tensors, projections, bases, dense, experts }
    }

    /// A linear layer of `leaves` (name, width) in module `parent` (`self_attn`). All leaves have `input` columns;
    /// `fused` names the target that covers all of them.
    pub fn projection(
        &mut self,
        parent: &str,
        fused: Option<&'static str>,
        leaves: &[Leaf],
        input: usize,
        bias: bool,
    ) -> ProjectionId {
        let parent = self.path(parent);
        for (leaf, width) in leaves {
            self.tensors.push((format!("{parent}.{leaf}.weight"), vec![*width, input]));
            if bias {
                self.tensors.push((format!("{parent}.{leaf}.bias"), vec![*width]));
            }
        }
        let gemms = self.form.gemms(&parent, leaves);
        let mut gemm = |(format, leaves): (Option<Format>, &[Leaf])| {
            let spec = stacked(&parent, leaves, Some(input), self.form.compute);
            let weight = push_weight(&mut self.dense, spec, format, input);
            let bias = bias.then(|| self.entry(stacked(&parent, leaves, None, self.form.compute)));
            let widths = leaves.iter().map(|(_, width)| *width).collect();
            GemmEntries { weight, format, widths, input, bias }
        };
        let gemms = gemms.into_iter().map(&mut gemm).collect();
        let base = BaseEntries { experts: false, gemms };
        self.push(Projection { parent, fused, leaves: leaves.to_vec(), input, experts: None }, base)
    }

    /// The same linear layer of each routed expert, without biases. Model files name it by `experts.names`.
    pub fn expert_projection(
        &mut self,
        experts: Experts,
        fused: Option<&'static str>,
        leaves: &[Leaf],
        input: usize,
    ) -> ProjectionId {
        let block = self.path(experts.names.block);
        let name = |expert: usize, leaf: &str| {
            format!("{block}.experts.{expert}.{}.weight", experts.names.leaf(leaf))
        };
        for expert in 0..experts.count {
            let matrix = |(leaf, width): &(&str, usize)| (name(expert, leaf), vec![*width, input]);
            self.tensors.extend(leaves.iter().map(matrix));
        }
        let (parent, own) = (self.path("mlp.experts"), self.form.experts.clone());
        // The matrices of an expert lie one below the other: one GEMM computes all of them.
        let mut gemm = |(format, leaves): (Option<Format>, &[Leaf])| {
            let matrices = own.clone().flat_map(|expert| leaves.iter().map(move |leaf| (expert, leaf)));
            let span = |(expert, (leaf, width)): (usize, &Leaf)| Span {
                tensor: name(expert, leaf),
                start: 0,
                elements: width * input,
            };
            let names: Vec<&str> = leaves.iter().map(|(leaf, _)| experts.names.leaf(leaf)).collect();
            let widths: Vec<usize> = leaves.iter().map(|(_, width)| *width).collect();
            let spec = EntrySpec {
                name: format!("experts.{}", names.join("|")),
                shape: vec![own.len(), widths.iter().sum(), input],
                storage: Storage::Plain(self.form.compute),
                spans: matrices.map(span).collect(),
            };
            let weight = push_weight(&mut self.experts, spec, format, input);
            GemmEntries { weight, format, widths, input, bias: None }
        };
        // Experts are never split for their GEMMs' sake.
        let form = EntryForm { merge: true, ..self.form.clone() };
        let gemms = form.gemms(&parent, leaves).into_iter().map(&mut gemm).collect();
        let base = BaseEntries { experts: true, gemms };
        let experts = Some(experts);
        self.push(Projection { parent, fused, leaves: leaves.to_vec(), input, experts }, base)
    }

    /// A frozen matrix `{name}.weight` in compute dtype that has no adapter.
    pub fn matrix(&mut self, name: &str, shape: [usize; 2]) -> TensorId {
        self.tensor(name, &shape, self.form.compute)
    }

    /// The weight `{name}.weight` `[width]` of a norm, in fp32.
    pub fn norm(&mut self, name: &str, width: usize) -> TensorId {
        self.tensor(name, &[width], DType::F32)
    }

    fn tensor(&mut self, name: &str, shape: &[usize], dtype: DType) -> TensorId {
        let tensor = format!("{}.weight", self.path(name));
        self.tensors.push((tensor.clone(), shape.to_vec()));
        TensorId(self.entry(EntrySpec::whole(name, tensor, shape, dtype)))
    }

    fn path(&self, name: &str) -> String {
        format!("model.layers.{}.{name}", self.layer)
    }

    fn entry(&mut self, entry: EntrySpec) -> usize {
        self.dense.push(entry);
        self.dense.len() - 1
    }

    fn push(&mut self, projection: Projection, base: BaseEntries) -> ProjectionId {
        self.projections.push(projection);
        self.bases.push(base);
        ProjectionId(self.projections.len() - 1)
    }
}

/// Adds the weight that `spec` describes in plain numbers to the entries of a region, packed if it has a format; behind
/// it the scales of its matrices, if the format has such. Its index.
fn push_weight(
    region: &mut Vec<EntrySpec>,
    mut spec: EntrySpec,
    format: Option<Format>,
    input: usize,
) -> usize {
    let weight = region.len();
    let Some(format) = format else {
        region.push(spec);
        return weight;
    };
    spec.storage = Storage::Packed(format);
    for span in &mut spec.spans {
        let grid = Grid { format, rows: span.elements / input, columns: input };
        span.elements = grid.tiles() * format.tile().elements;
    }
    let scales = format.has_global().then(|| EntrySpec {
        name: format!("{}.scales", spec.name),
        shape: vec![spec.spans.len()],
        storage: Storage::Plain(DType::F32),
        spans: Vec::new(),
    });
    region.push(spec);
    region.extend(scales);
    weight
}

/// `leaves` of a projection, one below the other: weights `[Σ widths, input]`, or biases `[Σ widths]` without `input`.
fn stacked(parent: &str, leaves: &[(&str, usize)], input: Option<usize>, dtype: DType) -> EntrySpec {
    let kind = if input.is_some() { "weight" } else { "bias" };
    let rows = leaves.iter().map(|(_, width)| width).sum();
    let spans = leaves.iter().map(|(leaf, width)| Span {
        tensor: format!("{parent}.{leaf}.{kind}"),
        start: 0,
        elements: width * input.unwrap_or(1),
    });
    let names: Vec<&str> = leaves.iter().map(|(leaf, _)| *leaf).collect();
    let shape = std::iter::once(rows).chain(input).collect();
    EntrySpec {
        name: format!("{}.{kind}", names.join("|")),
        shape,
        storage: Storage::Plain(dtype),
        spans: spans.collect(),
    }
}
