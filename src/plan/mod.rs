//! Costs of a configuration before it runs: bytes received, memory, arithmetic. Pure functions of a
//! [`BasePlan`](crate::model::base_plan::BasePlan) and an [`AdapterPlan`](crate::lora::AdapterPlan), which ask the
//! layers' halves. `check` prints them; tests compare them with measurements.

pub mod adapter;
pub mod compute;
pub mod memory;
pub mod recompute;
pub mod traffic;

pub use adapter::AdapterMemory;
pub use memory::{Memory, MicroBatch};
pub use traffic::{Reference, RoutedRows, Traffic};

use crate::{comm::Received, console::count};
use std::{collections::BTreeMap, fmt};

/// Costs of a run on each rank.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Parameters of the base.
    pub frozen: usize,
    /// Parameters of the adapter, by target name.
    pub trainable: BTreeMap<&'static str, usize>,
    /// The largest possible micro-batch.
    pub batch: MicroBatch,
    /// Micro-batches of a whole step.
    pub micro_batches: usize,
    pub memory: Memory,
    /// Bytes received in the first step, before any gather.
    pub first_step: Received,
    /// Bytes received in every later step.
    pub step: Received,
    /// Bytes received by expert parallelism in a step with even routers and micro-batches of the largest size.
    pub all_to_all: usize,
    /// Floating-point operations a token, in a document as long as the longest row.
    pub flops_per_token: f64,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: usize = self.trainable.values().sum();
        let share = 100.0 * total as f64 / (self.frozen + total) as f64;
        writeln!(f, "parameters: {} frozen, {total} trainable ({share:.3} %)", self.frozen)?;
        for (name, count) in &self.trainable {
            writeln!(f, "  {name:<32} {count:>14}")?;
        }
        let MicroBatch { tokens, .. } = self.batch;
        let most = count(tokens, "token");
        writeln!(f, "memory of a rank at its peak, bytes (micro-batches of at most {most}):")?;
        for (what, bytes) in self.memory.parts() {
            writeln!(f, "  {what:<32} {bytes:>14}")?;
        }
        let total = self.memory.total();
        writeln!(f, "  {:<32} {total:>14}   {:.2} GB", "sum", total as f64 / 1e9)?;
        let save = self.memory.save;
        let with = (total + save) as f64 / 1e9;
        writeln!(f, "  {:<32} {save:>14}   {with:.2} GB with them", "copies while a step is saved")?;
        writeln!(f, "received by a rank, bytes a step ({}):", count(self.micro_batches, "micro-batch"))?;
        if self.first_step.is_empty() {
            writeln!(f, "  nothing")?;
        }
        for (key @ (operation, group), first) in &self.first_step {
            let later = self.step.get(key).copied().unwrap_or(0);
            let name = format!("{}/{group}", operation.name());
            writeln!(f, "  {name:<32} {later:>14}   {first} in the first step")?;
        }
        if self.all_to_all > 0 {
            let (name, bytes) = ("all_to_all/expert", self.all_to_all);
            writeln!(f, "  {name:<32} {bytes:>14}   at most, if the routers choose evenly")?;
        }
        writeln!(f, "arithmetic: {:.3} GFLOP a token, forward and backward", self.flops_per_token / 1e9)
    }
}
