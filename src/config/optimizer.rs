//! Fields of optimizers that a run and a server share, beside learning rate, weight decay and AdamW's numbers.

use super::section::section;
use super::value::choices;

choices! {
    /// Rule that updates the adapter from its gradient.
    pub enum Optimizer {
        /// Decoupled weight decay, fp32 moments.
        Adamw = "adamw",
        /// AdamW whose moments are kept in `optimizer_dtype`.
        AnyprecisionAdamw = "anyprecision_adamw",
        Sgd = "sgd",
        /// A step of the same size along the sign of every element of the gradient.
        Signsgd = "signsgd",
        /// Momentum of which every A and B is made orthogonal.
        Muon = "muon",
    }

    /// Dtype of state tensors.
    pub enum OptimizerDtype {
        Fp32 = "fp32",
        Bf16 = "bf16",
    }

    /// Factor of Muon's learning rate for a matrix of r rows and c columns.
    pub enum MuonAdjustLr {
        /// √max(1, r/c)
        Original = "original",
        /// 0.2·√max(r, c)
        MatchRmsAdamw = "match_rms_adamw",
    }
}

section! {
    /// Fields of the optimizers that not all of them read.
    pub struct OptimizerArgs {
        /// anyprecision_adamw and muon: dtype of moments and momentum, bf16 or fp32. The other optimizers keep fp32.
        optimizer_dtype: OptimizerDtype = OptimizerDtype::Bf16;
        /// muon: peak learning rate, in place of `lr`.
        muon_lr: f64 = 0.02 => Positive;
        /// muon: decay of the momentum.
        muon_momentum: f64 = 0.95 => BelowOne;
        /// muon: look ahead by the momentum, as Nesterov does.
        muon_nesterov: bool = true;
        /// muon: Newton-Schulz iterations that make a matrix orthogonal, at most 99.
        muon_ns_steps: usize = 5;
        /// muon: factor of the learning rate for a matrix of r rows and c columns: `original` is √max(1, r/c),
        /// `match_rms_adamw` 0.2·√max(r, c), which suits learning rates of AdamW. null: `original`.
        muon_adjust_lr_fn: Option<MuonAdjustLr> = None;
        /// LoRA+: the learning rate of B is this many times that of A, with any optimizer.
        loraplus_lr_ratio: f64 = 1.0 => Positive;
    }
}

/// Newton-Schulz iterations that torch's Muon allows.
const MOST_NS_STEPS: usize = 99;

impl OptimizerArgs {
    /// The problem of `muon_ns_steps`, if it is one.
    pub(super) fn ns_steps_problem(&self) -> Option<super::Problem> {
        let steps = self.muon_ns_steps;
        let words = || format!("{steps} is above {MOST_NS_STEPS}, the most that Muon makes");
        (steps > MOST_NS_STEPS).then(|| super::Problem::Conflict(words()))
    }
}
