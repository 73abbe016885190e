//! The operations that the blocks call: explicit forward/backward pairs, no autograd.
//!
//! A pair states both formulas and is held against libtorch autograd in fp64 by the tests beside it. The device
//! is chosen in here, never in a block. Everything works on flat batches: `tokens` rows, documents one after
//! another.

pub mod attention;
pub mod buffers;
pub mod cpu;
pub mod linear;
pub mod norm;
pub mod rope;
pub mod swiglu;

pub use buffers::Buffer;

#[cfg(test)]
pub(crate) mod testing {
    //! Helpers of the pairs' tests: fp64 inputs, autograd gradients, distances.

    use tch::{Device, Kind, Tensor};

    /// Standard normal fp64 tensor that asks for a gradient.
    pub fn leaf(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Double, Device::Cpu)).set_requires_grad(true)
    }

    /// The largest absolute difference.
    pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
        assert_eq!(a.size(), b.size());
        if a.numel() == 0 {
            return 0.0;
        }
        (a.detach().to_kind(Kind::Double) - b.detach().to_kind(Kind::Double)).abs().max().double_value(&[])
    }

    /// Gradients of `inputs` when `output` gets the gradient `d_output`.
    pub fn autograd(output: &Tensor, d_output: &Tensor, inputs: &[&Tensor]) -> Vec<Tensor> {
        (output * d_output).sum(Kind::Double).backward();
        inputs.iter().map(|input| input.grad()).collect()
    }
}
