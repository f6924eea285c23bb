//! The driver seam on the real driver, through `cudarc`'s raw functions, whose library is loaded when first used. Never
//! called where that library is missing: `cudarc` would panic.
#![allow(unsafe_code)]

use crate::cache;
use crate::driver::{Address, DeviceError, DeviceInfo, Driver, GraphId, Launch};
use crate::source::{CAPABILITY_MIN, Program};
use baton_kvtransfer::Region;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString, c_int, c_void};
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;

/// Downloads from here on go through page-locked memory.
const STAGED_BYTES_MIN: usize = 64 << 10;

/// Whether the driver's library is there. Everything else in this file may be called only if it is.
pub fn is_present() -> bool {
    // SAFETY: loads the library of NVIDIA's driver, whose initialisers have no conditions.
    unsafe { sys::is_culib_present() }
}

/// A result code in words.
fn describe(code: CUresult) -> String {
    let mut text = ptr::null();
    // SAFETY: writes a pointer to a static string, or null.
    let known = unsafe { sys::cuGetErrorString(code, &mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    if !known {
        return format!("{code:?}");
    }
    // SAFETY: a string that ends in zero and lives for ever.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    format!("{text} ({code:?})")
}

fn check(code: CUresult, what: &str) -> Result<(), DeviceError> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(DeviceError::Lost(format!("{what}: {}", describe(code)))),
    }
}

/// As [`check`], before anything is lost.
fn available(code: CUresult, what: &str) -> Result<(), DeviceError> {
    match code {
        CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(DeviceError::Unavailable(format!("{what}: {}", describe(code)))),
    }
}

/// The driver's version, as `12040` for 12.4, and the devices it shows this process (`CUDA_VISIBLE_DEVICES` is its to
/// respect).
///
/// # Errors
/// [`DeviceError::Unavailable`], in words.
pub fn devices() -> Result<(i32, Vec<DeviceInfo>), DeviceError> {
    if !is_present() {
        let reason = "NVIDIA's driver is not installed on this machine: libcuda.so.1 is not found";
        return Err(DeviceError::Unavailable(reason.into()));
    }
    let (mut version, mut count) = (0, 0);
    // SAFETY: the library is there; each call writes what it is given a place for.
    unsafe {
        available(sys::cuInit(0), "the driver does not start")?;
        available(sys::cuDriverGetVersion(&mut version), "the driver has no version")?;
        available(sys::cuDeviceGetCount(&mut count), "the driver counts no devices")?;
    }
    let devices = (0..usize::try_from(count).unwrap_or(0)).map(describe_device);
    Ok((version, devices.collect::<Result<_, _>>()?))
}

fn describe_device(ordinal: usize) -> Result<DeviceInfo, DeviceError> {
    let mut device = 0;
    let (mut name, mut memory_bytes) = ([0; 128], 0usize);
    let number = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
    // SAFETY: the driver is initialised; buffers are as long as is said.
    unsafe {
        available(sys::cuDeviceGet(&mut device, number), "no such device")?;
        available(
            sys::cuDeviceGetName(name.as_mut_ptr(), 127, device),
            "a device has no name",
        )?;
        available(
            sys::cuDeviceTotalMem_v2(&mut memory_bytes, device),
            "a device has no memory",
        )?;
    }
    let attribute = |which| {
        let mut value = 0;
        // SAFETY: as above.
        let code = unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) };
        available(code, "a device lacks an attribute")?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    // SAFETY: the last byte stays zero.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    Ok(DeviceInfo {
        ordinal,
        name,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory_bytes: memory_bytes as u64,
        shared_bytes_max: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    })
}

/// Whether device `from` reaches the memory of device `to` directly.
///
/// # Errors
/// As [`devices`], which must have been asked before.
pub fn peers(from: usize, to: usize) -> Result<bool, DeviceError> {
    let number = |ordinal: usize| c_int::try_from(ordinal).unwrap_or(c_int::MAX);
    let (mut one, mut other, mut can) = (0, 0, 0);
    // SAFETY: `devices` has initialised the driver; each call writes one value.
    unsafe {
        available(sys::cuDeviceGet(&mut one, number(from)), "no such device")?;
        available(sys::cuDeviceGet(&mut other, number(to)), "no such device")?;
        available(
            sys::cuDeviceCanAccessPeer(&mut can, one, other),
            "peer access is unknown",
        )?;
    }
    Ok(can != 0)
}

/// A device of this machine. Its primary context is current on whatever thread calls.
pub struct CudaDriver {
    info: DeviceInfo,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    module: sys::CUmodule,
    functions: Vec<sys::CUfunction>,
    graphs: HashMap<GraphId, sys::CUgraphExec>,
    graphs_made: u64,
    mapped: Vec<Arc<Region>>,
    /// Page-locked host memory that large downloads go through: the bus is then as fast as it gets. Null if there is none.
    staging: *mut c_void,
    staging_bytes: usize,
    /// Given back when the driver goes: the context may outlive it.
    allocated: HashSet<Address>,
    cache: Option<PathBuf>,
}

