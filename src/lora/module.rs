//! What an adapter is made of: the tensors it puts into its unit's adapter region, and its logical parameters.

use super::targets::{Site, SiteKind};
use crate::{
    dtype::DType,
    ops::linear::{Adapter, AdapterGradient, Part},
    shard::{AdapterShards, EntrySpec, ShardError},
};

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

/// A low-rank adapter of one module of the base.
pub trait LoraModule {
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
    /// What it puts into its unit's region, to be gathered in `dtype`.
    fn entries(&self, dtype: DType) -> Vec<EntrySpec>;
    /// Its logical parameters.
    fn parameters(&self) -> Vec<Parameter>;
}

/// Makes the adapter of one base module.
type Constructor = fn(Vec<Site>, usize, f64, usize) -> LoraLinear;

/// Which module class adapts which kind of site.
pub const LORA_MAPPING: &[(SiteKind, Constructor)] = &[(SiteKind::Linear, LoraLinear::from_sites)];

/// Adapters on slices of one projection's output. Their A's are one tensor `[Σ rank, in]`, so that one thin GEMM
/// serves them all; each has its own B.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraLinear {
    pub sites: Vec<Site>,
    rank: usize,
    alpha: f64,
    first_entry: usize,
}

impl LoraModule for LoraLinear {
    fn from_sites(sites: Vec<Site>, rank: usize, alpha: f64, first_entry: usize) -> Self {
        Self { sites, rank, alpha, first_entry }
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn alpha(&self) -> f64 {
        self.alpha
    }

    fn entries(&self, dtype: DType) -> Vec<EntrySpec> {
        let Some(first) = self.sites.first() else { return Vec::new() };
        let entry = |name: String, shape: [usize; 2]| EntrySpec {
            name,
            shape: shape.to_vec(),
            dtype,
            spans: Vec::new(),
        };
        let a = entry(format!("{}.lora_A", first.path()), [self.rank * self.sites.len(), first.input]);
        let b = self
            .sites
            .iter()
            .map(|site| entry(format!("{}.lora_B", site.path()), [site.output(), self.rank]));
        std::iter::once(a).chain(b).collect()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let parameters = |(i, site): (usize, &Site)| {
            let a = Parameter {
                name: format!("{}.lora_A", site.path()),
                factor: Factor::A,
                shape: [self.rank, site.input],
                entry: self.first_entry,
                first: i * self.rank * site.input,
            };
            let b = Parameter {
                name: format!("{}.lora_B", site.path()),
                factor: Factor::B,
                shape: [site.output(), self.rank],
                entry: self.first_entry + 1 + i,
                first: 0,
            };
            [a, b]
        };
        self.sites.iter().enumerate().flat_map(parameters).collect()
    }
}

impl LoraLinear {
    /// The gathered adapter of `unit` as the operation takes it.
    pub fn bind(&self, shards: &AdapterShards, unit: usize) -> Result<Adapter, ShardError> {
        let a = shards.view(unit, self.first_entry)?;
        let part = |(i, site): (usize, &Site)| {
            let (out, rank) = (site.first as i64, self.rank as i64);
            let b = shards.view(unit, self.first_entry + 1 + i)?;
            let ranks = i as i64 * rank..(i as i64 + 1) * rank;
            Ok::<_, ShardError>(Part { out: out..out + site.output() as i64, ranks, b })
        };
        let parts = self.sites.iter().enumerate().map(part).collect::<Result<_, _>>()?;
        Ok(Adapter { a, parts, scaling: self.scaling() })
    }

    /// Where backward adds this adapter's gradients.
    pub fn gradient(&self, shards: &AdapterShards, unit: usize) -> AdapterGradient {
        let b = (0..self.sites.len()).map(|i| shards.gradient_view(unit, self.first_entry + 1 + i));
        AdapterGradient { a: shards.gradient_view(unit, self.first_entry), b: b.collect() }
    }
}
