//! Declarations of a decoder layer's frozen tensors: HF names, shapes, LoRA projections and entries of the layer's
//! regions, from one list. Each sublayer declares its own and keeps the ids, by which
//! [`GatheredLayer`](super::gathered::GatheredLayer) finds the gathered tensors. Pure.

use crate::{
    dtype::DType,
    lora::targets::{Experts, Projection},
    shard::{EntrySpec, Span, Storage},
};
use std::ops::Range;

/// A projection of a layer, with its adapter modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProjectionId(usize);

/// A frozen tensor of a layer that is no projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorId(usize);

/// Entries of the frozen tensors of a projection.
#[derive(Clone, Debug)]
pub(super) enum BaseEntries {
    /// In the dense region: (weight, bias) of each GEMM.
    Dense(Vec<(usize, Option<usize>)>),
    /// In the experts' region: `[own experts, Σ widths, input]`.
    Experts(usize),
}

/// Form of the region entries; HF names and projections do not depend on it.
#[derive(Clone, Debug)]
pub struct EntryForm {
    /// Dtype of matrices; norm weights are fp32.
    pub compute: DType,
    /// One GEMM for all leaves of a projection.
    pub merge: bool,
    /// Routed experts of this rank.
    pub experts: Range<usize>,
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
        leaves: &[(&'static str, usize)],
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
        let gemms: Vec<_> = if self.form.merge { vec![leaves] } else { leaves.chunks(1).collect() };
        let mut gemm = |leaves| {
            let weight = self.entry(stacked(&parent, leaves, Some(input), self.form.compute));
            let bias = bias.then(|| self.entry(stacked(&parent, leaves, None, self.form.compute)));
            (weight, bias)
        };
        let base = BaseEntries::Dense(gemms.into_iter().map(&mut gemm).collect());
        self.push(Projection { parent, fused, leaves: leaves.to_vec(), input, experts: None }, base)
    }

    /// The same linear layer of each routed expert, without biases. Model files name it by `experts.names`.
    pub fn expert_projection(
        &mut self,
        experts: Experts,
        fused: Option<&'static str>,
        leaves: &[(&'static str, usize)],
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
        // The matrices of an expert lie one below the other: one GEMM computes all of them.
        let own = self.form.experts.clone();
        let matrices = own.clone().flat_map(|expert| leaves.iter().map(move |leaf| (expert, leaf)));
        let span = |(expert, (leaf, width)): (usize, &(&'static str, usize))| Span {
            tensor: name(expert, leaf),
            start: 0,
            elements: width * input,
        };
        let names: Vec<&str> = leaves.iter().map(|(leaf, _)| experts.names.leaf(leaf)).collect();
        let rows = leaves.iter().map(|(_, width)| width).sum();
        self.experts.push(EntrySpec {
            name: format!("experts.{}", names.join("|")),
            shape: vec![own.len(), rows, input],
            storage: Storage::Plain(self.form.compute),
            spans: matrices.map(span).collect(),
        });
        let base = BaseEntries::Experts(self.experts.len() - 1);
        let (parent, experts) = (self.path("mlp.experts"), Some(experts));
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
