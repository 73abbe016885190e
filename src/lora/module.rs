//! Modules of an adapter: their entries in the regions of a unit, and their logical parameters.

use super::{
    shape::LoraShape,
    targets::{Factor, Site, SiteKind},
};
use crate::{
    dtype::DType,
    ops::linear::{AdapterGradient, BoundAdapter, Magnitudes, Matrices, Part},
    shard::{AdapterRegions, EntrySpec, Region, ShardError, Storage},
};

/// One logical parameter: what is named, initialised and exported as one, however it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// `model.layers.3.self_attn.q_proj.lora_A`
    pub name: String,
    pub factor: Factor,
    /// A `[rank, in]`, B `[out, rank]`.
    pub shape: [usize; 2],
    /// Its region in the unit, its group of experts (0 in dense regions), its entry there and its first element in
    /// that.
    pub region: Region,
    pub group: usize,
    pub entry: usize,
    pub first: usize,
}

/// First entry of a module in each region of its unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FirstEntries {
    pub dense: usize,
    pub experts: usize,
}

impl FirstEntries {
    fn of(self, region: Region) -> usize {
        match region {
            Region::Dense => self.dense,
            Region::Experts => self.experts,
        }
    }
}

/// A low-rank adapter of one module of the base: a linear layer, or several that share rows, as experts do.
pub trait LoraModule: std::fmt::Debug {
    /// The adapter of the sites that share one base module.
    fn from_sites(stack: Stack) -> Self
    where
        Self: Sized;
    /// The sites, and what they put where.
    fn stack(&self) -> &Stack;

    /// Σ rank of the adapters that a row goes through.
    fn ranks(&self) -> usize {
        self.stack().ranks()
    }
    /// Its entries in the unit's regions, gathered in `dtype`.
    fn entries(&self, dtype: DType) -> Vec<(Region, EntrySpec)> {
        self.stack().entries(dtype)
    }
    /// Its logical parameters, of all groups of experts.
    fn parameters(&self) -> Vec<Parameter> {
        self.stack().parameters()
    }
    /// Views of `unit`'s gathered adapters, for all experts of this rank, and of the sums of their gradients. `cast`:
    /// A and B are copied into this dtype.
    fn bind(
        &self,
        adapters: &AdapterRegions,
        unit: usize,
        cast: Option<DType>,
    ) -> Result<BoundAdapter, ShardError> {
        self.stack().bind(adapters, unit, cast)
    }
}

/// Makes the adapter of one base module; see [`LoraModule::from_sites`].
type Constructor = fn(Stack) -> Box<dyn LoraModule>;

/// The module class of each kind of site.
pub const LORA_MAPPING: &[(SiteKind, Constructor)] =
    &[(SiteKind::Linear, boxed::<LoraLinear>), (SiteKind::Experts, boxed::<MoeExpertsLora>)];

fn boxed<M: LoraModule + 'static>(stack: Stack) -> Box<dyn LoraModule> {
    Box::new(M::from_sites(stack))
}

/// Adapters on slices of one projection's output. Their A's are one tensor `[Σ rank, in]`, so that one GEMM
/// of Σ rank columns serves them all; each has its own B.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraLinear(Stack);

impl LoraModule for LoraLinear {
    fn from_sites(stack: Stack) -> Self {
        Self(stack)
    }

    fn stack(&self) -> &Stack {
        &self.0
    }
}

/// Adapters on slices of the output of every expert of a layer: A `[experts, Σ rank, in]`, each B `[experts, out,
/// rank]`, one for each expert; without the leading dimension where experts share a factor. A rank stores the experts
/// of its own group.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeExpertsLora(Stack);

impl LoraModule for MoeExpertsLora {
    fn from_sites(stack: Stack) -> Self {
        Self(stack)
    }

    fn stack(&self) -> &Stack {
        &self.0
    }
}

/// The sites on one projection: A is the first entry, the B of site i the (1 + i)-th. All sites share the same factor
/// over the experts, or none does; a factor that is not shared has a leading dimension, one copy for each expert.
#[derive(Clone, Debug, PartialEq)]
pub struct Stack {
    pub sites: Vec<Site>,
    /// Rank and scale by site.
    pub shapes: Vec<LoraShape>,
    /// Groups into which the experts are divided; a rank has one of them.
    pub expert_groups: usize,
    /// Its first entries.
    pub first: FirstEntries,
}

impl Stack {
    /// Σ rank of the sites.
    fn ranks(&self) -> usize {
        self.shapes.iter().map(|shape| shape.rank).sum()
    }

    /// Each site with its shape and its rows of A.
    fn with_ranks(&self) -> impl Iterator<Item = (&Site, LoraShape, std::ops::Range<usize>)> {
        let mut end = 0;
        self.sites.iter().zip(&self.shapes).map(move |(site, &shape)| {
            end += shape.rank;
            (site, shape, end - shape.rank..end)
        })
    }

    /// True if `factor` has a leading dimension, one copy for each expert.
    fn is_copied(&self, factor: Factor) -> bool {
        self.sites.first().is_some_and(|site| site.experts.is_some() && site.shared != Some(factor))
    }

    /// The region of `factor`: copies of single experts go to the ranks that have the expert.
    fn region(&self, factor: Factor) -> Region {
        if self.is_copied(factor) { Region::Experts } else { Region::Dense }
    }

    /// The entry of A.
    fn entry_of_a(&self) -> (Region, usize) {
        let region = self.region(Factor::A);
        (region, self.first.of(region))
    }

