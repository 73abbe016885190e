//! Report of a run before it is started, which `check` prints.

use super::Run;
use crate::{
    Result,
    comm::FreeMemory,
    config::{DatasetArgs, DatasetType},
    console::count,
    data::{SourceSummary, Summary},
    device,
    lora::{AdapterPlan, targets},
    model::base_plan::{BasePlan, Options},
    optim::Settings,
    plan::{
        AdapterMemory, Memory, MicroBatch, Plan, Reference, RoutedRows, Traffic, compute::flops_per_token,
    },
};

impl Run {
    /// The cost of the run on each rank.
    pub fn plan(&self) -> Result<Plan> {
        let ((base, adapter), options) = (self.plans()?, self.options());
        let train = &self.config.train;
        let batch = self.largest_batch();
        let micro_batches = self.micro_batches();
        let traffic = Traffic {
            spec: &self.spec,
            options: &options,
            base: &base.regions,
            adapter: &adapter,
            replicas: self.mesh.replicate(),
            optimizer: train.optimizer,
            reference: self.planned_reference(),
        };
        let experts_over = self.mesh.expert();
        let travels = |layer| {
            let rows = self.spec.moe_of(layer).map_or(0, |moe| moe.top_k * batch.tokens);
            let elsewhere = rows * (experts_over - 1) / experts_over;
            traffic.all_to_all(layer, RoutedRows { received: elsewhere, sent: elsewhere })
        };
        Ok(Plan {
            frozen: self.spec.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum(),
            trainable: targets::parameters_by_name(&self.sites, &self.shapes),
            batch,
            micro_batches,
            memory: self.memory(&base, &adapter, &options),
            first_step: traffic.step(micro_batches, false),
            step: traffic.step(micro_batches, true),
            all_to_all: micro_batches * (0..self.spec.layers.len()).map(travels).sum::<usize>(),
            flops_per_token: flops_per_token(&self.spec, &self.sites, &self.shapes, batch.longest),
        })
    }

    /// Memory of a rank that trains `adapter` on `base` with `options`.
    pub(super) fn memory(&self, base: &BasePlan, adapter: &AdapterPlan, options: &Options) -> Memory {
        let settings = Settings::from(&self.config.train);
        let mut memory = Memory::new(&self.spec, base, adapter, options, &settings, self.largest_batch());
        if self.planned_reference() == Some(Reference::WithAdapter) {
            memory.adapter += AdapterMemory::new(adapter, options, &settings).frozen();
        }
        memory
    }

    /// The largest possible micro-batch.
    fn largest_batch(&self) -> MicroBatch {
        // Validation keeps less than a step does, but its rows may be longer.
        let of_validation = self.dataset.validation_summary().map_or(0, |counts| counts.longest_row);
        let longest = self.dataset.summary().longest_row.max(of_validation);
        let most = self.dataset.rows().max(self.dataset.validation_rows());
        let rows = self.config.train.micro_batch_size.min(most);
        MicroBatch { tokens: rows * longest, longest }
    }

    /// The resolved configuration, mesh, data and cost of the run, compared with the memory of a rank's `device` and
    /// with what is `free` for each.
    pub fn report(&self, device: Option<device::Memory>, free: &FreeMemory) -> Result<String> {
        let (plan, recompute) = (self.plan()?, self.report_recompute(free)?);
        let room = device.map_or_else(String::new, |memory| {
            let device::Memory { free, total } = memory;
            let (used, needed) = (memory.used(), plan.memory.on_device());
            let fits = if needed <= free { "which is free" } else { "which is MORE THAN IS FREE" };
            format!(
                "memory of rank 0's device: {total} bytes, {used} in use; a rank needs {needed} bytes of it, {fits}\n"
            )
        });
        let validation = self.dataset.validation_summary();
        let validation =
            validation.map_or_else(String::new, |counts| format!("validation: {}\n", told(counts)));
        Ok(format!(
            "{}\n{}\n{}data: {}\n{validation}steps: {} of {}\n{plan}{recompute}{room}",
            self.config.to_yaml(),
            self.mesh.table(),
            self.sources(),
            told(self.dataset.summary()),
            self.total_steps,
            count(self.batches.global_batch, "row"),
        ))
    }

    /// A line for each data set, where there are several or its type was told by its rows.
    fn sources(&self) -> String {
        let (entries, types) = (&self.config.data.datasets, self.dataset.types());
        let counts = &self.dataset.summary().sources;
        if entries.iter().all(|entry| entry.kind != DatasetType::Auto || entry.is_dummy()) && counts.len() < 2
        {
            return String::new();
        }
        let line = |((entry, kind), counts): ((&DatasetArgs, &String), &SourceSummary)| {
            let weight = match entry.weight {
                1.0 => String::new(),
                weight => format!(", each {weight} times in an epoch"),
            };
            format!(
                "data of {} ({kind}): {}, {} dropped as too long; {}, {} with loss{weight}\n",
                entry.path.display(),
                count(counts.samples, "sample"),
                counts.dropped,
                count(counts.tokens, "token"),
                counts.valid_tokens,
            )
        };
        entries.iter().zip(types).zip(counts).map(line).collect()
    }
}

/// Counts of rows in words.
fn told(counts: &Summary) -> String {
    format!(
        "{}, {} dropped as too long; {} of at most {}, {}, {} with loss",
        count(counts.samples, "sample"),
        counts.dropped,
        count(counts.rows, "row"),
        count(counts.longest_row, "token"),
        count(counts.tokens, "token"),
        counts.valid_tokens,
    )
}
