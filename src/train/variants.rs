//! Variants of LoRA in a run: those that its model cannot have, and the start of PiSSA, with which the base loses what
//! the adapter starts with (see [`crate::lora::pissa`]).

use super::Run;
use crate::{
    checkpoint::peft::AdapterFolder,
    comm::Communicator,
    config::{InitLoraWeights, LoraArgs},
    dtype::DType,
    error::{Error, Result, agree},
    lora::{
        LoraShapes, MergeInto, MergePlan, Site, Survival,
        pissa::{self, Values},
    },
    model::transformer::Transformer,
};
use std::path::Path;
use tch::Tensor;

/// The first field of `lora` that adapters of `shapes` on `sites` cannot have, with the reason. `is_quantised`: of the
/// base.
pub(super) fn refusal(
    lora: &LoraArgs,
    sites: &[Site],
    shapes: &LoraShapes,
    is_quantised: bool,
) -> Option<(&'static str, String)> {
    let asked = [
        ("lora.lora_dropout", lora.lora_dropout > 0.0, "dropout"),
        ("lora.use_dora", lora.use_dora, "magnitudes"),
        ("lora.init_lora_weights", lora.init_lora_weights == InitLoraWeights::Pissa, "start with pissa"),
    ];
    let mut asked = asked.into_iter().filter(|(_, is_asked, _)| *is_asked);
    if sites.iter().any(|site| site.experts.is_some())
        && let Some((field, _, what)) = asked.next()
    {
        let why = format!(
            "routed experts are adapted, whose adapters have no {what} in PEFT, and none here with any \
             lora_export_format, per_expert neither; leave the field out, or the experts out of lora_target_modules"
        );
        return Some((field, why));
    }
    if is_quantised && lora.use_dora {
        let why = "norms of a quantised base's rows are not built; remove it, or train on a base that is not quantised";
        return Some(("lora.use_dora", why.into()));
    }
    if lora.init_lora_weights == InitLoraWeights::Default {
        return None;
    }
    if is_quantised {
        let why =
            "a quantised base would lose another part to rounding than the adapter starts with; use default";
        return Some(("lora.init_lora_weights", why.into()));
    }
    let least = |site: &Site| site.input.min(site.output());
    let site = sites.iter().find(|site| shapes.of(site).rank > least(site))?;
    let (rank, path) = (shapes.of(site).rank, site.path());
    let why = format!(
        "{path} has {} singular vectors, fewer than its rank {rank}; lower lora.lora_rank",
        least(site)
    );
    Some(("lora.init_lora_weights", why))
}

impl Run {
    /// A₀ and B₀ of every site, from the base's files, on every rank. The ranks share the matrices. Collective.
    pub(super) fn singular_vectors(&self, world: &dyn Communicator) -> Result<Values> {
        let of_rank = |rank: usize| self.sites.iter().skip(rank).step_by(world.size().max(1));
        let own = of_rank(world.rank()).map(|site| self.factors_of(site)).collect::<Result<Vec<_>>>();
        let own: Vec<f32> = agree(world, own)?.into_iter().flatten().flatten().collect();
        let all = world.all_gather_host(bytemuck::cast_slice(&own))?;
        let mut values = Values::new();
        for (rank, bytes) in all.iter().enumerate() {
            let mut rest: Vec<f32> =
                bytes.chunks_exact(size_of::<f32>()).map(bytemuck::pod_read_unaligned).collect();
            for site in of_rank(rank) {
                let shape = self.shapes.of(site);
                for (name, width) in pissa::names(site).into_iter().zip([site.input, site.output()]) {
                    let behind = rest.split_off((shape.rank * width).min(rest.len()));
                    values.insert(name, std::mem::replace(&mut rest, behind));
                }
            }
        }
        Ok(values)
    }

    fn factors_of(&self, site: &Site) -> Result<[Vec<f32>; 2]> {
        let failed = |reason: String| Error::Failure(format!("PiSSA of {}: {reason}", site.path()));
        let mut w: Vec<f32> = Vec::with_capacity(site.output() * site.input);
        for (name, rows) in pissa::tensors(site) {
            let mut values = vec![0f32; rows * site.input];
            let (range, bytes) = (0..values.len(), bytemuck::cast_slice_mut(&mut values));
            self.source.read(&name, range, DType::F32, bytes).map_err(|error| failed(error.to_string()))?;
            w.append(&mut values);
        }
        let w = Tensor::from_slice(&w).view([-1, site.input as i64]);
        pissa::factors(&w, self.shapes.of(site)).map_err(|error| failed(error.to_string()))
    }

    /// A₀ and B₀ of the adapter that the step at `path` published.
    pub(super) fn singular_vectors_of_step(&self, path: &Path) -> Result<Values> {
        let shapes = pissa::of_twice_the_rank(&self.shapes);
        let values = AdapterFolder::open(path)?.values(&self.sites, &shapes)?;
        Ok(pissa::subtracted(values, &self.sites, &self.shapes))
    }

    /// Takes s·B₀·A₀ from the base, rounded once, on the ranks that own it. Collective.
    pub(super) fn subtract(&self, model: &mut Transformer, first: &Values) -> Result<()> {
        let (plan, values) = (MergePlan::new(&self.sites, &self.shapes), pissa::negated(first));
        let mut change = MergeInto { plan: &plan, values: &values, kept: Survival::default() };
        for unit in 0..model.spec().layers.len() {
            model.update_layer(unit, &mut change)?;
        }
        Ok(())
    }
}
