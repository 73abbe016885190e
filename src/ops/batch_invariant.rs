//! Forwards whose rows do not depend on the other rows of a batch, bit for bit.
//!
//! libtorch and our large GEMMs choose kernels by the number of rows, and so the order of a row's sums. While a
//! [`Guard`] lives on a thread, the forwards that this thread calls have one order for each row (on the host, with
//! kernels of ours); backwards and devices are as ever. Attention, norms and the like have one order always.

use crate::device::has_kernels;
use std::cell::Cell;
use tch::Tensor;

thread_local! {
    static IS_ON: Cell<bool> = const { Cell::new(false) };
}

/// Keeps forwards batch-invariant until it is dropped.
pub struct Guard {
    before: bool,
}

impl Guard {
    /// Forwards of this thread are batch-invariant if `is_on`, whatever held before.
    pub fn new(is_on: bool) -> Self {
        Self { before: IS_ON.replace(is_on) }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        IS_ON.set(self.before);
    }
}

/// True if a forward on `x` has to be batch-invariant.
pub(super) fn is_on(x: &Tensor) -> bool {
    IS_ON.get() && has_kernels(x)
}
