//! A driver without a device, for tests: it records what it is asked, can be told to fail, and runs the kernels compiled for
//! the host (`tests/emulator/emulator.h`) in its own memory.
//!
//! What it is strict about: uploads, downloads and frees must lie within one living allocation; a graph is replayed with the
//! bytes it was captured with; after an injected loss everything fails. Fresh memory is filled with NaN.
#![allow(unsafe_code, clippy::undocumented_unsafe_blocks)] // a test's own memory, and kernels made for this

use baton_cuda::source::Program;
use baton_cuda::{Address, DeviceError, DeviceInfo, Driver, GraphId, Launch};
use baton_kvtransfer::Region;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What was asked, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Load,
    Allocate(usize),
    Free(Address),
    MapHost,
    Upload(usize),
    Download(usize),
    Launch(&'static str),
    Capture(usize),
    Replay(GraphId),
    Forget(GraphId),
    Synchronize,
}

/// Shared between a test and the driver that it gave away.
#[derive(Debug, Default)]
pub struct Record {
    pub events: Vec<Event>,
    /// Bytes that may still be allocated.
    pub free: usize,
    /// Bytes in living allocations.
    pub used: usize,
    /// Fails the call before which so many events were recorded, and all after it.
    pub lost_at: Option<usize>,
}

pub type Shared = Arc<Mutex<Record>>;

pub fn lock(record: &Shared) -> MutexGuard<'_, Record> {
    record.lock().unwrap_or_else(PoisonError::into_inner)
}

type Emulate = unsafe extern "C" fn(*const (), *const u8, u32, u32, u32);

struct Kernels {
    library: libloading::Library,
}

pub struct EmulatedDriver {
    info: DeviceInfo,
    record: Shared,
    names: Vec<&'static str>,
    /// Without it launches are only recorded.
    kernels: Option<Arc<Kernels>>,
    memory: BTreeMap<Address, Vec<u64>>,
    graphs: HashMap<GraphId, Vec<Launch>>,
    graphs_made: u64,
    mapped: Vec<Arc<Region>>,
    executes: bool,
}

// SAFETY: the library is only code; all state of a launch is its caller's.
unsafe impl Send for EmulatedDriver {}

/// Launches use the library's global state, one at a time.
static RUNNING: Mutex<()> = Mutex::new(());

/// Libraries by program, each compiled once per process.
static COMPILED: Mutex<Vec<(Program, Arc<Kernels>)>> = Mutex::new(Vec::new());

/// Whether a C++ compiler is here; without one, tests that compute say so and pass.
pub fn compiler() -> Option<PathBuf> {
    let names = std::env::var_os("CXX").map(PathBuf::from);
    let mut names = names.into_iter().chain(["c++", "g++", "clang++"].map(PathBuf::from));
    let found = names.find(|name| {
        Command::new(name)
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success())
    });
    if found.is_none() {
        eprintln!("skipped: there is no C++ compiler to run the kernels with on the host");
    }
    found
}

fn compile(program: &Program) -> Arc<Kernels> {
    let mut compiled = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, kernels)) = compiled.iter().find(|(p, _)| p == program) {
        return kernels.clone();
    }
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("kernels.cpp"), folder.path().join("kernels.so"));
    std::fs::write(&source, program.source()).unwrap();
    let header = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/emulator/emulator.h");
    let output = Command::new(compiler().unwrap())
        .args([
            "-std=c++17",
            "-O2",
            "-ffp-contract=off",
            "-fno-strict-aliasing",
            "-U_FORTIFY_SOURCE",
            "-w",
        ])
        .args(["-shared", "-fPIC", "-DBATON_EMULATED", "-include", header])
        .args(program.defines())
        .arg(&source)
        .arg("-o")
        .arg(&library)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let library = unsafe { libloading::Library::new(&library) }.unwrap();
    let kernels = Arc::new(Kernels { library });
    compiled.push((*program, kernels.clone()));
    kernels
}

impl EmulatedDriver {
    /// Computes.
    pub fn new() -> (Self, Shared) {
        Self::with(true)
    }

    /// Only records: outputs are what memory is filled with.
    pub fn recording() -> (Self, Shared) {
        Self::with(false)
    }

    fn with(executes: bool) -> (Self, Shared) {
        let record = Arc::new(Mutex::new(Record {
            free: 1 << 30,
            ..Record::default()
        }));
        let driver = EmulatedDriver {
            info: DeviceInfo {
                ordinal: 0,
                name: "an emulated device".into(),
                capability: (9, 0),
                multiprocessors: 1,
                memory_bytes: 1 << 30,
                shared_bytes_max: 227 << 10,
            },
            record: record.clone(),
            names: Vec::new(),
            kernels: None,
            memory: BTreeMap::new(),
            graphs: HashMap::new(),
            graphs_made: 0,
            mapped: Vec::new(),
            executes,
        };
        (driver, record)
    }

