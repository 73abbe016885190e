//! Host memory through which bytes go to a device and come from it.
//!
//! Page-locked where there is a device: it reads and writes such memory by itself, at the speed of its bus; anything else
//! the driver copies once more.

use super::{DeviceError, RankDevice, runtime::DeviceRuntime};
use std::{ptr::NonNull, sync::Arc};
use tch::{Device, Kind, Tensor};

/// Bytes that are under way at a time.
const BYTES: usize = 4 << 20;

/// A block of host memory.
pub struct Staging {
    start: NonNull<u8>,
    owner: Owner,
}

/// Whose the block is.
enum Owner {
    Own(#[expect(dead_code, reason = "keeps the memory")] Vec<u8>),
    Locked(Arc<dyn DeviceRuntime>),
}

impl Staging {
    /// A block for the tensors of `device`.
    pub fn new(device: &RankDevice) -> Result<Self, DeviceError> {
        if let Some(runtime) = device.runtime() {
            return Ok(Self { start: runtime.lock_memory(BYTES)?, owner: Owner::Locked(runtime.clone()) });
        }
        let mut own = vec![0; BYTES];
        Ok(Self { start: NonNull::from(own.as_mut_slice()).cast(), owner: Owner::Own(own) })
    }

    /// Fills `target`, contiguous, part after part: `fill(first byte, bytes)` writes each.
    pub fn send<E: From<tch::TchError>>(
        &mut self,
        target: &Tensor,
        mut fill: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let target = bytes(target)?;
        for (first, n) in parts(target.numel()) {
            // SAFETY: the block has `BYTES` bytes, and nothing else refers to it while it is borrowed.
            fill(first, unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), n) })?;
            target.narrow(0, first as i64, n as i64).f_copy_(&self.view(n)?)?;
        }
        Ok(())
    }

    /// The elements of `source`, contiguous, of the kind that `T` is.
    pub fn fetch<T: bytemuck::Pod>(&mut self, source: &Tensor) -> Result<Vec<T>, tch::TchError> {
        let source = bytes(source)?;
        let mut all = vec![T::zeroed(); source.numel() / size_of::<T>()];
        let out: &mut [u8] = bytemuck::cast_slice_mut(&mut all);
        for (first, n) in parts(out.len()) {
            self.view(n)?.f_copy_(&source.narrow(0, first as i64, n as i64))?;
            // SAFETY: the block has `BYTES` bytes, and the copy into it is complete: libtorch waits for it.
            out[first..first + n]
                .copy_from_slice(unsafe { std::slice::from_raw_parts(self.start.as_ptr(), n) });
        }
        Ok(all)
    }

    /// The first `n` bytes as a host tensor.
    fn view(&self, n: usize) -> Result<Tensor, tch::TchError> {
        // SAFETY: the block has `BYTES` bytes and outlives the view, which no method lets out.
        unsafe { Tensor::f_from_blob(self.start.as_ptr(), &[n as i64], &[1], Kind::Uint8, Device::Cpu) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Owner::Locked(runtime) = &self.owner {
            // SAFETY: it was locked by this runtime and is given back once.
            unsafe { runtime.unlock_memory(self.start) }
        }
    }
}

/// A contiguous tensor as its bytes.
fn bytes(tensor: &Tensor) -> Result<Tensor, tch::TchError> {
    tensor.f_view([-1])?.f_view_dtype(Kind::Uint8)
}

/// (first, length) of the parts of `all` bytes that fit into a block.
fn parts(all: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..all).step_by(BYTES).map(move |first| (first, BYTES.min(all - first)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_fetched() {
        let mut staging = Staging::new(&RankDevice::host()).unwrap();
        for n in [0, 1, BYTES / 4, BYTES / 2 + 3] {
            let target = Tensor::zeros([n as i64], (Kind::Float, Device::Cpu));
            let value = |i: usize| (i % 251) as u8;
            let fill = |first: usize, part: &mut [u8]| {
                part.iter_mut().enumerate().for_each(|(i, byte)| *byte = value(first + i));
                Ok::<_, tch::TchError>(())
            };
            staging.send(&target, fill).unwrap();
            let bytes: Vec<u8> = staging.fetch(&target).unwrap();
            assert!(bytes.len() == 4 * n && bytes.iter().enumerate().all(|(i, &byte)| byte == value(i)));
        }
    }
}
