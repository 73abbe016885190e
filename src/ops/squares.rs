//! Σ x² of flat vectors, for norms: squares in the vector's own kind, their sum in fp64. In a kernel of our own one
//! pass; libtorch writes out both the squares and their fp64 copies.

use super::cpu::{Rows, each_row};
use crate::device::has_kernels;
use std::sync::atomic::{AtomicU64, Ordering};
use tch::{Kind, Tensor};

/// Independent partial sums, so that the loop vectorizes.
const LANES: usize = 16;

/// Σ x² of a flat tensor: `[]` fp64, on its device.
pub fn sum_of_squares(values: &Tensor) -> Tensor {
    if has_kernels(values) && values.kind() == Kind::Float {
        return Tensor::from(in_rows(values));
    }
    values.square().sum(Kind::Double)
}

/// Does not depend on the number of threads: sums of pieces are added in the order of the pieces.
fn in_rows(values: &Tensor) -> f64 {
    let pieces = Rows::<f32>::pieces(values);
    let sums: Vec<AtomicU64> = (0..pieces.len()).map(|_| AtomicU64::new(0)).collect();
    each_row(
        [pieces],
        [],
        [],
        #[inline(always)]
        |i, [row], [], []| {
            let mut lanes = [0.0f64; LANES];
            let (whole, rest) = row.as_chunks::<LANES>();
            for chunk in whole {
                lanes.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += f64::from(x * x));
            }
            let rest: f64 = rest.iter().map(|x| f64::from(x * x)).sum();
            sums[i].store((lanes.iter().sum::<f64>() + rest).to_bits(), Ordering::Relaxed);
        },
    );
    sums.into_iter().map(|sum| f64::from_bits(sum.into_inner())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{everywhere, leaf};

    #[test]
    fn squares_are_libtorchs_sum() {
        for n in [0, 1, 15, 16, 4095, 4096, 100_003] {
            let values = leaf(&[n]).detach().to_kind(Kind::Float);
            let exact = values.square().sum(Kind::Double).double_value(&[]);
            everywhere(|| {
                let ours = sum_of_squares(&values).double_value(&[]);
                assert!((ours - exact).abs() <= 1e-12 * exact, "{n}: {ours} {exact}");
            });
        }
    }

    /// An fp32 square that overflows makes the sum infinite, a NaN makes it NaN.
    #[test]
    fn what_is_not_finite_stays_so() {
        for (value, is_nan) in [(1e20, false), (f64::INFINITY, false), (f64::NAN, true)] {
            let values = Tensor::ones([5000], (Kind::Float, tch::Device::Cpu));
            let _ = values.get(4099).fill_(value);
            everywhere(|| {
                let ours = sum_of_squares(&values).double_value(&[]);
                assert!(if is_nan { ours.is_nan() } else { ours == f64::INFINITY }, "{value}: {ours}");
            });
        }
    }
}
