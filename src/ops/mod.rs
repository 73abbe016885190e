//! The operations that the blocks call: explicit forward/backward pairs, no autograd.
//!
//! A pair states both formulas and is held against libtorch autograd in fp64 by the tests beside it. The device is
//! chosen in here, never in a block: kernels of ours for hosts ([`cpu`]) and GPUs ([`cuda`]), libtorch's operations
//! for what they do not take. Everything works on flat batches: `tokens` rows, documents one after another.

pub mod adamw;
pub mod attention;
pub mod batch_invariant;
pub mod cpu;
pub mod cross_entropy;
pub mod cuda;
pub mod dispatch;
pub mod linear;
pub mod norm;
pub mod rope;
pub mod routing;
mod row_layout;
mod squares;
pub mod swiglu;

pub use crate::buffers::Buffer;
pub use squares::sum_of_squares;

use tch::Kind;

/// The kind in which sums and statistics of tensors of `kind` are taken: fp32, or fp64 for fp64 (tests).
pub(crate) fn accum_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { kind } else { Kind::Float }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Helpers of the pairs' tests: fp64 inputs, autograd gradients, distances.

    use super::cpu::Isa;
    use tch::{Device, Kind, Tensor};

    /// The kinds that kernels compute in, each with how far off it may be where results are about 1: half a unit in the
    /// last place, and what sums of some thousand terms add to that.
    pub const KINDS: [(Kind, f64); 3] =
        [(Kind::Double, 1e-14), (Kind::Float, 1e-6), (Kind::BFloat16, 1.0 / 256.0)];

    /// Calls `check` on every level that this machine has, with one thread and with several.
    pub fn everywhere(check: impl Fn()) {
        let before = tch::get_num_threads();
        for level in Isa::available() {
            for threads in [1, 3] {
                tch::set_num_threads(threads);
                level.forced(&check);
            }
        }
        tch::set_num_threads(before);
    }

    /// Standard normal fp64 tensor that asks for a gradient.
    pub fn leaf(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Double, Device::Cpu)).set_requires_grad(true)
    }

    /// The largest difference: absolute up to numbers of 1 in `exact`, beyond them relative, as dtypes round.
    pub fn distance(ours: &Tensor, exact: &Tensor) -> f64 {
        assert_eq!(ours.size(), exact.size());
        if ours.numel() == 0 {
            return 0.0;
        }
        let exact = exact.detach().to_kind(Kind::Double);
        let off = (ours.detach().to_kind(Kind::Double) - &exact).abs();
        (off / exact.abs().clamp_min(1.0)).max().double_value(&[])
    }

    /// Gradients of `inputs` when `output` gets the gradient `d_output`.
    pub fn autograd(output: &Tensor, d_output: &Tensor, inputs: &[&Tensor]) -> Vec<Tensor> {
        (output * d_output).sum(Kind::Double).backward();
        inputs.iter().map(|input| input.grad()).collect()
    }
}
