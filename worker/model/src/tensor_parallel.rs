//! A model on one device or on several ranks, behind one `forward`. Rank 0 is the thread that calls it; every other rank
//! is a thread of its own with its own decoder, and on the CPU its own group of compute threads. What a rank holds is in
//! [`shard`](crate::ShardSlices), how they meet in [`Communicator`](crate::Communicator).
//!
//! # Invariants
//!
//! - All ranks compute the same batches in the same order. A batch is checked before any of them hears of it.
//! - When `forward` returns without an error, no rank touches the arena any more, as each has come to rank 0's last
//!   meeting, after its last access to it.
//! - The first rank that fails or panics ends the model for good: it aborts the communicator, so nobody waits for it, and
//!   from then on `forward` fails. Ranks out of step could only compute nonsense. After such an error the arena must
//!   not be used again, since a rank that hangs may yet come back and write.
//!
//! Does not choose the degree, and knows nothing of hosts: ranks of one model live in one process.

use crate::affinity::Cores;
use crate::batch::{ForwardBatch, Logits};
use crate::config::ModelConfig;
use crate::cpu_ops::CpuOps;
use crate::decoder::Decoder;
use crate::error::ModelError;
use crate::files::ModelFiles;
use crate::kv_cache::KvCache;
use crate::ops::Ops;
use crate::options::LoadOptions;
use crate::progress::{Progress, SharedProgress};
use crate::shard::ShardSlices;
use crate::shared_memory::SharedMemory;
use baton_kernels::{Kernels, Pool, PoolConfig};
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

/// What a rank is told to compute.
struct RankStep {
    batch: ForwardBatch,
    kv: KvCache,
}

/// A rank other than 0. Its thread ends when the sender is dropped, or when it fails.
struct RankThread {
    /// Has room for the one step that can be under way.
    steps: SyncSender<Arc<RankStep>>,
    thread: JoinHandle<()>,
}

/// See the module.
pub struct TensorParallel<O: Ops = CpuOps> {
    first: Decoder<O>,
    others: Vec<RankThread>,
    /// Rank 0's, if ranks are pinned.
    cores: Option<Cores>,
    /// Which rank ended it all, and why.
    failed: Option<(usize, String)>,
}

impl<O: Ops> From<Decoder<O>> for TensorParallel<O> {
    /// A whole model: no further threads, nothing to meet.
    fn from(decoder: Decoder<O>) -> Self {
        TensorParallel {
            first: decoder,
            others: Vec::new(),
            cores: None,
            failed: None,
        }
    }
}

impl TensorParallel<CpuOps> {
    /// Loads a model for the CPU on as many ranks as the options say, all at once, and divides the threads between them. Each
    /// rank packs its part only. If there are as many threads as this process has cores, and they may spin, a rank's threads are pinned to
    /// cores of their own (the caller's thread for the time of a `forward`).
    ///
    /// # Errors
    /// As [`Decoder::load`]; [`ModelError::TensorParallel`] if the model or the threads cannot be divided.
    pub fn load(
        files: &ModelFiles,
        config: ModelConfig,
        options: &LoadOptions,
        progress: &dyn Progress,
    ) -> Result<Self, ModelError> {
        let size = options.tensor_parallel;
        if size == 1 {
            return Ok(Decoder::load(files, config, options, progress)?.into());
        }
        if options.threads < size {
            return Err(ModelError::TensorParallel(format!(
                "{size} ranks need as many compute threads at least, and there are {}; give more threads or fewer ranks",
                options.threads
            )));
        }
        let slices = ShardSlices::of_shared_arena(&config, size)?;
        let threads: Vec<usize> = (0..size)
            .map(|rank| options.threads / size + usize::from(rank < options.threads % size))
            .collect();
        let spin = options.spin && options.threads <= std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        // Cores that others use as well are left to the system.
        let cores = if options.spin { Cores::divide(&threads) } else { None };
        let shared = SharedProgress::new(progress, size);
        let ends = slices.into_iter().zip(SharedMemory::group(size, spin));
        let loaded = std::thread::scope(|scope| {
            let load = |(rank, (slices, end)): (usize, (ShardSlices, SharedMemory))| {
                let (cores, threads, config) = (cores.as_ref().map(|c| c[rank].clone()), threads[rank], config.clone());
                let progress = shared.rank(rank);
                scope.spawn(move || {
                    // Kernel threads inherit the cores, and the packed weights come to lie next to them.
                    let _pinned = cores.as_ref().and_then(Cores::pin);
                    let kernels = Kernels::new(PoolConfig {
                        spin: options.spin,
                        ..threads.into()
                    });
                    let ops = CpuOps::sharded(kernels, slices, options.quantization, Box::new(end));
                    Decoder::with_ops(ops, files, config, &progress)
                })
            };
            let ranks: Vec<_> = ends.enumerate().map(load).collect();
            let ranks = ranks.into_iter().map(|r| r.join().unwrap_or_else(|p| resume_unwind(p)));
            ranks.collect::<Result<Vec<_>, _>>()
        })?;
        Self::start(loaded, cores)
    }
}