// SAFETY: the driver's objects may be used from any thread; each call makes the context current on its own thread first.
unsafe impl Send for CudaDriver {}

impl CudaDriver {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] where there is none, or it is too old for the kernels.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        let (_, devices) = devices()?;
        let Some(info) = devices.get(ordinal).cloned() else {
            return Err(DeviceError::Unavailable(format!(
                "there is no GPU {ordinal}; the driver shows {} of them to this process",
                devices.len()
            )));
        };
        if info.capability < CAPABILITY_MIN {
            let ((major, minor), (least, _)) = (info.capability, CAPABILITY_MIN);
            return Err(DeviceError::Unavailable(format!(
                "{} has compute capability {major}.{minor}, and baton's kernels need {least}.0 (Ampere) or later",
                info.name
            )));
        }
        let (mut device, mut context, mut stream) = (0, ptr::null_mut(), ptr::null_mut());
        // SAFETY: the driver is initialised and the device exists; what is written is checked.
        unsafe {
            available(
                sys::cuDeviceGet(&mut device, c_int::try_from(ordinal).unwrap_or(c_int::MAX)),
                "no such device",
            )?;
            available(
                sys::cuDevicePrimaryCtxRetain(&mut context, device),
                "the GPU cannot be opened",
            )?;
            available(sys::cuCtxSetCurrent(context), "the GPU cannot be opened")?;
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            available(sys::cuStreamCreate(&mut stream, flags), "the GPU makes no stream")?;
        }
        Ok(CudaDriver {
            info,
            device,
            context,
            stream,
            module: ptr::null_mut(),
            functions: Vec::new(),
            graphs: HashMap::new(),
            graphs_made: 0,
            mapped: Vec::new(),
            staging: ptr::null_mut(),
            staging_bytes: 0,
            allocated: HashSet::new(),
            cache: cache::folder(),
        })
    }

    /// Page-locked memory of at least `bytes`, or null where the system gives none: copies are then slower, no more.
    fn stage(&mut self, bytes: usize) -> *mut c_void {
        if self.staging_bytes >= bytes {
            return self.staging;
        }
        let size = bytes.next_power_of_two();
        let mut memory = ptr::null_mut();
        // SAFETY: no copy is under way, as every download waits for its own; what was there goes once. Not write-combined
        // (flags 0), as the host reads it.
        unsafe {
            if !self.staging.is_null() {
                let _ = sys::cuMemFreeHost(self.staging);
            }
            if sys::cuMemHostAlloc(&mut memory, size, 0) != CUresult::CUDA_SUCCESS {
                memory = ptr::null_mut();
            }
        }
        self.staging = memory;
        self.staging_bytes = if memory.is_null() { 0 } else { size };
        memory
    }

    fn bind(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained for as long as `self` lives.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, "the context is gone")
    }
}

