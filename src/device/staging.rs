//! Staging: host memory through which bytes move to and from a device.
//!
//! It is page-locked where there is a device, which reads and writes such memory directly, at the speed of its bus. The
//! driver copies other memory once more.

use super::{DeviceError, RankDevice, runtime::DeviceRuntime};
use std::{ptr::NonNull, sync::Arc};
use tch::{Device, Kind, Tensor};

/// Size of the block (bytes): larger tensors move in parts.
const BYTES: usize = 4 << 20;

/// A block of host memory.
pub struct Staging {
    start: NonNull<u8>,
    owner: Owner,
}

/// The owner of the block.
enum Owner {
    Own(#[expect(dead_code, reason = "keeps the memory")] Vec<u8>),
    Locked(Arc<dyn DeviceRuntime>),
}

impl Staging {
    /// Allocates a block for the tensors of `device`.
    ///
    /// # Errors
    /// Page-locked memory cannot be allocated.
    pub fn new(device: &RankDevice) -> Result<Self, DeviceError> {
        if let Some(runtime) = device.runtime() {
            return Ok(Self { start: runtime.lock_memory(BYTES)?, owner: Owner::Locked(runtime.clone()) });
        }
        let mut own = vec![0; BYTES];
        Ok(Self { start: NonNull::from(own.as_mut_slice()).cast(), owner: Owner::Own(own) })
    }

    /// Fills the contiguous tensor `target` part by part. `fill(offset, bytes)` writes the bytes from `offset` on.
    ///
    /// # Errors
    /// `fill` or libtorch fails.
    pub fn send<E: From<tch::TchError>>(
        &mut self,
        target: &Tensor,
        mut fill: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let target = bytes(target)?;
        for (first, n) in parts(target.numel()) {
            // SAFETY: `n` is at most `BYTES`, the length of the block. `self` is borrowed mutably, and the view of
            // the last part is gone, so nothing else refers to the block.
            fill(first, unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), n) })?;
            target.narrow(0, first as i64, n as i64).f_copy_(&self.view(n)?)?;
        }
        Ok(())
    }

    /// The elements of the contiguous tensor `source`, whose dtype has the size of `T`.
    ///
    /// # Errors
    /// libtorch fails.
    pub fn fetch<T: bytemuck::Pod>(&mut self, source: &Tensor) -> Result<Vec<T>, tch::TchError> {
        let source = bytes(source)?;
        let mut all = vec![T::zeroed(); source.numel() / size_of::<T>()];
        let out: &mut [u8] = bytemuck::cast_slice_mut(&mut all);
        if matches!(self.owner, Owner::Own(_)) && !out.is_empty() {
            // On the host in one copy.
            let shape = [out.len() as i64];
            // SAFETY: `out` is writable and as long as the view, which is gone before `out` is used again.
            let target =
                unsafe { Tensor::f_from_blob(out.as_mut_ptr(), &shape, &[1], Kind::Uint8, Device::Cpu) };
            target?.f_copy_(&source)?;
            return Ok(all);
        }
        for (first, n) in parts(out.len()) {
            self.view(n)?.f_copy_(&source.narrow(0, first as i64, n as i64))?;
            // SAFETY: `n` is at most `BYTES`, the length of the block. The copy into it is complete: libtorch waits
            // for a copy to the host.
            out[first..first + n]
                .copy_from_slice(unsafe { std::slice::from_raw_parts(self.start.as_ptr(), n) });
        }
        Ok(all)
    }

    /// The first `n` bytes as a host tensor.
    fn view(&self, n: usize) -> Result<Tensor, tch::TchError> {
        // SAFETY: `n` is at most `BYTES`, the length of the block. The view does not outlive it: no method returns one.
        unsafe { Tensor::f_from_blob(self.start.as_ptr(), &[n as i64], &[1], Kind::Uint8, Device::Cpu) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Owner::Locked(runtime) = &self.owner {
            // SAFETY: the memory comes from `lock_memory` of this runtime, and is freed here only.
            unsafe { runtime.unlock_memory(self.start) }
        }
    }
}

/// The bytes of a contiguous tensor: `[bytes]` u8.
fn bytes(tensor: &Tensor) -> Result<Tensor, tch::TchError> {
    tensor.f_view([-1])?.f_view_dtype(Kind::Uint8)
}

/// (offset, length) of the parts of `all` bytes, each at most a block.
fn parts(all: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..all).step_by(BYTES).map(move |first| (first, BYTES.min(all - first)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sent_bytes_are_fetched() {
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