impl<O: Ops> TensorParallel<O> {
    /// A model of these ranks, in rank order, whose ops meet each other.
    ///
    /// # Errors
    /// [`ModelError::TensorParallel`] if they are not all ranks of one group, or the system starts no more threads.
    pub fn new(ranks: Vec<Decoder<O>>) -> Result<Self, ModelError> {
        Self::start(ranks, None)
    }

    fn start(ranks: Vec<Decoder<O>>, cores: Option<Vec<Cores>>) -> Result<Self, ModelError> {
        let size = ranks.len();
        let mut shards = ranks.iter().map(|r| r.ops().slices().shard).enumerate();
        if !shards.all(|(rank, shard)| (shard.rank(), shard.size()) == (rank, size)) {
            let reason = "the decoders are not the ranks of one group, in order";
            return Err(ModelError::TensorParallel(reason.into()));
        }
        let mut cores = cores.map(Vec::into_iter);
        let mut next_cores = || cores.as_mut().and_then(Iterator::next);
        let mut ranks = ranks.into_iter();
        let Some(first) = ranks.next() else {
            return Err(ModelError::TensorParallel("a model needs a rank".into()));
        };
        let mut model = TensorParallel::from(first);
        model.cores = next_cores();
        for (rank, decoder) in (1..).zip(ranks) {
            let (steps, queue) = sync_channel(1);
            let cores = next_cores();
            let thread = std::thread::Builder::new()
                .name(format!("rank-{rank}"))
                .spawn(move || serve(decoder, &queue, cores.as_ref()))
                .map_err(|e| ModelError::TensorParallel(format!("the system starts no thread for rank {rank}: {e}")))?;
            model.others.push(RankThread { steps, thread });
        }
        Ok(model)
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        self.first.config()
    }

    /// Rank 0's device.
    pub fn ops(&self) -> &O {
        self.first.ops()
    }

    /// Host threads that idle between forward passes, if there are any: those of rank 0.
    pub fn pool(&self) -> Option<Arc<Pool>> {
        self.first.pool()
    }

    /// Ranks: the degree of tensor parallelism.
    pub fn ranks(&self) -> usize {
        1 + self.others.len()
    }

    /// As [`Decoder::forward`], on all ranks. `layer_done` is called on the caller's thread, when all ranks have written
    /// their heads of the layer.
    ///
    /// # Errors
    /// [`ModelError::Batch`] for a batch that does not fit the model or the cache; nothing was computed then.
    /// [`ModelError::Rank`] if a rank failed: this model, and the arena, are of no more use.
    ///
    /// # Panics
    /// If rank 0, or `layer_done`, panics; the other ranks are told first.
    pub fn forward(
        &mut self,
        batch: &ForwardBatch,
        kv: &KvCache,
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<Logits<'_>, ModelError> {
        if self.others.is_empty() {
            return self.first.forward(batch, kv, layer_done);
        }
        if let Some((rank, reason)) = self.failed.clone() {
            return Err(ModelError::Rank { rank, reason });
        }
        batch.check(self.first.config(), kv)?;
        let step = Arc::new(RankStep {
            batch: batch.clone(),
            kv: kv.clone(),
        });
        for (rank, other) in (1..).zip(&self.others) {
            if other.steps.send(step.clone()).is_err() {
                self.first.ops().abort(&format!("rank {rank} is gone"));
            }
        }
        let first = &mut self.first;
        let computed = {
            let _pinned = self.cores.as_ref().and_then(Cores::pin);
            catch_unwind(AssertUnwindSafe(|| first.compute(batch, kv, layer_done)))
        };
        let error = match computed {
            Ok(Ok(())) => return Ok(self.first.logits()),
            Ok(Err(error)) => error,
            Err(panic) => {
                self.fail(0, PANICKED.into());
                resume_unwind(panic);
            }
        };
        match &error {
            ModelError::Rank { rank, reason } => self.fail(*rank, reason.clone()),
            other => self.fail(0, other.to_string()),
        }
        let (rank, reason) = self.failed.clone().unwrap_or_default();
        Err(ModelError::Rank { rank, reason })
    }

    fn fail(&mut self, rank: usize, reason: String) {
        self.first.ops().abort(&reason);
        self.failed = Some((rank, reason));
    }
}

const PANICKED: &str = "it panicked; its message was printed before";

/// What a rank other than 0 does all its life.
fn serve<O: Ops>(mut decoder: Decoder<O>, steps: &Receiver<Arc<RankStep>>, cores: Option<&Cores>) {
    let _pinned = cores.and_then(Cores::pin);
    while let Ok(step) = steps.recv() {
        let compute = || decoder.compute(&step.batch, &step.kv, &mut |_| {});
        let reason = match catch_unwind(AssertUnwindSafe(compute)) {
            Ok(Ok(())) => continue,
            Ok(Err(error)) => error.to_string(),
            Err(_) => PANICKED.into(),
        };
        decoder.ops().abort(&reason);
        return;
    }
}

impl<O: Ops> Drop for TensorParallel<O> {
    fn drop(&mut self) {
        for RankThread { steps, thread } in self.others.drain(..) {
            drop(steps);
            // After a failure a rank may hang; it is left behind. Else it ends at once, and has nothing to tell.
            if self.failed.is_none() {
                let _ = thread.join();
            }
        }
    }
}