impl Driver for CudaDriver {
    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&mut self) -> Result<u64, DeviceError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes both.
        let code = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
        check(code, "free memory is unknown")?;
        Ok(free as u64)
    }

    fn load(&mut self, program: &Program) -> Result<(), DeviceError> {
        let image = cache::compiled(program, self.info.capability, self.cache.as_deref())?;
        self.bind()?;
        // SAFETY: a cubin for this device, made by NVRTC or kept with its hash; it is copied.
        let code = unsafe { sys::cuModuleLoadData(&mut self.module, image.as_ptr().cast()) };
        check(code, "the compiled kernels do not load")?;
        for name in program.kernels() {
            let text = CString::new(name).unwrap_or_default();
            let mut function = ptr::null_mut();
            // SAFETY: the module was just loaded; the name ends in zero.
            unsafe {
                let code = sys::cuModuleGetFunction(&mut function, self.module, text.as_ptr());
                check(code, &format!("kernel {name}"))?;
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // Static shared memory counts as well.
                let mut fixed = 0;
                let shared = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
                check(sys::cuFuncGetAttribute(&mut fixed, shared, function), name)?;
                let most = c_int::try_from(self.info.shared_bytes_max).unwrap_or(0) - fixed;
                check(sys::cuFuncSetAttribute(function, attribute, most), name)?;
            }
            self.functions.push(function);
        }
        Ok(())
    }

    fn allocate(&mut self, bytes: usize) -> Result<Address, DeviceError> {
        self.bind()?;
        let mut address = 0;
        // SAFETY: writes one address.
        match unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(DeviceError::OutOfMemory { bytes }),
            code => check(code, "allocating memory")?,
        }
        self.allocated.insert(address);
        Ok(address)
    }

    fn free(&mut self, address: Address) {
        if self.allocated.remove(&address) && self.bind().is_ok() {
            // SAFETY: an address of `allocate`, given back once; the driver waits for what uses it.
            let _ = unsafe { sys::cuMemFree_v2(address) };
        }
    }

    fn map_host(&mut self, region: &Arc<Region>) -> Result<Address, DeviceError> {
        self.bind()?;
        // SAFETY: an empty slice claims no byte; only its address is used.
        let base = unsafe { region.slice_mut(0..0) }.as_mut_ptr().cast::<c_void>();
        let mut address = 0;
        // SAFETY: the region is mapped for as long as it is kept in `self.mapped`, and unregistered before it goes. Kernels
        // touch only blocks that the block manager gave to the batch, as CPU kernels do.
        unsafe {
            // Bit 0: for all contexts; bit 1: mapped into the device's addresses.
            match sys::cuMemHostRegister_v2(base, region.len(), 3) {
                CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    return Err(DeviceError::OutOfMemory { bytes: region.len() });
                }
                code => check(code, "registering host memory")?,
            }
            self.mapped.push(region.clone());
            check(
                sys::cuMemHostGetDevicePointer_v2(&mut address, base, 0),
                "mapping host memory",
            )?;
        }
        Ok(address)
    }

    fn upload(&mut self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the caller's address; from pageable memory the driver has copied the bytes when it returns.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), self.stream) };
        check(code, "copying to the GPU")
    }

    fn download(&mut self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.bind()?;
        let staged = match bytes.len() {
            0..STAGED_BYTES_MIN => ptr::null_mut(),
            bytes => self.stage(bytes),
        };
        let to = if staged.is_null() {
            bytes.as_mut_ptr().cast()
        } else {
            staged
        };
        // SAFETY: the caller's address; the buffer is borrowed, or ours, until the stream is done.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to, from, bytes.len(), self.stream) };
        // Waited for even after an error, as the buffer must not be in use when this returns.
        let waited = self.synchronize();
        check(code, "copying from the GPU")?;
        waited?;
        if !staged.is_null() {
            // SAFETY: as many bytes as were just copied there.
            unsafe { ptr::copy_nonoverlapping(staged.cast::<u8>(), bytes.as_mut_ptr(), bytes.len()) };
        }
        Ok(())
    }

    fn launch(&mut self, launch: &Launch) -> Result<(), DeviceError> {
        self.bind()?;
        let Some(function) = self.functions.get(launch.kernel.0) else {
            return Err(DeviceError::Lost("a kernel that was not loaded".into()));
        };
        let mut parameters = [launch.args.as_ptr().cast_mut().cast::<c_void>()];
        let [x, y] = launch.grid;
        // SAFETY: every kernel takes one structure by value, whose bytes are copied before the call returns; addresses in it
        // are the device's.
        let code = unsafe {
            sys::cuLaunchKernel(
                *function,
                x,
                y,
                1,
                launch.threads,
                1,
                1,
                launch.shared_bytes,
                self.stream,
                parameters.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        check(code, "starting a kernel")
    }

    fn capture(&mut self, launches: &[Launch]) -> Result<GraphId, DeviceError> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours, and nothing else is asked of it until the capture ends.
        let code = unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) };
        check(code, "beginning a graph")?;
        let launched = launches.iter().try_for_each(|launch| self.launch(launch));
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: ends what was begun; the graph is destroyed once it is instantiated.
        unsafe {
            let ended = check(sys::cuStreamEndCapture(self.stream, &mut graph), "ending a graph");
            launched?;
            ended?;
            let made = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            check(made, "making a graph")?;
        }
        self.graphs_made += 1;
        let id = GraphId(self.graphs_made);
        self.graphs.insert(id, exec);
        Ok(id)
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), DeviceError> {
        self.bind()?;
        let Some(exec) = self.graphs.get(&graph) else {
            return Err(DeviceError::Lost("a graph that was forgotten".into()));
        };
        // SAFETY: alive until `forget`.
        check(unsafe { sys::cuGraphLaunch(*exec, self.stream) }, "starting a graph")
    }

    fn forget(&mut self, graph: GraphId) {
        if let Some(exec) = self.graphs.remove(&graph)
            && self.bind().is_ok()
        {
            // SAFETY: made by `capture`, destroyed once; the driver waits for a launch that is under way.
            let _ = unsafe { sys::cuGraphExecDestroy(exec) };
        }
    }

    fn synchronize(&mut self) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the stream is ours.
        check(unsafe { sys::cuStreamSynchronize(self.stream) }, "computing")
    }
}

impl Drop for CudaDriver {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: everything was made here and goes once, when the stream is done with it.
        unsafe {
            let _ = sys::cuStreamSynchronize(self.stream);
            for exec in self.graphs.values() {
                let _ = sys::cuGraphExecDestroy(*exec);
            }
            if !self.staging.is_null() {
                let _ = sys::cuMemFreeHost(self.staging);
            }
            for address in &self.allocated {
                let _ = sys::cuMemFree_v2(*address);
            }
            for region in &self.mapped {
                let _ = sys::cuMemHostUnregister(region.slice_mut(0..0).as_mut_ptr().cast());
            }
            if !self.module.is_null() {
                let _ = sys::cuModuleUnload(self.module);
            }
            let _ = sys::cuStreamDestroy_v2(self.stream);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