    /// The entry of the B of site `site`.
    fn entry_of_b(&self, site: usize) -> (Region, usize) {
        let region = self.region(Factor::B);
        let behind_a = usize::from(region == self.region(Factor::A));
        (region, self.first.of(region) + behind_a + site)
    }

    /// The entry of the magnitudes of site `site`, if it has them. Then all factors are in one region.
    fn entry_of_magnitude(&self, site: usize) -> Option<(Region, usize)> {
        let before = self.shapes[..site].iter().filter(|shape| shape.use_dora).count();
        let (region, first) = self.entry_of_a();
        self.shapes[site].use_dora.then_some((region, first + 1 + self.sites.len() + before))
    }

    fn entries(&self, dtype: DType) -> Vec<(Region, EntrySpec)> {
        let Some(first) = self.sites.first() else { return Vec::new() };
        let entry = |name: String, factor, shape: [usize; 2]| {
            let leading = self.is_copied(factor).then(|| first.copies(factor) / self.expert_groups);
            let shape = leading.into_iter().chain(shape).collect();
            (
                self.region(factor),
                EntrySpec { name, shape, storage: Storage::Plain(dtype), spans: Vec::new() },
            )
        };
        let a = entry(format!("{}.lora_A", first.path()), Factor::A, [self.ranks(), first.input]);
        let magnitudes =
            self.sites.iter().zip(&self.shapes).filter(|(_, shape)| shape.use_dora).map(|(site, _)| {
                let factor = Factor::Magnitude;
                entry(format!("{}.{}", site.path(), factor.suffix()), factor, [site.output(), 1])
            });
        let b = |(site, shape): (&Site, &LoraShape)| {
            entry(format!("{}.lora_B", site.path()), Factor::B, [site.output(), shape.rank])
        };
        std::iter::once(a).chain(self.sites.iter().zip(&self.shapes).map(b)).chain(magnitudes).collect()
    }

    /// Every copy of A and B, site by site.
    fn parameters(&self) -> Vec<Parameter> {
        let mut parameters = Vec::new();
        for (i, (site, LoraShape { rank, .. }, rows)) in self.with_ranks().enumerate() {
            // A copy of the entry has `size` elements, and the parameter begins `at` elements behind its start.
            let mut copies = |factor, shape: [usize; 2], (region, entry), size: usize, at: usize| {
                let count = site.copies(factor);
                // Of a factor that is shared, or of a dense layer, there is one.
                let each = count.div_ceil(self.expert_groups);
                let suffix = factor.suffix();
                parameters.extend((0..count).map(|copy| Parameter {
                    name: format!("{}.{suffix}", site.path_of(factor, copy)),
                    factor,
                    shape,
                    region,
                    group: copy / each,
                    entry,
                    first: copy % each * size + at,
                }));
            };
            let (of_a, of_b) = (self.ranks() * site.input, site.output() * rank);
            copies(Factor::A, [rank, site.input], self.entry_of_a(), of_a, rows.start * site.input);
            copies(Factor::B, [site.output(), rank], self.entry_of_b(i), of_b, 0);
            if let Some(entry) = self.entry_of_magnitude(i) {
                copies(Factor::Magnitude, [site.output(), 1], entry, site.output(), 0);
            }
        }
        parameters
    }

    fn bind(
        &self,
        adapters: &AdapterRegions,
        unit: usize,
        cast: Option<DType>,
    ) -> Result<BoundAdapter, ShardError> {
        let of = |factor, (region, entry)| {
            let shards = adapters.of(region);
            let view = shards.view(unit, entry)?;
            let values = match cast {
                Some(dtype) => view.f_to_kind(dtype.kind())?,
                None => view,
            };
            let both = [values, shards.gradient_view(unit, entry)];
            let matrices = if self.is_copied(factor) { Matrices::Each } else { Matrices::Shared };
            Ok::<_, ShardError>(both.map(matrices))
        };
        let [a, d_a] = of(Factor::A, self.entry_of_a())?;
        let gradient = AdapterGradient { a: d_a, b: Vec::new() };
        let mut adapter = BoundAdapter { a, parts: Vec::new(), dropout: None, magnitudes: None, gradient };
        for (i, (site, shape, ranks)) in self.with_ranks().enumerate() {
            let [b, d_b] = of(Factor::B, self.entry_of_b(i))?;
            let (out, scaling) = (site.first as i64, shape.scaling());
            let ranks = ranks.start as i64..ranks.end as i64;
            adapter.parts.push(Part { out: out..out + site.output() as i64, ranks, scaling, b });
            adapter.gradient.b.push(d_b);
        }
        // All sites have magnitudes, or none.
        let entries = (0..self.sites.len()).map(|i| self.entry_of_magnitude(i)).collect::<Option<Vec<_>>>();
        if let Some(entries) = entries.filter(|entries| !entries.is_empty()) {
            let both = entries.into_iter().map(|(region, entry)| {
                let shards = adapters.of(region);
                Ok((
                    shards.view(unit, entry)?.squeeze_dim(1),
                    shards.gradient_view(unit, entry).squeeze_dim(1),
                ))
            });
            let (parts, gradients) = both.collect::<Result<Vec<_>, ShardError>>()?.into_iter().unzip();
            adapter.magnitudes = Some(Magnitudes::new(parts, gradients));
        }
        Ok(adapter)
    }
}
