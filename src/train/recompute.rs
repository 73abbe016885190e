//! `gradient_checkpointing_method: auto`: the least recompute whose plan fits the memory that is free for each rank.

use super::Run;
use crate::{
    Result, comm::FreeMemory, config::CheckpointingMethod, model::base_plan::Options, plan::recompute::Ways,
};

impl Run {
    /// Takes the least recompute that fits `memory`, if the configuration leaves it open. Every rank passes the same.
    /// A resume may take another than the step was made with: no result depends on it.
    ///
    /// # Errors
    /// The mesh does not divide the model.
    pub fn fit(&mut self, memory: &FreeMemory) -> Result<()> {
        if self.config.train.compute.checkpointing() == CheckpointingMethod::Auto {
            self.choice = Some(self.ways(memory.on_device)?.choose(memory.bytes));
        }
        Ok(())
    }

    /// Says what backward recomputes, if the program has chosen that.
    pub fn tell_recompute(&self) {
        match self.choice {
            Some(choice) if choice.fits() => tracing::info!("{choice}"),
            Some(choice) => tracing::warn!("{choice}"),
            None => {}
        }
    }

    /// The chosen recompute, with the bytes of each way and those that are free: lines of a report.
    pub(super) fn report_recompute(&self, memory: &FreeMemory) -> Result<String> {
        let mut text = self.ways(memory.on_device)?.to_string();
        if let Some(free) = memory.bytes {
            let supposed = memory.supposed.filter(|_| !memory.on_device);
            let supposed = supposed.map_or_else(String::new, |ranks| format!("   with {ranks} on this host"));
            text += &format!("  {:<32} {free:>14}{supposed}\n", "free for each rank");
        }
        let chosen = match self.choice {
            Some(choice) => choice.to_string(),
            None => {
                let told = self.options().checkpointing.told(self.spec.layers.len());
                format!("recompute: {told}, as the configuration says")
            }
        };
        Ok(text + &chosen + "\n")
    }

    /// Bytes of a rank for each way to recompute, where its tensors are `on_device` or on the host.
    fn ways(&self, on_device: bool) -> Result<Ways> {
        let ((base, adapter), options) = (self.plans()?, self.options());
        let memory = |checkpointing| self.memory(&base, &adapter, &Options { checkpointing, ..options });
        Ok(Ways::new(self.spec.layers.len(), on_device, memory))
    }
}
