//! Flags of `baton mock`.

use super::size;
use anyhow::Context;
use baton_engine::MockProfile;
use baton_worker::WorkerRole;
use clap::Args;
use std::path::{Path, PathBuf};

/// Flags of `baton mock`.
#[derive(Debug, Clone, Args)]
pub struct MockArgs {
    /// Workers that both compute prompts and stream tokens [default: 8, unless --prefill or --decode is given]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=4096), help_heading = "Workers")]
    pub workers: Option<u16>,
    /// Workers that compute prompts
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=4096), help_heading = "Workers")]
    pub prefill: u16,
    /// Workers that stream tokens
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=4096), help_heading = "Workers")]
    pub decode: u16,
    /// The machine each worker pretends to be: instant, h100-llama3-8b, 8xh100-llama3-70b, or a TOML file with such a
    /// profile
    #[arg(long, value_name = "NAME|FILE", default_value = "instant", value_parser = profile, help_heading = "Workers")]
    pub profile: MockProfile,
    /// How many times faster than the profile; 0 takes no time at all
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = speed, help_heading = "Workers")]
    pub speed: f64,
    /// KV memory per worker, in bytes of the machine it pretends to be [default: the profile's]
    #[arg(long, value_name = "SIZE", value_parser = size::parse, help_heading = "Workers")]
    pub kv_mem: Option<u64>,
    /// Most tokens computed in one step
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, help_heading = "Workers")]
    pub batch_tokens_max: usize,
    /// Most sequences in one step
    #[arg(long, value_name = "N", default_value_t = 256, help_heading = "Workers")]
    pub seqs_max: usize,

    /// How the worker that streams a request is chosen
    #[arg(long, value_name = "MODE", default_value = "cache-aware", value_parser = ["cache-aware", "least-loaded", "round-robin", "random"])]
    pub routing: String,

    /// Instead of a model's: a vocabulary in which each word of `baton bench` is one token, no template, and a context of a
    /// million tokens, so that replayed prompts have the lengths recorded
    #[arg(long, conflicts_with = "model")]
    pub word_model: bool,
    /// Directory with config.json, tokenizer and chat template, or a GGUF file; weights are not read [default: the
    /// bundled demo model's]
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub model: Option<PathBuf>,
    /// Name clients use for the model [default: the directory's or file's name]
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
    /// Port of the API on 127.0.0.1; 0 takes a free one and prints it
    #[arg(long, short, value_name = "P", default_value_t = 8080)]
    pub port: u16,
    /// Where certificates, the ledger and logs are kept [default: mock/ in the data directory of `baton up`]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Prompts with more tokens than this are computed by a prefill worker [default: 256]
    #[arg(long, value_name = "TOKENS")]
    pub prefill_threshold: Option<u32>,
}

impl MockArgs {
    /// Names and roles.
    pub fn workers(&self) -> Vec<(String, WorkerRole)> {
        let combined = self
            .workers
            .unwrap_or(if self.prefill + self.decode == 0 { 8 } else { 0 });
        let named = |name: &'static str, role, count: u16| (0..count).map(move |i| (format!("{name}-{i}"), role));
        named("prefill", WorkerRole::Prefill, self.prefill)
            .chain(named("decode", WorkerRole::Decode, self.decode))
            .chain(named("worker", WorkerRole::Combined, combined))
            .collect()
    }
}

/// A preset's name, or a file that holds a profile.
pub fn profile(text: &str) -> Result<MockProfile, String> {
    match MockProfile::named(text) {
        Some(profile) => Ok(profile),
        None if Path::new(text).is_file() => crate::config_file::load(Path::new(text), None)
            .context("it should hold a mock profile")
            .map_err(|error| crate::sentence(&error)),
        None => Err(format!(
            "it is neither a file nor one of {}",
            MockProfile::NAMES.join(", ")
        )),
    }
}

fn speed(text: &str) -> Result<f64, String> {
    let speed = text
        .parse::<f64>()
        .ok()
        .filter(|speed| speed.is_finite() && *speed >= 0.0);
    speed.ok_or_else(|| "give a factor such as 1 or 10, or 0".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_come_by_name_or_file() {
        assert_eq!(profile("h100-llama3-8b"), Ok(MockProfile::H100_LLAMA3_8B));
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), "step_us = 7\nkv_bytes = 1024\nkv_bytes_per_token = 8\n").expect("writable");
        let own = profile(&file.path().to_string_lossy()).expect("a profile");
        assert_eq!((own.step_us, own.token_ns, own.kv_bytes), (7, 0, 1024));
        std::fs::write(file.path(), "step_ms = 7\n").expect("writable");
        assert!(profile(&file.path().to_string_lossy()).is_err());
        assert!(profile("h200").expect_err("unknown").contains("instant"));
        assert!(["-1", "inf", "NaN", "x"].iter().all(|text| speed(text).is_err()));
    }
}
