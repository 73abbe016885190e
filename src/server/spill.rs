//! Adapters that wait on disk: one file a rank with the bytes of this rank's tensors, one after another. It is read by
//! the process that wrote it, into tensors of the same sizes: an adapter that comes back is the same to the bit, with
//! its gradients as far as this rank has accumulated them. The next process deletes what is left of them.

use super::storage;
use crate::device::{DeviceError, RankDevice, Staging};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};
use tch::Tensor;

/// The folder of these files below `output`.
fn folder(output: &Path) -> PathBuf {
    output.join(storage::OWN).join("spilled")
}

/// Reasons why an adapter cannot be moved to disk or back.
#[derive(Debug, thiserror::Error)]
pub enum SpillError {
    #[error("{path}: {error}", path = .path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("{path} is not as this server has written it: the disk, or someone else, has changed it", path = .path.display())]
    Damaged { path: PathBuf },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

/// A rank's file, which goes when this is dropped.
#[derive(Debug)]
pub struct Spilled {
    path: PathBuf,
    bytes: u64,
    digest: [u8; 32],
}

/// Deletes the files that an earlier process has left below `output`.
///
/// # Errors
/// They cannot be deleted.
pub fn clear(output: &Path) -> Result<(), SpillError> {
    let folder = folder(output);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(SpillError::Io { path: folder, error }),
        _ => Ok(()),
    }
}

/// Bytes of `tensors`.
pub fn bytes_of(tensors: &[Tensor]) -> u64 {
    tensors.iter().map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
}

impl Spilled {
    /// Writes the contiguous `tensors` of `device` into the file `name` below `output`, and waits until they are on the
    /// disk: memory is freed after that, so no error may come later.
    ///
    /// # Errors
    /// The disk is full or fails; no file is left.
    pub fn write(
        output: &Path,
        name: &str,
        tensors: &[Tensor],
        device: &RankDevice,
    ) -> Result<Self, SpillError> {
        let folder = folder(output);
        let mut spilled = Self { path: folder.join(name), bytes: 0, digest: [0; 32] };
        let io = |error| SpillError::Io { path: folder.join(name), error };
        fs::create_dir_all(&folder).map_err(io)?;
        let mut file = File::create(&spilled.path).map_err(io)?;
        let (mut staging, mut digest) = (Staging::new(device)?, Sha256::new());
        for tensor in tensors {
            let bytes: Vec<u8> = staging.fetch(tensor)?;
            digest.update(&bytes);
            file.write_all(&bytes).map_err(io)?;
            spilled.bytes += bytes.len() as u64;
        }
        file.sync_all().map_err(io)?;
        spilled.digest = digest.finalize().into();
        Ok(spilled)
    }

    /// Reads the file into `tensors`, which have the sizes of those that were written.
    ///
    /// # Errors
    /// The disk fails, or has other bytes than were written.
    pub fn read(&self, tensors: &[Tensor], device: &RankDevice) -> Result<(), SpillError> {
        let io = |error| SpillError::Io { path: self.path.clone(), error };
        let damaged = || SpillError::Damaged { path: self.path.clone() };
        let mut file = File::open(&self.path).map_err(io)?;
        let has_size = file.metadata().map_err(io)?.len() == self.bytes && bytes_of(tensors) == self.bytes;
        if !has_size {
            return Err(damaged());
        }
        let (mut staging, mut digest) = (Staging::new(device)?, Sha256::new());
        for tensor in tensors {
            staging.send(tensor, |_, part| {
                file.read_exact(part).map_err(io)?;
                digest.update(&*part);
                Ok::<_, SpillError>(())
            })?;
        }
        if self.digest == <[u8; 32]>::from(digest.finalize()) { Ok(()) } else { Err(damaged()) }
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Spilled {
    fn drop(&mut self) {
        // What stays is deleted by the next process.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    fn tensors(values: &[&[f32]]) -> Vec<Tensor> {
        values.iter().map(|values| Tensor::from_slice(values)).collect()
    }

    fn bits(tensors: &[Tensor]) -> Vec<Vec<u32>> {
        let of =
            |tensor: &Tensor| Vec::<f32>::try_from(tensor).unwrap().iter().map(|x| x.to_bits()).collect();
        tensors.iter().map(of).collect()
    }

    #[test]
    fn tensors_come_back_to_the_bit_and_their_file_goes() {
        let (output, host) = (tempfile::tempdir().unwrap(), RankDevice::host());
        let written = tensors(&[&[1.5, -0.0, f32::NAN, 1e-42], &[], &[f32::MAX]]);
        let spilled = Spilled::write(output.path(), "1-0", &written, &host).unwrap();
        assert_eq!((spilled.bytes(), bytes_of(&written)), (20, 20));
        let fresh = || written.iter().map(Tensor::zeros_like).collect::<Vec<_>>();
        let read = fresh();
        spilled.read(&read, &host).unwrap();
        assert_eq!(bits(&read), bits(&written));
        let file = folder(output.path()).join("1-0");
        let mut bytes = fs::read(&file).unwrap();
        bytes[17] ^= 1;
        fs::write(&file, &bytes).unwrap();
        assert!(matches!(spilled.read(&fresh(), &host), Err(SpillError::Damaged { .. })));
        fs::write(&file, &bytes[..19]).unwrap();
        assert!(matches!(spilled.read(&fresh(), &host), Err(SpillError::Damaged { .. })));
        drop(spilled);
        assert!(!file.exists());
        clear(output.path()).unwrap();
        clear(output.path()).unwrap();
        assert!(!folder(output.path()).exists());
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error_that_names_it() {
        let output = tempfile::tempdir().unwrap();
        fs::write(output.path().join(".server"), "").unwrap();
        let zeros = [Tensor::zeros([3], (Kind::Float, Device::Cpu))];
        let error = Spilled::write(output.path(), "1-0", &zeros, &RankDevice::host()).unwrap_err();
        assert!(error.to_string().contains(".server/spilled/1-0"), "{error}");
    }
}
