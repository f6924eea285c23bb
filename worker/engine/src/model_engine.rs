//! The engine with a real model: a decoder (or its ranks), its KV arena, and the sampler. Adds nothing to either; it translates a step
//! into a forward pass and logits into tokens.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_kernels::Pool;
use baton_kvtransfer::Region;
use baton_model::{
    CpuOps, ForwardBatch, KvCache, KvGeometry, LoadOptions, ModelConfig, ModelError, ModelFiles, Ops, Progress,
    SeqSpan, TensorParallel,
};

use crate::error::EngineError;
use crate::sampling::Sampler;
use crate::step::{Engine, StepBatch, StepSeq};

/// See the module. CPU unless another device is named.
pub struct ModelEngine<O: Ops = CpuOps> {
    model: TensorParallel<O>,
    kv: KvCache,
    /// Rows of a step are sampled on the threads of the forward pass; a sampler each.
    samplers: Vec<Mutex<Sampler>>,
    pool: Arc<Pool>,
}

impl ModelEngine<CpuOps> {
    /// Loads a model for the CPU and reserves a KV pool of `total_blocks` blocks of `block_size` tokens (how many a byte
    /// budget holds: [`blocks_for_bytes`](crate::blocks_for_bytes)).
    ///
    /// # Errors
    /// Whatever the model's files or the machine's memory refuse, in a sentence for the operator.
    pub fn load(
        files: &ModelFiles,
        config: ModelConfig,
        block_size: usize,
        total_blocks: u32,
        options: &LoadOptions,
        progress: &dyn Progress,
    ) -> Result<Self, ModelError> {
        // The pool first: it fails at once where memory is short, loading takes a while.
        let kv = KvCache::allocate(config.kv_geometry(block_size), total_blocks)?;
        Ok(Self::new(TensorParallel::load(files, config, options, progress)?, kv))
    }
}

impl<O: Ops> ModelEngine<O> {
    /// An engine of a model (a decoder, or ranks) and an arena of the same geometry.
    pub fn new(model: impl Into<TensorParallel<O>>, kv: KvCache) -> Self {
        let model = model.into();
        let pool = model.pool().unwrap_or_else(|| Arc::new(Pool::new(1)));
        ModelEngine {
            model,
            kv,
            samplers: (0..pool.threads()).map(|_| Mutex::default()).collect(),
            pool,
        }
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }
}

impl<O: Ops> Engine for ModelEngine<O> {
    fn geometry(&self) -> KvGeometry {
        self.kv.geometry()
    }

    fn region(&self) -> Arc<Region> {
        self.kv.region().clone()
    }

    fn blocks_move(&self) -> bool {
        self.model.ops().kv_in_region()
    }

    fn total_blocks(&self) -> u32 {
        self.kv.blocks()
    }

    fn context_length(&self) -> usize {
        self.model.config().context_length
    }

    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn step(&mut self, batch: &StepBatch, layer_done: &mut dyn FnMut(usize)) -> Result<Vec<Option<u32>>, EngineError> {
        let forward = ForwardBatch {
            tokens: batch.seqs.iter().flat_map(|span| span.tokens.iter().copied()).collect(),
            seqs: batch.seqs.iter().map(seq_span).collect(),
        };
        let logits = self
            .model
            .forward(&forward, &self.kv, layer_done)
            .map_err(engine_error)?;
        let wanted = batch.seqs.iter().filter(|span| span.sample.is_some()).count();
        if logits.rows() != wanted {
            return Err(EngineError::Model(format!(
                "{} rows of logits for {wanted} spans",
                logits.rows()
            )));
        }
        let spans: Vec<&StepSeq> = batch.seqs.iter().filter(|span| span.sample.is_some()).collect();
        let tokens: Vec<Mutex<Option<u32>>> = spans.iter().map(|_| Mutex::default()).collect();
        let logits = &logits;
        self.pool.run(spans.len(), &|worker, row| {
            if let Some(params) = &spans[row].sample {
                let mut sampler = lock(&self.samplers[worker]);
                *lock(&tokens[row]) = sampler.sample_shaped(
                    logits.row(row),
                    params,
                    spans[row].end_pos() as u64,
                    spans[row].shaping.as_deref(),
                );
            }
        });
        let mut tokens = tokens.into_iter();
        let sampled = |span: &StepSeq| {
            span.sample?;
            let token = tokens.next()?.into_inner();
            token.unwrap_or_else(PoisonError::into_inner)
        };
        Ok(batch.seqs.iter().map(sampled).collect())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Neither a sampler's scratch nor a token is ever left half-done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn seq_span(span: &StepSeq) -> SeqSpan {
    SeqSpan {
        start_pos: span.start_pos,
        len: span.tokens.len(),
        blocks: span.blocks.clone(),
        logits: span.sample.is_some(),
    }
}

fn engine_error(error: ModelError) -> EngineError {
    match error {
        ModelError::Batch(what) => EngineError::InvalidBatch(what),
        lost @ (ModelError::Rank { .. } | ModelError::Device(_)) => EngineError::Lost(lost.to_string()),
        other => EngineError::Model(other.to_string()),
    }
}
