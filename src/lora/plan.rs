//! Plan of an adapter before any tensor exists: its modules by layer and its regions, cut over ranks. Pure.

use super::{
    module::{FirstEntries, LORA_MAPPING, LoraModule, Parameter, Stack},
    targets::{Projection, Site},
};
use crate::{
    dtype::DType,
    mesh::Mesh,
    shard::{EntrySpec, Region, RegionLayout, adapter::align_bytes},
};

/// Rank and scale of an adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraShape {
    pub rank: usize,
    pub alpha: f64,
}

/// The modules of one decoder layer, by projection.
#[derive(Debug, Default)]
pub struct LayerAdapterPlan {
    /// In the order of the layer's projections; `None` for one without an adapter.
    pub modules: Vec<Option<Box<dyn LoraModule>>>,
}

impl LayerAdapterPlan {
    /// The logical parameters of the layer.
    pub fn parameters(&self) -> impl Iterator<Item = Parameter> {
        self.modules.iter().flatten().flat_map(|module| module.parameters())
    }
}

/// Everything about a sharded adapter that needs no tensor.
#[derive(Debug)]
pub struct AdapterPlan {
    /// By decoder layer, as the regions.
    pub layers: Vec<LayerAdapterPlan>,
    /// Parameters that all ranks of a block share.
    pub dense: Vec<RegionLayout>,
    /// Parameters of the experts of one rank; without entries where there are none.
    pub experts: Vec<RegionLayout>,
}

impl AdapterPlan {
    /// Adapters of `shape` on `sites` of a model whose layers have `projections`, gathered in `dtype`, cut over `mesh`.
    pub fn new<'a>(
        projections: impl IntoIterator<Item = &'a [Projection]>,
        sites: &[Site],
        shape: LoraShape,
        dtype: DType,
        mesh: &Mesh,
    ) -> Self {
        let (mut layers, mut dense, mut experts) = (Vec::new(), Vec::new(), Vec::new());
        let align = align_bytes(dtype);
        for (i, projections) in projections.into_iter().enumerate() {
            let (layer, entries) = layer_of(projections, sites, shape, dtype, mesh.expert());
            let of = |region| -> Vec<EntrySpec> {
                entries.iter().filter(|entry| entry.0 == region).map(|entry| entry.1.clone()).collect()
            };
            let cut = |name: String, region| RegionLayout::new(name, of(region), region.shards(mesh), align);
            dense.push(cut(format!("adapter of layer {i}"), Region::Dense));
            experts.push(cut(format!("adapter of the experts of layer {i}"), Region::Experts));
            layers.push(layer);
        }
        Self { layers, dense, experts }
    }

    /// The logical parameters of each layer.
    pub fn parameters(&self) -> Vec<Vec<Parameter>> {
        self.layers.iter().map(|layer| layer.parameters().collect()).collect()
    }

    /// The layouts of one region, by layer.
    pub fn of(&self, region: Region) -> &[RegionLayout] {
        match region {
            Region::Dense => &self.dense,
            Region::Experts => &self.experts,
        }
    }
}

/// The modules of one layer and their entries.
fn layer_of(
    projections: &[Projection],
    sites: &[Site],
    shape: LoraShape,
    dtype: DType,
    expert_groups: usize,
) -> (LayerAdapterPlan, Vec<(Region, EntrySpec)>) {
    let mut entries: Vec<(Region, EntrySpec)> = Vec::new();
    let mut layer = LayerAdapterPlan::default();
    for projection in projections {
        let belongs = |site: &&Site| {
            site.parent == projection.parent
                && projection.leaves.iter().any(|leaf| leaf.0 == site.leaves[0].0)
        };
        let own: Vec<Site> = sites.iter().filter(belongs).cloned().collect();
        let constructor =
            own.first().and_then(|site| LORA_MAPPING.iter().find(|(kind, _)| *kind == site.kind));
        let count = |region| entries.iter().filter(|entry| entry.0 == region).count();
        let first = FirstEntries { dense: count(Region::Dense), experts: count(Region::Experts) };
        let stack = Stack { sites: own, rank: shape.rank, alpha: shape.alpha, expert_groups, first };
        let module = constructor.map(|(_, constructor)| constructor(stack));
        entries.extend(module.iter().flat_map(|module| module.entries(dtype)));
        layer.modules.push(module);
    }
    (layer, entries)
}
