//! What an adapter is made of: the tensors it puts into its unit's adapter region, and its logical parameters.

use super::targets::{Factor, Site, SiteKind};
use crate::{
    dtype::DType,
    ops::linear::{Adapter, AdapterGradient, Part},
    shard::{AdapterShards, EntrySpec, ShardError},
};
use tch::Tensor;

/// One logical parameter: the unit of naming, initialisation and export, however it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// `model.layers.3.self_attn.q_proj.lora_A`
    pub name: String,
    pub factor: Factor,
    /// A `[rank, in]`, B `[out, rank]`.
    pub shape: [usize; 2],
    /// Where it is stored: the entry of the unit's region, and its first element there.
    pub entry: usize,
    pub first: usize,
}

/// A low-rank adapter of one module of the base: a linear layer, or several that share rows, as experts do.
pub trait LoraModule: std::fmt::Debug {
    /// The adapter of the sites that share one base module, whose entries start at `first_entry` of the unit's
    /// region.
    fn from_sites(sites: Vec<Site>, rank: usize, alpha: f64, first_entry: usize) -> Self
    where
        Self: Sized;
    fn rank(&self) -> usize;
    fn alpha(&self) -> f64;
    /// What B·A is multiplied with.
    fn scaling(&self) -> f64 {
        self.alpha() / self.rank() as f64
    }
    /// Σ rank of the adapters that a row goes through.
    fn ranks(&self) -> usize;
    /// What it puts into its unit's region, to be gathered in `dtype`.
    fn entries(&self, dtype: DType) -> Vec<EntrySpec>;
    /// Its logical parameters.
    fn parameters(&self) -> Vec<Parameter>;
    /// The gathered adapters of `unit` as the operation takes them, and where their gradients go: one for each linear
    /// layer of the module.
    fn bind(
        &self,
        shards: &AdapterShards,
        unit: usize,
    ) -> Result<Vec<(Adapter, AdapterGradient)>, ShardError>;
}

/// Makes the adapter of one base module.
type Constructor = fn(Vec<Site>, usize, f64, usize) -> Box<dyn LoraModule>;

/// Which module class adapts which kind of site.
pub const LORA_MAPPING: &[(SiteKind, Constructor)] =
    &[(SiteKind::Linear, boxed::<LoraLinear>), (SiteKind::Experts, boxed::<MoeExpertsLora>)];

fn boxed<M: LoraModule + 'static>(
    sites: Vec<Site>,
    rank: usize,
    alpha: f64,
    first_entry: usize,
) -> Box<dyn LoraModule> {
    Box::new(M::from_sites(sites, rank, alpha, first_entry))
}

/// Adapters on slices of one projection's output. Their A's are one tensor `[Σ rank, in]`, so that one thin GEMM
/// serves them all; each has its own B.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraLinear(Stack);

impl LoraModule for LoraLinear {
    fn from_sites(sites: Vec<Site>, rank: usize, alpha: f64, first_entry: usize) -> Self {
        Self(Stack { sites, rank, alpha, first_entry })
    }

    fn rank(&self) -> usize {
        self.0.rank
    }

    fn alpha(&self) -> f64 {
        self.0.alpha
    }

    fn ranks(&self) -> usize {
        self.0.ranks()
    }

    fn entries(&self, dtype: DType) -> Vec<EntrySpec> {
        self.0.entries(dtype)
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.0.parameters()
    }

    fn bind(
        &self,
        shards: &AdapterShards,
        unit: usize,
    ) -> Result<Vec<(Adapter, AdapterGradient)>, ShardError> {
        let tensors = self.0.tensors(shards, unit)?;
        Ok(vec![self.0.adapter(&tensors, self.scaling(), None)])
    }
}

/// Adapters on slices of the output of every expert of a layer: A `[experts, Σ rank, in]`, each B `[experts, out, rank]`,
/// those of expert e apart from all others; without the leading dimension where a factor is shared.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeExpertsLora {
    stack: Stack,
    experts: usize,
}

impl LoraModule for MoeExpertsLora {
    fn from_sites(sites: Vec<Site>, rank: usize, alpha: f64, first_entry: usize) -> Self {
        let experts = sites.first().and_then(|site| site.experts).map_or(0, |experts| experts.count);
        Self { stack: Stack { sites, rank, alpha, first_entry }, experts }
    }

    fn rank(&self) -> usize {
        self.stack.rank
    }

    fn alpha(&self) -> f64 {
        self.stack.alpha
    }

    fn ranks(&self) -> usize {
        self.stack.ranks()
    }

