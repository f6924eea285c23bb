//! The op seam over a driver. Ops only note their launches; a step runs when its logits are wanted, all at once, or as a
//! graph if it looks like one that ran before.
//!
//! # State of a step
//!
//! `begin` uploads what the step is about and divides attention; the ops after it append launches to `pending`; `logits`
//! (or, in a step without, the last layer's `kv_written`) runs them. Whatever is pending when the next step begins is run
//! first, so an upload never overtakes a kernel that reads what was there before.
//!
//! # Invariants
//! - A decode step (one row per span) is padded to a bucket. Padding rows are computed and thrown away: they write no K and
//!   V (their slot is `NONE`), attend to nothing, and no row reads another (P1).
//! - Buffers never move within a step, and grow rarely; a graph names addresses, so after a buffer moved its launches are
//!   others and the graph is not found again.
//! - After an error of the driver nothing more is computed: the context is lost ([`ModelError::Device`]).
//!
//! One rank: a whole model. Tensor parallelism over several devices is not here yet.

mod probe;
mod seam;

use crate::args::{self, Args, ElementType};
use crate::driver::{Address, DeviceError, Driver, KernelId, Launch};
use crate::graphs::Graphs;
use crate::matrix::{DeviceMatrix, Format};
use crate::source::Program;
use crate::work::{Heads, Work};
use baton_kernels::{Pool, WeightFormat};
use baton_kvtransfer::Region;
use baton_model::{KvGeometry, ModelConfig, ModelError, OpResult, Quantization, ShardSlices, Step};
use std::collections::HashMap;
use std::sync::Arc;

/// Most rows of a step: a grid's second dimension has no more.
const ROWS_MAX: usize = 65_535;
/// Where K and V lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvMemory {
    /// In the device's memory. Fast; no transport reaches it yet, so such a worker hands no blocks over.
    Device,
    /// In the host's region, mapped into the device: attention reads it over the bus. Everything that moves blocks works.
    Host,
}

/// How a device is used.
#[derive(Debug, Clone)]
pub struct OpsOptions {
    /// What the weights become.
    pub quantization: Quantization,
    /// Most rows of a step: activations are sized for it.
    pub rows_max: usize,
    /// Threads that convert weights, and sample between steps.
    pub threads: usize,
    /// Whether steps that come again are replayed as graphs.
    pub graphs: bool,
}

/// A buffer that grows.
#[derive(Debug, Default, Clone, Copy)]
struct Buffer {
    address: Address,
    bytes: usize,
}

/// Where the arena is.
#[derive(Debug, Clone, Copy)]
struct Arena {
    address: Address,
    memory: KvMemory,
    geometry: KvGeometry,
    blocks: u32,
}

/// Activations on the device.
#[derive(Debug)]
pub struct DeviceRows {
    address: Address,
    width: usize,
    rows: usize,
    element: ElementType,
}

/// An embedding table on the device.
#[derive(Debug)]
pub struct DeviceTable {
    address: Address,
    element: ElementType,
}

/// What `begin` found out, for the ops of the step.
#[derive(Debug, Default)]
struct Plan {
    /// Rows, padding included.
    rows: usize,
    /// Rows of logits that exist, once `gather` said so.
    wanted: usize,
    decode: bool,
    tokens: Address,
    positions: Address,
    slots: Address,
    items: Address,
    merge_items: Address,
    tables: Address,
    item_count: usize,
    merge_count: usize,
}

/// See the module.
pub struct CudaOps<D: Driver> {
    driver: D,
    program: Program,
    kernels: HashMap<&'static str, KernelId>,
    slices: ShardSlices,
    options: OpsOptions,
    pool: Arc<Pool>,
    layers: usize,
    arena: Option<Arena>,
    plan: Plan,
    pending: Vec<Launch>,
    graphs: Graphs,
    inputs: Buffer,
    gather: Buffer,
    frequencies: Buffer,
    frequencies_known: Vec<f32>,
    cos: Buffer,
    sin: Buffer,
    partials: Buffer,
    logits: Buffer,
    lost: Option<String>,
}

fn device_error(error: DeviceError) -> ModelError {
    match error {
        DeviceError::OutOfMemory { .. } => ModelError::DoesNotFit(error.to_string()),
        other => ModelError::Device(other.to_string()),
    }
}

