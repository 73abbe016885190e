//! What an adapter is made of: the tensors it puts into its unit's adapter region, and its logical parameters.

use super::targets::{Site, SiteKind};
use crate::{
    dtype::DType,
    ops::linear::{Adapter, AdapterGradient, Part},
    shard::{AdapterShards, EntrySpec, ShardError},
};
use tch::Tensor;

/// Which factor of the product a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factor {
    A,
    B,
}

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
        self.0.entries(dtype, &[])
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.0.parameters(0, Site::path)
    }

    fn bind(
        &self,
        shards: &AdapterShards,
        unit: usize,
    ) -> Result<Vec<(Adapter, AdapterGradient)>, ShardError> {
        let tensors = self.0.tensors(shards, unit)?;
        Ok(vec![self.0.adapter(&tensors, self.scaling(), Tensor::shallow_clone)])
    }
}

/// Adapters on slices of the output of every expert of a layer, those of expert e apart from all others: A
/// `[experts, Σ rank, in]`, each B `[experts, out, rank]`.
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
        self.stack.entries(dtype, &[self.experts])
    }

    fn parameters(&self) -> Vec<Parameter> {
        let of = |expert| self.stack.parameters(expert, |site| site.expert_path(expert));
        (0..self.experts).flat_map(of).collect()
    }

    fn bind(
        &self,
        shards: &AdapterShards,
        unit: usize,
    ) -> Result<Vec<(Adapter, AdapterGradient)>, ShardError> {
        let tensors = self.stack.tensors(shards, unit)?;
        let of = |expert| self.stack.adapter(&tensors, self.scaling(), |all| all.select(0, expert));
        Ok((0..self.experts as i64).map(of).collect())
    }
}

/// The sites on one projection: A is the first entry, the B of site i the (1 + i)-th. There may be several layers of them,
/// numbered by a leading dimension.
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

    fn entries(&self, dtype: DType, leading: &[usize]) -> Vec<EntrySpec> {
        let Some(first) = self.sites.first() else { return Vec::new() };
        let entry = |name: String, shape: [usize; 2]| EntrySpec {
            name,
            shape: [leading, &shape].concat(),
            dtype,
            spans: Vec::new(),
        };
        let a = entry(format!("{}.lora_A", first.path()), [self.ranks(), first.input]);
        let b = self
            .sites
            .iter()
            .map(|site| entry(format!("{}.lora_B", site.path()), [site.output(), self.rank]));
        std::iter::once(a).chain(b).collect()
    }

    /// The parameters of layer `layer`, which calls a site `path`.
    fn parameters(&self, layer: usize, path: impl Fn(&Site) -> String) -> Vec<Parameter> {
        let parameters = |(i, site): (usize, &Site)| {
            let path = path(site);
            let a = Parameter {
                name: format!("{path}.lora_A"),
                factor: Factor::A,
                shape: [self.rank, site.input],
                entry: self.first_entry,
                first: (layer * self.sites.len() + i) * self.rank * site.input,
            };
            let b = Parameter {
                name: format!("{path}.lora_B"),
                factor: Factor::B,
                shape: [site.output(), self.rank],
                entry: self.first_entry + 1 + i,
                first: layer * site.output() * self.rank,
            };
            [a, b]
        };
        self.sites.iter().enumerate().flat_map(parameters).collect()
    }

    /// All entries of `unit`, gathered, and their gradients.
    fn tensors(&self, shards: &AdapterShards, unit: usize) -> Result<Vec<[Tensor; 2]>, ShardError> {
        let entries = self.first_entry..=self.first_entry + self.sites.len();
        let of = |entry| Ok([shards.view(unit, entry)?, shards.gradient_view(unit, entry)]);
        entries.map(of).collect()
    }

    /// The layer that `pick` takes from each of `tensors`.
    fn adapter(
        &self,
        tensors: &[[Tensor; 2]],
        scaling: f64,
        pick: impl Fn(&Tensor) -> Tensor,
    ) -> (Adapter, AdapterGradient) {
        let [a, d_a] = tensors[0].each_ref().map(&pick);
        let mut adapter = Adapter { a, parts: Vec::new(), scaling };
        let mut gradient = AdapterGradient { a: d_a, b: Vec::new() };
        for (i, (site, tensors)) in self.sites.iter().zip(&tensors[1..]).enumerate() {
            let [b, d_b] = tensors.each_ref().map(&pick);
            let (out, rank) = (site.first as i64, self.rank as i64);
            let ranks = i as i64 * rank..(i as i64 + 1) * rank;
            adapter.parts.push(Part { out: out..out + site.output() as i64, ranks, b });
            gradient.b.push(d_b);
        }
        (adapter, gradient)
    }
}
