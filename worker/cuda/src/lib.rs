//! The op seam on NVIDIA GPUs. Nothing of CUDA is needed to build or to start: the driver and NVRTC are looked for when a
//! worker asks for a GPU, and their absence is an answer, not an error.
//!
//! - [`source`]: the kernels of `kernels/`, and how they are compiled for a device and a model; [`nvrtc`] compiles,
//!   [`cache`] keeps what was compiled.
//! - [`driver`]: the narrow seam below everything here: memory, launches, graphs. [`cuda`] is the real one; the tests have
//!   one that records, and runs the kernels compiled for the host.
//! - [`ops`]: the op seam over a driver; [`matrix`] brings weights to the device, [`work`] divides attention among blocks,
//!   [`graphs`] replays steps that look alike.
//! - [`memory`]: how many KV blocks fit.
//! - [`doctor`]: what there is on this machine, in words.
//! - [`check`]: everything that can be compared with the CPU, as a table.
//!
//! Not here: tensor parallelism over several GPUs, and KV blocks that travel from device to device; see `docs/gpu.md`.
#![deny(unsafe_code)]

pub mod args;
pub mod cache;
pub mod check;
pub mod cuda;
pub mod doctor;
pub mod driver;
pub mod graphs;
pub mod matrix;
pub mod memory;
pub mod nvrtc;
pub mod ops;
pub mod source;
pub mod work;

pub use cuda::CudaDriver;
pub use driver::{Address, DeviceError, DeviceInfo, Driver, GraphId, KernelId, Launch};
pub use ops::{CudaOps, KvMemory, OpsOptions};
