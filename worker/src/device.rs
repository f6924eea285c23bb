//! Which device a worker computes on, and an engine on a GPU. Nothing of CUDA is looked for unless the configuration asks.

use crate::server::Startup;
use crate::{WorkerConfig, WorkerError, WorkerRole};
use baton_cuda::{CudaDriver, CudaOps, Driver, KvMemory, OpsOptions, memory};
use baton_engine::{ModelEngine, blocks_for_bytes};
use baton_model::{Decoder, KvCache, ModelConfig, ModelFiles, Stage};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// The CPU. The default for as long as the GPU kernels have not been run on a GPU (`docs/gpu.md`).
    #[default]
    Cpu,
    /// The first GPU if there is one that the kernels run on, else the CPU.
    Auto,
    /// A GPU, numbered as the driver shows them.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => return Ok(Device::Cpu),
            "auto" => return Ok(Device::Auto),
            "cuda" => return Ok(Device::Cuda(0)),
            _ => {}
        }
        let number = text.strip_prefix("cuda:").and_then(|n| n.parse().ok());
        number
            .map(Device::Cuda)
            .ok_or_else(|| format!("{text:?} is not one of auto, cpu, cuda, cuda:N"))
    }
}

impl TryFrom<String> for Device {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Device> for String {
    fn from(device: Device) -> String {
        device.to_string()
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Auto => f.write_str("auto"),
            Device::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

/// Where a GPU's KV blocks are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuKv {
    /// In its own memory.
    #[default]
    Device,
    /// In the host's.
    Host,
}

/// Opens the GPU that the configuration asks for; `None` for the CPU.
pub(crate) fn open(config: &WorkerConfig) -> Result<Option<CudaDriver>, WorkerError> {
    let ordinal = match config.device {
        Device::Cpu => return Ok(None),
        Device::Auto => 0,
        Device::Cuda(ordinal) => ordinal,
    };
    match CudaDriver::open(ordinal) {
        Ok(driver) => {
            check(config)?;
            tracing::info!(gpu = %driver.device().name, "computing on a GPU");
            Ok(Some(driver))
        }
        Err(error) if config.device == Device::Auto => {
            tracing::info!(reason = %error, "computing on the CPU");
            Ok(None)
        }
        Err(error) => Err(WorkerError::Engine(format!(
            "device = {:?}: {error}",
            config.device.to_string()
        ))),
    }
}

/// What does not go together with a GPU yet.
fn check(config: &WorkerConfig) -> Result<(), WorkerError> {
    let refuse = |what: &str| Err(WorkerError::Config(what.into()));
    if config.tensor_parallel != 1 {
        return refuse("tensor_parallel is for the CPU so far; give a GPU worker 1");
    }
    if config.gpu_kv == GpuKv::Host {
        return Ok(());
    }
    if config.role != WorkerRole::Combined {
        return refuse(
            "with gpu_kv = \"device\" a worker hands no KV blocks over yet; give it the role combined, or gpu_kv = \"host\"",
        );
    }
    let tiers = &config.tiers;
    if tiers.host != 0 || tiers.disk != 0 || tiers.object_url.is_some() {
        return refuse(
            "with gpu_kv = \"device\" KV blocks go to no tier yet; leave [tiers] out, or set gpu_kv = \"host\"",
        );
    }
    Ok(())
}

/// Loads a model onto a GPU, and takes memory for KV blocks.
pub(crate) fn load(
    config: &WorkerConfig,
    driver: CudaDriver,
    files: &ModelFiles,
    model: ModelConfig,
    threads: usize,
    startup: &(dyn Fn(Startup) + Send + Sync),
) -> Result<ModelEngine<CudaOps<CudaDriver>>, WorkerError> {
    let geometry = model.kv_geometry(config.block_size);
    let options = OpsOptions {
        quantization: config.quantization,
        rows_max: config.batch_tokens_max.max(config.seqs_max),
        threads,
        graphs: true,
    };
    let progress = |_: Stage<'_>, done, total| startup(Startup::Loading { done, total });
    let ops = CudaOps::new(driver, &model, options)?;
    let mut decoder = Decoder::with_ops(ops, files, model, &progress)?;
    let device_error = |error: baton_cuda::DeviceError| WorkerError::Engine(error.to_string());
    let (blocks, memory) = match config.gpu_kv {
        GpuKv::Device => {
            let free = decoder.ops_mut().driver().free_bytes().map_err(device_error)?;
            let asked = Some(config.gpu_kv_bytes).filter(|bytes| *bytes > 0);
            let blocks = memory::arena_blocks(&geometry, free, asked).map_err(device_error)?;
            (blocks, KvMemory::Device)
        }
        GpuKv::Host => {
            let budget = usize::try_from(config.kv_bytes).unwrap_or(usize::MAX);
            let blocks = blocks_for_bytes(&geometry, budget).map_err(|error| WorkerError::Config(error.to_string()))?;
            (blocks, KvMemory::Host)
        }
    };
    // On the device's memory the region is addresses only: no page of it is ever touched.
    let kv = KvCache::allocate(geometry, blocks)?;
    decoder
        .ops_mut()
        .allocate_arena(geometry, blocks, memory, kv.region())?;
    Ok(ModelEngine::new(decoder, kv))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_nonsense_is_refused() {
        for (text, device) in [
            ("cpu", Device::Cpu),
            ("auto", Device::Auto),
            ("cuda", Device::Cuda(0)),
            ("cuda:3", Device::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string().parse(), Ok(device));
        }
        for bad in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA"] {
            assert!(bad.parse::<Device>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused_in_words() {
        let plain = || {
            let mut config = WorkerConfig::new("w".into(), "m".into(), "m".into(), vec![], "i".into());
            config.device = Device::Cuda(0);
            config
        };
        assert!(check(&plain()).is_ok());
        let prefill = WorkerConfig {
            role: WorkerRole::Prefill,
            ..plain()
        };
        assert!(check(&prefill).expect_err("role").to_string().contains("combined"));
        let host = WorkerConfig {
            gpu_kv: GpuKv::Host,
            ..prefill
        };
        assert!(check(&host).is_ok());
        let ranks = WorkerConfig {
            tensor_parallel: 2,
            ..plain()
        };
        assert!(check(&ranks).is_err());
        let mut tiers = plain();
        tiers.tiers.host = 1;
        assert!(check(&tiers).expect_err("tiers").to_string().contains("tier"));
    }
}