    fn event(&self, event: Event) -> Result<(), DeviceError> {
        let mut record = lock(&self.record);
        if record.lost_at.is_some_and(|at| record.events.len() >= at) {
            return Err(DeviceError::Lost("an injected Xid 79".into()));
        }
        record.events.push(event);
        Ok(())
    }

    /// Where an address range lies; it must be inside one allocation.
    fn place(&mut self, address: Address, bytes: usize) -> *mut u8 {
        let (start, words) = self
            .memory
            .range_mut(..=address)
            .next_back()
            .expect("an address of ours");
        let base = words.as_mut_ptr().cast::<u8>();
        // From where the memory really begins, before the aligned address.
        let offset = address as usize - base as usize;
        assert!(
            *start <= address && offset + bytes <= words.len() * 8,
            "beyond an allocation"
        );
        unsafe { base.add(offset) }
    }

    fn execute(&self, launch: &Launch) {
        let name = self.names[launch.kernel.0];
        let Some(kernels) = &self.kernels else { return };
        let _running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        // Kernels read their argument as a structure: aligned.
        let mut words = vec![0u64; launch.args.len().div_ceil(8)];
        words.iter_mut().zip(launch.args.chunks(8)).for_each(|(word, bytes)| {
            *word = u64::from_ne_bytes(bytes.try_into().expect("whole words"));
        });
        unsafe {
            let emulate: libloading::Symbol<'_, Emulate> = kernels.library.get(b"emulate\0").unwrap();
            let kernel: libloading::Symbol<'_, *const ()> = kernels.library.get(name.as_bytes()).unwrap();
            emulate(
                *kernel,
                words.as_ptr().cast(),
                launch.grid[0],
                launch.grid[1],
                launch.threads,
            );
        }
    }
}

impl Driver for EmulatedDriver {
    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn free_bytes(&mut self) -> Result<u64, DeviceError> {
        Ok(lock(&self.record).free as u64)
    }

    fn load(&mut self, program: &Program) -> Result<(), DeviceError> {
        self.event(Event::Load)?;
        self.names = program.kernels();
        self.kernels = self.executes.then(|| compile(program));
        Ok(())
    }

    fn allocate(&mut self, bytes: usize) -> Result<Address, DeviceError> {
        self.event(Event::Allocate(bytes))?;
        let mut record = lock(&self.record);
        if bytes > record.free {
            return Err(DeviceError::OutOfMemory { bytes });
        }
        record.free -= bytes;
        record.used += bytes;
        // 32 words more, so that the start can be aligned as the real driver's is.
        let words = vec![u64::MAX; bytes.div_ceil(8) + 32];
        let address = (words.as_ptr() as u64).next_multiple_of(256);
        self.memory.insert(address, words);
        Ok(address)
    }

    fn free(&mut self, address: Address) {
        let _ = self.event(Event::Free(address));
        let bytes = (self.memory.remove(&address).expect("freed once").len() - 32) * 8;
        let mut record = lock(&self.record);
        record.used = record.used.saturating_sub(bytes);
        record.free += bytes;
    }

    fn map_host(&mut self, region: &Arc<Region>) -> Result<Address, DeviceError> {
        self.event(Event::MapHost)?;
        self.mapped.push(region.clone());
        Ok(unsafe { region.slice_mut(0..0) }.as_mut_ptr() as u64)
    }

    fn upload(&mut self, to: Address, bytes: &[u8]) -> Result<(), DeviceError> {
        self.event(Event::Upload(bytes.len()))?;
        let place = self.place(to, bytes.len());
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
        Ok(())
    }

    fn download(&mut self, from: Address, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.event(Event::Download(bytes.len()))?;
        let place = self.place(from, bytes.len());
        unsafe { std::ptr::copy_nonoverlapping(place, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn launch(&mut self, launch: &Launch) -> Result<(), DeviceError> {
        self.event(Event::Launch(self.names[launch.kernel.0]))?;
        assert!(launch.shared_bytes <= self.info.shared_bytes_max && launch.threads <= 256);
        self.execute(launch);
        Ok(())
    }

    fn capture(&mut self, launches: &[Launch]) -> Result<GraphId, DeviceError> {
        self.event(Event::Capture(launches.len()))?;
        self.graphs_made += 1;
        let id = GraphId(self.graphs_made);
        self.graphs.insert(id, launches.to_vec());
        Ok(id)
    }

    fn replay(&mut self, graph: GraphId) -> Result<(), DeviceError> {
        self.event(Event::Replay(graph))?;
        self.graphs[&graph].iter().for_each(|launch| self.execute(launch));
        Ok(())
    }

    fn forget(&mut self, graph: GraphId) {
        let _ = self.event(Event::Forget(graph));
        self.graphs.remove(&graph).expect("forgotten once");
    }

    fn synchronize(&mut self) -> Result<(), DeviceError> {
        self.event(Event::Synchronize)
    }
}