impl<D: Driver> CudaOps<D> {
    /// Loads the kernels for a model onto a device.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] if the kernels do not compute such a model, [`ModelError::Device`] if the device refuses.
    pub fn new(mut driver: D, config: &ModelConfig, mut options: OpsOptions) -> OpResult<Self> {
        options.rows_max = options.rows_max.clamp(1, ROWS_MAX);
        let unsupported = |reason: String| ModelError::Unsupported { reason };
        let program = Program::new(config.head_dim, config.kv_dtype).map_err(unsupported)?;
        let group = config.heads / config.kv_heads.max(1);
        let shared = args::attention_shared_bytes(config.head_dim);
        if program.element != ElementType::F32 && (group > args::ITEM_ROWS || shared > driver.device().shared_bytes_max)
        {
            return Err(unsupported(format!(
                "attention with {group} query heads per key/value head of {} elements does not fit a block of this GPU",
                config.head_dim
            )));
        }
        let mut widths = [
            config.hidden_size,
            config.intermediate_size,
            config.heads * config.head_dim,
        ]
        .into_iter();
        if let Some(width) = widths.find(|w| !w.is_multiple_of(8)) {
            return Err(unsupported(format!(
                "the GPU kernels need widths of a multiple of 8, and this model has one of {width}"
            )));
        }
        driver.load(&program).map_err(device_error)?;
        let kernels = program.kernels().into_iter().enumerate();
        Ok(CudaOps {
            driver,
            kernels: kernels.map(|(id, name)| (name, KernelId(id))).collect(),
            program,
            slices: ShardSlices::whole(config),
            pool: Arc::new(Pool::new(options.threads)),
            options,
            layers: config.layers,
            arena: None,
            plan: Plan::default(),
            pending: Vec::new(),
            graphs: Graphs::default(),
            inputs: Buffer::default(),
            gather: Buffer::default(),
            frequencies: Buffer::default(),
            frequencies_known: Vec::new(),
            cos: Buffer::default(),
            sin: Buffer::default(),
            partials: Buffer::default(),
            logits: Buffer::default(),
            lost: None,
        })
    }

    /// The driver.
    pub fn driver(&mut self) -> &mut D {
        &mut self.driver
    }

    /// Steps that ran as a graph.
    pub fn graphs_replayed(&self) -> u64 {
        self.graphs.replayed()
    }

    /// Takes memory for `blocks` blocks, or maps `region` if K and V lie in the host's. Before the first step.
    ///
    /// # Errors
    /// [`ModelError::DoesNotFit`].
    pub fn allocate_arena(
        &mut self,
        geometry: KvGeometry,
        blocks: u32,
        memory: KvMemory,
        region: &Arc<Region>,
    ) -> OpResult {
        let bytes = geometry.arena_bytes(blocks).unwrap_or(usize::MAX);
        let address = match memory {
            KvMemory::Device => self.driver.allocate(bytes),
            KvMemory::Host => self.driver.map_host(region),
        };
        self.arena = Some(Arena {
            address: address.map_err(device_error)?,
            memory,
            geometry,
            blocks,
        });
        Ok(())
    }

