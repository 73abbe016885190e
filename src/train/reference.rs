//! The model that a loss over pairs compares with: the base, with the adapter of `lora.adapter_path` where the run
//! started from one.

use super::{Run, loss::batch};
use crate::{
    checkpoint::{peft::AdapterFolder, steps},
    config::{InitLoraWeights, LoraArgs},
    data::Row,
    error::{Error, Result},
    lora::Adapter,
    loss::CrossEntropy,
    model::transformer::Transformer,
    plan::Reference,
    shard::ShardError,
};
use sha2::{Digest, Sha256};
use std::{collections::HashMap, path::Path};
use tch::Tensor;

/// The adapter of the reference, as every rank has read it.
pub(super) struct ReferenceAdapter {
    /// A and B by logical parameter name.
    values: HashMap<String, Vec<f32>>,
    /// SHA-256 of names and values, by which a resume knows it.
    pub digest: String,
}

impl ReferenceAdapter {
    fn new(values: HashMap<String, Vec<f32>>) -> Self {
        let (mut hash, mut names) = (Sha256::new(), values.keys().collect::<Vec<_>>());
        names.sort();
        for name in names {
            hash.update(name);
            hash.update(bytemuck::cast_slice(&values[name]));
        }
        Self { digest: format!("{:x}", hash.finalize()), values }
    }
}

/// The reference on this rank.
pub(super) struct ReferenceModel {
    /// `None`: the base alone.
    adapter: Option<Adapter>,
}

impl ReferenceModel {
    /// The reference of `run`, if its loss compares with one.
    pub fn new(run: &Run, model: &Transformer, adapter: &Adapter) -> Result<Option<Self>> {
        if !run.loss.reads_reference() {
            return Ok(None);
        }
        let Some(ReferenceAdapter { values, .. }) = &run.reference else {
            return Ok(Some(Self { adapter: None }));
        };
        let mut frozen = model.frozen_adapter(adapter.plan().clone());
        frozen.set(|parameter, range| values[&parameter.name][range].to_vec())?;
        Ok(Some(Self { adapter: Some(frozen) }))
    }

    /// Log-probabilities `[tokens, 1]` of the targets of `rows`; `pad` fills packs. Collective.
    pub fn log_probs(
        &mut self,
        model: &mut Transformer,
        rows: &[Row],
        pad: i64,
    ) -> Result<Tensor, ShardError> {
        let batch = batch(rows, pad, model.device().tensors());
        let loss = CrossEntropy { scale: 1.0 };
        let done = match &mut self.adapter {
            Some(adapter) => model.evaluate(&batch, &mut [adapter], &loss),
            None => {
                let tokens = batch.tokens();
                model.evaluate(&batch.with_adapters(&[(tokens, None)], 0), &mut [], &loss)
            }
        };
        Ok(done?.log_probs)
    }

    /// Invalidates the slots of its adapter: see [`Transformer::forget_gathered`].
    pub fn forget_gathered(&mut self) -> Result<(), ShardError> {
        self.adapter.as_mut().map_or(Ok(()), |adapter| adapter.regions_mut().invalidate())
    }
}

/// The first field of `config` that a loss which compares with a reference cannot have, with the reason.
pub(super) fn refusal(lora: &LoraArgs) -> Option<(&'static str, &'static str)> {
    const MERGES: &str = "a merge changes the base, which train.loss_fn compares with; leave merges out, or train with \
                          cross_entropy";
    if lora.merge_lora_interval > 0 {
        return Some(("lora.merge_lora_interval", MERGES));
    }
    if lora.merge_at_end {
        return Some(("lora.merge_at_end", MERGES));
    }
    let pissa =
        "pissa takes the start of the adapter from the base, which train.loss_fn compares with; use default";
    (lora.init_lora_weights == InitLoraWeights::Pissa).then_some(("lora.init_lora_weights", pissa))
}

impl Run {
    /// Takes the adapter of the reference from `values`, or from the folder at `path`.
    ///
    /// # Errors
    /// The folder holds no adapter for these sites.
    pub(super) fn take_reference(
        &mut self,
        path: &Path,
        values: Option<&HashMap<String, Vec<f32>>>,
    ) -> Result<()> {
        if self.loss.reads_reference() {
            let values = match values {
                Some(values) => values.clone(),
                None => {
                    let path = steps::adapter_at(path).map_err(Error::Input)?;
                    AdapterFolder::open(&path)?.values(&self.sites, &self.shapes)?
                }
            };
            self.reference = Some(ReferenceAdapter::new(values));
        }
        Ok(())
    }

    /// The reference of the loss, for the plan.
    pub(super) fn planned_reference(&self) -> Option<Reference> {
        let with_adapter = self.config.lora.adapter_path.is_some();
        self.loss.reads_reference().then_some(if with_adapter {
            Reference::WithAdapter
        } else {
            Reference::Base
        })
    }
}
