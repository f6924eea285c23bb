//! From a model directory to a worker that serves it.

use crate::mock::{self, EngineKind};
use crate::server::{Startup, serve};
use crate::{WorkerConfig, WorkerError, device, tiers};
use baton_engine::{Engine, ModelEngine, blocks_for_bytes};
use baton_model::{LoadOptions, MemoryNeed, ModelConfig, ModelFiles, Stage, available_memory};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Loads the model, or makes the mock, and serves until `shutdown`.
pub async fn run(
    config: WorkerConfig,
    startup: Arc<dyn Fn(Startup) + Send + Sync>,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let loading = {
        let (config, startup) = (config.clone(), startup.clone());
        tokio::task::spawn_blocking(move || -> Result<(Box<dyn Engine>, _), WorkerError> {
            Ok(match config.engine {
                EngineKind::Model => load(&config, &*startup)?,
                EngineKind::Mock => {
                    let (engine, digest) = mock::load(&config)?;
                    (Box::new(engine), digest)
                }
            })
        })
    };
    let (engine, model_digest) = loading
        .await
        .map_err(|error| WorkerError::Engine(error.to_string()))??;
    serve(config, engine, model_digest, startup, shutdown).await
}

fn load(
    config: &WorkerConfig,
    startup: &(dyn Fn(Startup) + Send + Sync),
) -> Result<(Box<dyn Engine>, [u8; 32]), WorkerError> {
    let model = ModelConfig::from_dir(&config.model_path)?;
    let files = ModelFiles::open(&config.model_path)?;
    let geometry = model.kv_geometry(config.block_size);
    if !geometry.is_sane() {
        return Err(WorkerError::Config(format!(
            "block_size is {}; 16 is usual, 1 to 8192 are taken",
            config.block_size
        )));
    }
    let gpu = device::open(config)?;
    if let Some(available) = available_memory().filter(|_| gpu.is_none()) {
        let (tokens, rows) = (config.batch_tokens_max, config.seqs_max);
        let weights = files.packed_bytes(&model, config.quantization);
        let kv_bytes = config.kv_bytes.saturating_add(tiers::memory_bytes_max(&config.tiers));
        MemoryNeed::estimate(&model, weights, kv_bytes, tokens, rows)
            .on_ranks(&model, config.tensor_parallel, tokens, rows)
            .check(available)?;
    }
    let progress = |_: Stage<'_>, done, total| startup(Startup::Loading { done, total });
    let digest = files.digest(&model, config.quantization, &progress);
    let threads = match config.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    if let Some(driver) = gpu {
        let engine = device::load(config, driver, &files, model, threads, startup)?;
        return Ok((Box::new(engine), digest));
    }
    let options = LoadOptions {
        threads,
        spin: !config.cores_shared,
        quantization: config.quantization,
        tensor_parallel: config.tensor_parallel,
    };
    let budget = usize::try_from(config.kv_bytes).unwrap_or(usize::MAX);
    let total_blocks = blocks_for_bytes(&geometry, budget).map_err(|error| WorkerError::Config(error.to_string()))?;
    let engine = ModelEngine::load(&files, model, config.block_size, total_blocks, &options, &progress)?;
    Ok((Box::new(engine), digest))
}