    /// Runs `call` on the driver, unless it has failed before.
    fn on_device<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T, DeviceError>) -> OpResult<T> {
        if let Some(reason) = &self.lost {
            return Err(ModelError::Device(reason.clone()));
        }
        call(self).map_err(|error| {
            // In a step even a lack of memory leaves it half done.
            let reason = error.to_string();
            self.lost = Some(reason.clone());
            ModelError::Device(reason)
        })
    }

    /// Makes `buffer` at least as large.
    fn grow(driver: &mut D, buffer: &mut Buffer, bytes: usize) -> Result<Address, DeviceError> {
        if buffer.bytes < bytes {
            if buffer.bytes > 0 {
                driver.free(buffer.address);
            }
            *buffer = Buffer::default();
            let size = bytes.next_power_of_two().max(4096);
            *buffer = Buffer {
                address: driver.allocate(size)?,
                bytes: size,
            };
        }
        Ok(buffer.address)
    }

    fn note(
        &mut self,
        kernel: &'static str,
        grid: [usize; 2],
        threads: u32,
        shared_bytes: u32,
        args: Args,
    ) -> OpResult {
        let Some(kernel) = self.kernels.get(kernel).copied() else {
            return Err(ModelError::Batch(format!("the kernel {kernel} is not for this model")));
        };
        let grid = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        if grid.contains(&0) {
            return Ok(());
        }
        let args = args.bytes();
        self.pending.push(Launch {
            kernel,
            grid,
            threads,
            shared_bytes,
            args,
        });
        Ok(())
    }

    /// Starts everything that was noted.
    fn run(&mut self) -> OpResult {
        if self.pending.is_empty() {
            return Ok(());
        }
        let launches = std::mem::take(&mut self.pending);
        let graph = self.options.graphs && self.plan.decode;
        let result = self.on_device(|this| match graph {
            true => this.graphs.run(&mut this.driver, &launches),
            false => launches.iter().try_for_each(|launch| this.driver.launch(launch)),
        });
        self.pending = launches;
        self.pending.clear();
        result
    }

    fn arena(&self) -> OpResult<Arena> {
        self.arena
            .ok_or_else(|| ModelError::Batch("no KV arena was allocated on the device".into()))
    }

    fn rms(&mut self, x: &DeviceRows, delta: Address, weight: Address, eps: f32, out: &mut DeviceRows) -> OpResult {
        out.rows = x.rows;
        out.element = self.program.element;
        let args = Args::new(&[x.address, delta, weight, out.address]);
        let args = args.size(x.width).u32(out.element as u32).f32(eps).u32(0);
        self.note("rms_norm", [x.rows, 1], args::THREADS, 0, args)
    }

    /// `out = x * W^T + bias`, f32, to `out`.
    fn multiply(&mut self, x: &DeviceRows, w: &DeviceMatrix, out: Address) -> OpResult {
        if x.width != w.k || x.element != self.program.element {
            return Err(ModelError::Batch("rows that do not fit a matrix".into()));
        }
        let (rows, columns) = (x.rows, w.columns);
        let groups = w.k.div_ceil(baton_kernels::packed::GROUP);
        let args = Args::new(&[x.address, w.weights, w.scales, w.minima, w.bias, out]);
        let args = args.size(rows).size(columns).size(w.k).size(groups);
        if x.element == ElementType::F32 {
            let grid = [columns.div_ceil(16), rows.div_ceil(16)];
            return self.note("linear_f32", grid, args::THREADS, 0, args);
        }
        if w.format == Format::Dense && rows > 64 {
            let grid = [rows.div_ceil(args::TILE), columns.div_ceil(args::TILE)];
            return self.note("linear_dense_many", grid, args::THREADS, args::TILE_SHARED_BYTES, args);
        }
        let [few, more] = match w.format {
            Format::Dense => ["linear_dense_16", "linear_dense_64"],
            Format::Quantized(WeightFormat::Int8) => ["linear_int8_16", "linear_int8_64"],
            Format::Quantized(WeightFormat::Group8) => ["linear_group8_16", "linear_group8_64"],
            Format::Quantized(WeightFormat::Group4) => ["linear_group4_16", "linear_group4_64"],
            Format::Quantized(_) => ["linear_group4min_16", "linear_group4min_64"],
        };
        match rows <= 16 {
            true => self.note(few, [columns.div_ceil(16), 1], args::THREADS, 0, args),
            false => self.note(more, [columns.div_ceil(32), rows.div_ceil(64)], args::THREADS, 0, args),
        }
    }

    /// Uploads a step's inputs and returns where they are.
    fn upload_step(&mut self, step: &Step<'_>, rows: usize, arena: &Arena, decode: bool) -> Result<Plan, DeviceError> {
        let block_size = arena.geometry.block_size;
        let group = self.slices.heads.len() / self.slices.kv_heads.len().max(1);
        let half = self.program.element != ElementType::F32;
        let heads = Heads {
            group,
            kv_heads: self.slices.kv_heads.len(),
            tokens_max: if half { args::ITEM_ROWS / group.max(1) } else { 4 },
            splits: half,
        };
        let work = Work::of(&step.spans, block_size, heads, decode);
        let mut words: Vec<u32> = Vec::with_capacity(3 * rows + work.tables.len());
        let padding = rows - step.tokens.len();
        words.extend(step.tokens);
        words.extend(std::iter::repeat_n(0, padding));
        let positions = |s: &baton_model::StepSpan<'_>| s.start_position..s.start_position + s.rows;
        let word = |value: usize| u32::try_from(value).unwrap_or(args::NONE);
        words.extend(step.spans.iter().flat_map(positions).map(word));
        words.extend(std::iter::repeat_n(0, padding));
        for span in &step.spans {
            let slot = |p: usize| word(span.blocks[p / block_size] as usize * block_size + p % block_size);
            words.extend(positions(span).map(slot));
        }
        words.extend(std::iter::repeat_n(args::NONE, padding));
        // Items are read 16 bytes at a time.
        words.resize(words.len().next_multiple_of(4), 0);
        let items = words.len();
        words.extend(work.item_words());
        let tables = words.len();
        words.extend(&work.tables);
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let base = Self::grow(&mut self.driver, &mut self.inputs, bytes.len())?;
        self.driver.upload(base, &bytes)?;
        let row_bytes = (self.program.head_dim + 2) * 4;
        Self::grow(&mut self.driver, &mut self.partials, work.partial_rows * row_bytes)?;
        let table_bytes = rows * self.program.head_dim / 2 * 4;
        Self::grow(&mut self.driver, &mut self.cos, table_bytes)?;
        Self::grow(&mut self.driver, &mut self.sin, table_bytes)?;
        let at = |word: usize| base + word as u64 * 4;
        Ok(Plan {
            rows,
            wanted: 0,
            decode,
            tokens: at(0),
            positions: at(rows),
            slots: at(2 * rows),
            items: at(items),
            merge_items: at(items + work.items.len() * 8),
            tables: at(tables),
            item_count: work.items.len(),
            merge_count: work.merges.len(),
        })
    }
}
