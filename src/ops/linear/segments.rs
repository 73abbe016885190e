//! Which rows go through which of a layer's matrices.

use crate::{device::has_grouped_gemm, ops::cpu::values};
use std::cell::OnceCell;
use tch::{Device, Tensor};

/// Which rows are whose: group i has rows `offsets[i]..offsets[i + 1]`, and all rows are some group's.
#[derive(Debug)]
pub struct RowSegments {
    /// `[groups + 1]`; of groups that a device made, once the host has asked.
    offsets: OnceCell<Vec<i64>>,
    on_device: Option<OnDevice>,
}

/// RowSegments as a device is told of them.
#[derive(Debug)]
pub(super) struct OnDevice {
    /// Where each group ends: `[groups]` i32.
    pub ends: Tensor,
    /// Whether it has no rows: `[groups, 1, 1]` bool.
    pub is_empty: Tensor,
    /// Whether the device computes all groups at once.
    at_once: bool,
}

impl OnDevice {
    fn share(&self) -> Self {
        let [ends, is_empty] = [&self.ends, &self.is_empty].map(Tensor::shallow_clone);
        Self { ends, is_empty, at_once: self.at_once }
    }
}

/// How many rows each group has, `[groups]`, from where it ends.
pub fn sizes(ends: &Tensor) -> Tensor {
    ends.diff(1, 0, Some(ends.narrow(0, 0, 1).zeros_like()), None)
}

impl RowSegments {
    /// All of `rows` in one.
    pub fn one(rows: i64) -> Self {
        Self::new(vec![0, rows])
    }

    /// Of rows on the host.
    pub fn new(offsets: Vec<i64>) -> Self {
        Self { offsets: offsets.into(), on_device: None }
    }

    /// Of rows on `device`, which is told.
    pub fn of_device(offsets: &[i64], device: Device) -> Self {
        if device == Device::Cpu {
            return Self::new(offsets.to_vec());
        }
        let ends: Vec<i32> = offsets[1..].iter().map(|&end| end as i32).collect();
        let ends = Tensor::from_slice(&ends).to_device(device);
        Self { offsets: offsets.to_vec().into(), ..Self::on_device(&ends, &sizes(&ends)) }
    }

    /// Of rows on a device, from what that knows of each group: where it ends, and [how many](sizes) rows it has, `[groups]` i32. The
    /// host is told when it asks.
    pub fn on_device(ends: &Tensor, sizes: &Tensor) -> Self {
        let at_once = ends.device() != Device::Cpu && has_grouped_gemm();
        let (ends, is_empty) = (ends.shallow_clone(), sizes.eq(0).view([-1, 1, 1]));
        Self { offsets: OnceCell::new(), on_device: Some(OnDevice { ends, is_empty, at_once }) }
    }

    /// As a device computes them, on the CPU.
    #[cfg(test)]
    pub(super) fn at_once(offsets: &[i64]) -> Self {
        let ends = Tensor::from_slice(&offsets[1..]).to_kind(tch::Kind::Int);
        let mut groups = Self::on_device(&ends, &sizes(&ends));
        groups.on_device.iter_mut().for_each(|groups| groups.at_once = true);
        groups
    }

    /// The same once more.
    pub fn share(&self) -> Self {
        Self { offsets: self.offsets.clone(), on_device: self.on_device.as_ref().map(OnDevice::share) }
    }

    /// Where each group begins, and the end: `[groups + 1]`. Waits for a device that has made them.
    pub fn offsets(&self) -> &[i64] {
        self.offsets.get_or_init(|| {
            let ends =
                self.on_device.iter().flat_map(|groups| values::<i64>(&groups.ends.to_device(Device::Cpu)));
            std::iter::once(0).chain(ends).collect()
        })
    }

    /// For a device that computes all of them at once.
    pub(super) fn computed_at_once(&self) -> Option<&OnDevice> {
        self.on_device.as_ref().filter(|groups| groups.at_once)
    }
}
