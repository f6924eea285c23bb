//! The seam to the driver: what the backend needs of a device, and no more. Everything above it is tested without one.
//!
//! One device, one stream: what is asked for happens in the order in which it was asked for. Calls return before the
//! device is done, except [`Driver::download`] and [`Driver::synchronize`].
//!
//! An error is for good: a context that has failed once fails for ever (CUDA's own rule for launch failures and Xid
//! errors), except [`DeviceError::OutOfMemory`].

use crate::source::Program;
use baton_kvtransfer::Region;
use std::sync::Arc;

/// An address in the device's memory.
pub type Address = u64;

/// What a device said no to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// There is no such device, or no library to reach it.
    #[error("{0}")]
    Unavailable(String),
    /// The memory is used up.
    #[error(
        "the GPU refused {bytes} bytes of memory; give it a smaller KV cache or a smaller model, or end what else uses it"
    )]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// The kernels did not compile: a mistake in baton, or an NVRTC that is too old for the device.
    #[error("the kernels do not compile for {target}: {log}")]
    Compile {
        /// `sm_..`.
        target: String,
        /// What NVRTC said, shortened.
        log: String,
    },
    /// The device, or its driver, failed: it computes nothing for this process any more.
    #[error(
        "the GPU failed: {0}; the worker must be started again, and if it happens again, look for Xid errors in the kernel's log"
    )]
    Lost(String),
}

/// What is known of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As the driver numbers them.
    pub ordinal: usize,
    /// The product's name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// All of its memory.
    pub memory_bytes: u64,
    /// Most shared memory that a block may ask for.
    pub shared_bytes_max: u32,
}

/// A kernel of the loaded program: its place in [`Program::kernels`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KernelId(pub usize);

/// A captured sequence of launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GraphId(pub u64);

/// One kernel launch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Which kernel.
    pub kernel: KernelId,
    /// Blocks.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// The kernel's one argument, as [`Args`](crate::args::Args) builds it. Addresses in it are the caller's to get right: a
    /// wrong one is a fault on the device, or of memory that was mapped for it.
    pub args: Vec<u8>,
}

/// See the module.
pub trait Driver: Send + 'static {
    /// The device.
    fn device(&self) -> &DeviceInfo;
    /// Memory that nobody uses.
    ///
    /// # Errors
    /// As the module says; so everywhere below.
    fn free_bytes(&mut self) -> Result<u64, DeviceError>;
    /// Compiles (or finds) a program and loads it. Once.
    fn load(&mut self, program: &Program) -> Result<(), DeviceError>;
    /// Memory, aligned to 256 bytes. What is in it is anything.
    fn allocate(&mut self, bytes: usize) -> Result<Address, DeviceError>;
    /// Gives memory back, when the device is done with it.
    fn free(&mut self, address: Address);
    /// Makes a host's region reachable for kernels; it is kept until the driver goes.
    fn map_host(&mut self, region: &Arc<Region>) -> Result<Address, DeviceError>;
    /// Copies to the device; `bytes` may be changed at once.
    fn upload(&mut self, to: Address, bytes: &[u8]) -> Result<(), DeviceError>;
    /// Waits for everything asked for before, and copies to the host.
    fn download(&mut self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError>;
    /// Starts a kernel.
    fn launch(&mut self, launch: &Launch) -> Result<(), DeviceError>;
    /// Makes a graph of these launches, without running it.
    fn capture(&mut self, launches: &[Launch]) -> Result<GraphId, DeviceError>;
    /// Runs a graph.
    fn replay(&mut self, graph: GraphId) -> Result<(), DeviceError>;
    /// Frees a graph, when the device is done with it.
    fn forget(&mut self, graph: GraphId);
    /// Waits for everything asked for before.
    fn synchronize(&mut self) -> Result<(), DeviceError>;
}
