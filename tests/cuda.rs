//! libtorch's CUDA library on a machine without a GPU: it is loaded, and reports the missing driver itself.

use tch::{Device, Kind, Tensor};
use xorl_dist::device::torch;

fn on_cuda() -> Result<Tensor, String> {
    Tensor::f_zeros([1], (Kind::Float, Device::Cuda(0))).map_err(|error| error.to_string())
}

#[test]
fn once_loaded_it_is_the_driver_that_is_missing() {
    if std::path::Path::new("/dev/nvidiactl").exists() {
        return;
    }
    let before = on_cuda().unwrap_err();
    assert!(before.contains("from the 'CUDA' backend"), "{before}");
    torch::load_cuda().unwrap();
    let after = on_cuda().unwrap_err();
    assert!(after.contains("Found no NVIDIA driver"), "{after}");
    torch::load_cuda().unwrap();
}
