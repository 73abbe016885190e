//! Plan of an adapter before any tensor exists: its modules by layer and its regions, cut over ranks. Pure.

use super::{
    module::{FirstEntries, LORA_MAPPING, LoraModule, Parameter, Stack},
    shape::{LoraShape, LoraShapes},
    targets::{Projection, Site},
};
use crate::{
    dtype::DType,
    mesh::Mesh,
    shard::{EntrySpec, FlatRegion, PlacedParameter, Region, RegionLayout, adapter::align_bytes},
};

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
    /// Dtype of computation.
    compute: DType,
    /// Dtype of the compute copies, in which layers are gathered: fp32 where there are magnitudes, which change by less
    /// than bf16 can show.
    copies: DType,
    /// By decoder layer, as the regions.
    pub layers: Vec<LayerAdapterPlan>,
    /// Parameters that all ranks of a block share.
    pub dense: Vec<RegionLayout>,
    /// Parameters of the experts of one rank; without entries where there are none.
    pub experts: Vec<RegionLayout>,
    /// The flat spaces of `dense` with the parameters in them.
    flat_dense: Vec<FlatRegion>,
    /// The flat spaces of the experts of all ranks, which `experts` are a part of.
    flat_experts: Vec<FlatRegion>,
}

impl AdapterPlan {
    /// Adapters of `shapes` on `sites` of a model whose layers have `projections`, computed in `compute`, cut over
    /// `mesh`.
    pub fn new<'a>(
        projections: impl IntoIterator<Item = &'a [Projection]>,
        sites: &[Site],
        shapes: &LoraShapes,
        compute: DType,
        mesh: &Mesh,
    ) -> Self {
        let (mut layers, mut dense, mut experts) = (Vec::new(), Vec::new(), Vec::new());
        let copies = if shapes.use_dora() { DType::F32 } else { compute };
        let align = align_bytes(copies);
        for (i, projections) in projections.into_iter().enumerate() {
            let (layer, entries) = layer_of(projections, sites, shapes, copies, mesh.expert());
            let of = |region| -> Vec<EntrySpec> {
                entries.iter().filter(|entry| entry.0 == region).map(|entry| entry.1.clone()).collect()
            };
            let cut = |name: String, region| RegionLayout::new(name, of(region), region.shards(mesh), align);
            dense.push(cut(format!("adapter of layer {i}"), Region::Dense));
            experts.push(cut(format!("adapter of the experts of layer {i}"), Region::Experts));
            layers.push(layer);
        }
        let flat = |region, suffix: &str, layouts: &[RegionLayout], expert_groups| -> Vec<FlatRegion> {
            let layers = layers.iter().zip(layouts).enumerate();
            let named = layers.map(|(i, (layer, layout))| (format!("layers.{i}{suffix}"), layer, layout));
            named
                .map(|(name, layer, layout)| flat_region(name, layer, layout, region, expert_groups))
                .collect()
        };
        let flat_dense = flat(Region::Dense, "", &dense, 1);
        let flat_experts = flat(Region::Experts, ".experts", &experts, mesh.expert());
        Self { compute, copies, layers, dense, experts, flat_dense, flat_experts }
    }

    /// Dtype of the compute copies.
    pub fn copies(&self) -> DType {
        self.copies
    }

    /// Dtype of computation, where the copies of A and B have another.
    pub fn cast(&self) -> Option<DType> {
        (self.copies != self.compute).then_some(self.compute)
    }

    /// The sites with an adapter, layer by layer, each with its shape.
    pub fn sites(&self) -> Vec<(&Site, LoraShape)> {
        let modules = self.layers.iter().flat_map(|layer| layer.modules.iter().flatten());
        let stacks = modules.map(|module| module.stack());
        stacks.flat_map(|stack| stack.sites.iter().zip(stack.shapes.iter().copied())).collect()
    }

    /// The logical parameters of each layer.
    pub fn parameters(&self) -> Vec<Vec<Parameter>> {
        self.layers.iter().map(|layer| layer.parameters().collect()).collect()
    }

    /// The flat spaces of all regions with their parameters: the dense one of every layer, then the experts' of every
    /// layer. The same on every rank.
    pub fn flat(&self) -> impl Iterator<Item = &FlatRegion> {
        self.flat_dense.iter().chain(&self.flat_experts)
    }

    /// The flat spaces of one region, by layer.
    pub fn flat_of(&self, region: Region) -> &[FlatRegion] {
        match region {
            Region::Dense => &self.flat_dense,
            Region::Experts => &self.flat_experts,
        }
    }

    /// The layouts of one region, by layer.
    pub fn of(&self, region: Region) -> &[RegionLayout] {
        match region {
            Region::Dense => &self.dense,
            Region::Experts => &self.experts,
        }
    }
}

/// The flat space of a layer's `region`, which `layout` is one expert group's part of, and its parameters.
fn flat_region(
    name: String,
    layer: &LayerAdapterPlan,
    layout: &RegionLayout,
    region: Region,
    expert_groups: usize,
) -> FlatRegion {
    let size = layout.entries.first().map_or(1, |entry| entry.spec.storage.bytes(1));
    let placed = layer.parameters().filter(|parameter| parameter.region == region).map(|parameter| {
        let in_group = layout.entries[parameter.entry].offset / size + parameter.first;
        let first = parameter.group * (layout.padded / size) + in_group;
        PlacedParameter { name: parameter.name, shape: parameter.shape, first }
    });
    let parameters = placed.collect();
    FlatRegion { name, piece: layout.piece_bytes() / size, expert_groups, parameters }
}

/// The modules of one layer and their entries.
fn layer_of(
    projections: &[Projection],
    sites: &[Site],
    shapes: &LoraShapes,
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
        let own_shapes = own.iter().map(|site| shapes.of(site)).collect();
        let constructor =
            own.first().and_then(|site| LORA_MAPPING.iter().find(|(kind, _)| *kind == site.kind));
        let count = |region| entries.iter().filter(|entry| entry.0 == region).count();
        let first = FirstEntries { dense: count(Region::Dense), experts: count(Region::Experts) };
        let stack = Stack { sites: own, shapes: own_shapes, expert_groups, first };
        let module = constructor.map(|(_, constructor)| constructor(stack));
        entries.extend(module.iter().flat_map(|module| module.entries(dtype)));
        layer.modules.push(module);
    }
    (layer, entries)
}
