//! Which device computes. Never `Device::default()`: it goes by what was compiled in, not by the hardware that is there.

use burn::tensor::Device;

/// The first CUDA device where this build has the `cuda` feature and the machine a GPU, else the CPU.
pub fn device() -> Device {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec().into_iter().next() {
        return gpu;
    }
    Device::flex()
}