    fn entries(&self, dtype: DType) -> Vec<EntrySpec> {
        self.stack.entries(dtype)
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.stack.parameters()
    }

    fn bind(
        &self,
        shards: &AdapterShards,
        unit: usize,
    ) -> Result<Vec<(Adapter, AdapterGradient)>, ShardError> {
        let tensors = self.stack.tensors(shards, unit)?;
        let of = |expert| self.stack.adapter(&tensors, self.scaling(), Some(expert));
        Ok((0..self.experts as i64).map(of).collect())
    }
}

/// The sites on one projection: A is the first entry, the B of site i the (1 + i)-th. All share the same factor, or none
/// does; of what experts do not share each has a copy, numbered by a leading dimension.
#[derive(Clone, Debug, PartialEq)]
struct Stack {
    sites: Vec<Site>,
    rank: usize,
    alpha: f64,
    first_entry: usize,
}

impl Stack {
    fn ranks(&self) -> usize {
        self.rank * self.sites.len()
    }

    /// Whether `factor` has a leading dimension.
    fn is_copied(&self, factor: Factor) -> bool {
        self.sites.first().is_some_and(|site| site.experts.is_some() && site.shared != Some(factor))
    }

    fn entries(&self, dtype: DType) -> Vec<EntrySpec> {
        let Some(first) = self.sites.first() else { return Vec::new() };
        let entry = |name: String, factor, shape: [usize; 2]| {
            let leading = self.is_copied(factor).then(|| first.copies(factor));
            let shape = leading.into_iter().chain(shape).collect();
            EntrySpec { name, shape, dtype, spans: Vec::new() }
        };
        let a = entry(format!("{}.lora_A", first.path()), Factor::A, [self.ranks(), first.input]);
        let b = |site: &Site| entry(format!("{}.lora_B", site.path()), Factor::B, [site.output(), self.rank]);
        std::iter::once(a).chain(self.sites.iter().map(b)).collect()
    }

    /// Every copy of A and B, site by site.
    fn parameters(&self) -> Vec<Parameter> {
        let (rank, first_entry) = (self.rank, self.first_entry);
        let mut parameters = Vec::new();
        for (i, site) in self.sites.iter().enumerate() {
            for copy in 0..site.copies(Factor::A) {
                parameters.push(Parameter {
                    name: format!("{}.lora_A", site.path_of(Factor::A, copy)),
                    factor: Factor::A,
                    shape: [rank, site.input],
                    entry: first_entry,
                    first: (copy * self.sites.len() + i) * rank * site.input,
                });
            }
            for copy in 0..site.copies(Factor::B) {
                parameters.push(Parameter {
                    name: format!("{}.lora_B", site.path_of(Factor::B, copy)),
                    factor: Factor::B,
                    shape: [site.output(), rank],
                    entry: first_entry + 1 + i,
                    first: copy * site.output() * rank,
                });
            }
        }
        parameters
    }

    /// All entries of `unit`, gathered, and their gradients.
    fn tensors(&self, shards: &AdapterShards, unit: usize) -> Result<Vec<[Tensor; 2]>, ShardError> {
        let entries = self.first_entry..=self.first_entry + self.sites.len();
        let of = |entry| Ok([shards.view(unit, entry)?, shards.gradient_view(unit, entry)]);
        entries.map(of).collect()
    }

    /// The adapter of one linear layer: of `copy`, where there are several.
    fn adapter(
        &self,
        tensors: &[[Tensor; 2]],
        scaling: f64,
        copy: Option<i64>,
    ) -> (Adapter, AdapterGradient) {
        let pick = |factor, tensors: &[Tensor; 2]| match copy {
            Some(copy) if self.is_copied(factor) => tensors.each_ref().map(|all| all.select(0, copy)),
            _ => tensors.each_ref().map(Tensor::shallow_clone),
        };
        let [a, d_a] = pick(Factor::A, &tensors[0]);
        let mut adapter = Adapter { a, parts: Vec::new(), scaling };
        let mut gradient = AdapterGradient { a: d_a, b: Vec::new() };
        for (i, (site, tensors)) in self.sites.iter().zip(&tensors[1..]).enumerate() {
            let [b, d_b] = pick(Factor::B, tensors);
            let (out, rank) = (site.first as i64, self.rank as i64);
            let ranks = i as i64 * rank..(i as i64 + 1) * rank;
            adapter.parts.push(Part { out: out..out + site.output() as i64, ranks, b });
            gradient.b.push(d_b);
        }
        (adapter, gradient)
    }
}
