//! The choice of what backward recomputes, by the memory that is free for a rank.

use super::Memory;
use crate::{
    config::CheckpointingMethod::{NoRecompute, RecomputeFullLayer, Selective},
    model::recompute::Recompute,
};
use std::fmt;

/// Percent of its plan that a rank may take besides: plans are right within this (`tests/check.rs`).
const MARGIN: u64 = 15;

/// Bytes of the driver and of libtorch on a GPU that no plan has (0.3 to 0.5 GB were seen).
const OF_DRIVER: u64 = 500_000_000;

/// Bytes that a rank may need for each way to recompute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ways {
    /// The least recompute first.
    needed: Vec<(Recompute, u64)>,
    layers: usize,
    on_device: bool,
}

/// The way that was chosen for the memory that is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub recompute: Recompute,
    /// Bytes that a rank may need.
    pub needed: u64,
    /// Bytes that are free for a rank.
    pub free: Option<u64>,
    layers: usize,
}

impl Ways {
    /// All ways of a model of `layers` layers, where a way takes `memory` of a rank, whose tensors are `on_device`.
    pub fn new(layers: usize, on_device: bool, memory: impl Fn(Recompute) -> Memory) -> Self {
        let needed = |recompute| (recompute, needed(&memory(recompute), on_device));
        Self { needed: Recompute::ways(layers).map(needed).collect(), layers, on_device }
    }

    /// The least recompute that fits into `free` bytes; full recompute where none does, or nothing is known.
    pub fn choose(&self, free: Option<u64>) -> Choice {
        let fitting = self.needed.iter().find(|(_, needed)| free.is_some_and(|free| *needed <= free));
        let full = (RecomputeFullLayer.into(), 0);
        let (recompute, needed) = *fitting.or(self.needed.last()).unwrap_or(&full);
        Choice { recompute, needed, free, layers: self.layers }
    }
}

/// Bytes that a rank may need beyond those in use when it starts.
fn needed(memory: &Memory, on_device: bool) -> u64 {
    let (planned, own) =
        if on_device { (memory.on_device(), OF_DRIVER) } else { (memory.total() + memory.save, 0) };
    let planned = planned as u64;
    planned + planned * MARGIN / 100 + own
}

impl Choice {
    /// It is not known to be too much.
    pub fn fits(&self) -> bool {
        self.free.is_none_or(|free| self.needed <= free)
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (way, gb) = (self.recompute.told(self.layers), |bytes: u64| bytes as f64 / 1e9);
        let needed = gb(self.needed);
        match self.free.map(gb) {
            None => write!(f, "recompute: {way}, as this host does not tell its free memory"),
            Some(free) if self.fits() => write!(
                f,
                "recompute: {way}; a rank may need {needed:.2} GB for it, and {free:.2} GB are free for each"
            ),
            Some(free) => write!(
                f,
                "recompute: {way}, and even so a rank may need {needed:.2} GB where {free:.2} GB are free for each; \
                 start more ranks, or lower train.micro_batch_size or data.sample_packing_sequence_len"
            ),
        }
    }
}

impl fmt::Display for Ways {
    /// Lines of a report.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let own = if self.on_device { " and 0.5 GB of the driver" } else { "" };
        writeln!(
            f,
            "bytes that a rank may need by gradient_checkpointing_method (with {MARGIN} % margin{own}):"
        )?;
        for method in [NoRecompute, Selective, RecomputeFullLayer] {
            let way = |(recompute, _): &&(Recompute, u64)| recompute.method(self.layers) == Some(method);
            if let Some((recompute, bytes)) = self.needed.iter().find(way) {
                writeln!(f, "  {:<32} {bytes:>14}", recompute.told(self.layers))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory whose activations are `activations` bytes.
    fn memory(activations: usize) -> Memory {
        Memory {
            base: 600,
            slots: 0,
            adapter: 0,
            optimizer: 0,
            gradients: 0,
            activations,
            scratch: 100,
            device_scratch: 1100,
            libraries: 100,
            save: 200,
        }
    }

    /// A model of 2 layers, each of 1000 bytes of activations, of which the MLP has 600.
    fn ways(on_device: bool) -> Ways {
        let of = |recompute: Recompute| {
            let kept = |layer| match recompute.of(layer) {
                NoRecompute => 1000,
                Selective => 400,
                _ => 0,
            };
            memory((0..2).map(kept).sum())
        };
        Ways::new(2, on_device, of)
    }

    #[test]
    fn the_least_recompute_that_fits_with_the_margin_is_chosen() {
        // 1000 bytes besides activations, each 1.15 times.
        for (free, way, needed) in [
            (Some(9999), "no_recompute", 3450),
            (Some(3450), "no_recompute", 3450),
            (Some(3449), "selective in the first 1 of 2 layers, no_recompute in the others", 2760),
            (Some(2070), "selective", 2070),
            (Some(2069), "recompute_full_layer in the first 1 of 2 layers, selective in the others", 1610),
            (Some(1150), "recompute_full_layer", 1150),
            (Some(0), "recompute_full_layer", 1150),
            (None, "recompute_full_layer", 1150),
        ] {
            let choice = ways(false).choose(free);
            assert_eq!((choice.recompute.told(2).as_str(), choice.needed), (way, needed), "{free:?}");
            assert_eq!(choice.fits(), free != Some(0));
        }
    }

    #[test]
    fn a_device_holds_neither_libraries_nor_copies_of_a_save() {
        let driver = 500_000_000;
        let choice = ways(true).choose(Some(10 * driver));
        // 600 of the base, 2000 of activations and 1100 of scratch.
        assert_eq!((choice.recompute, choice.needed), (NoRecompute.into(), 4255 + driver));
    }

    #[test]
    fn a_choice_is_told_in_a_line_and_the_ways_in_a_table() {
        let told = |free| ways(false).choose(free).to_string();
        let expected =
            "recompute: no_recompute; a rank may need 0.00 GB for it, and 5.00 GB are free for each";
        assert_eq!(told(Some(5_000_000_000)), expected);
        assert!(told(Some(0)).contains("even so a rank may need"), "{}", told(Some(0)));
        assert!(told(None).contains("does not tell its free memory"));
        let table = ways(false).to_string();
        assert_eq!(table.lines().count(), 4, "{table}");
        assert!(table.contains("  selective                                  2070\n"), "{table}");
    }
}
