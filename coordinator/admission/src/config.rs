//! Settings of admission: bounds of its queue, how much work a worker may have before its first token, targets and shares.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;

use crate::ask::{PRIORITY_MAX, Targets};

/// Section `[admission]` of a coordinator's file. Every field has a default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdmissionConfig {
    /// Requests of one model that wait in this coordinator; one more is refused, or takes the place of one of a tenant that
    /// has more.
    pub queue_max: usize,
    /// Of these, requests of one tenant.
    pub queue_per_tenant_max: usize,
    /// Longest wait, in milliseconds; then the request is refused.
    pub wait_ms_max: u64,
    /// Requests on one worker that wait for their first token. More would only wait in the worker's queue, where no share
    /// counts; much fewer would leave its steps half empty.
    pub worker_unstarted_max: u32,
    /// Prompt tokens on one worker, as time at its measured speed, in milliseconds, above which it gets no further prompt.
    pub worker_prefill_ms_max: u64,
    /// Wait that counts as much as one step of priority, in milliseconds: how a low priority comes to its turn.
    pub aging_ms: u64,
    /// Target of requests without one: time to the first token, in milliseconds.
    pub ttft_target_ms: Option<u64>,
    /// Target of requests without one: time between two tokens, in milliseconds.
    pub itl_target_ms: Option<u64>,
    /// Tokens that an answer is expected to have, until a tenant's own answers tell.
    pub output_tokens_expected: u32,
    /// What a generated token counts, in prompt tokens.
    pub output_token_cost: u32,
}

impl Default for AdmissionConfig {
    fn default() -> Self {
        Self {
            queue_max: 1024,
            queue_per_tenant_max: 512,
            wait_ms_max: 30_000,
            worker_unstarted_max: 32,
            worker_prefill_ms_max: 2_000,
            aging_ms: 2_000,
            ttft_target_ms: None,
            itl_target_ms: None,
            output_tokens_expected: 256,
            output_token_cost: 2,
        }
    }
}

/// A setting that cannot work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    name: &'static str,
    max: u64,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "admission.{} must be from 1 to {}", self.name, self.max)
    }
}

impl std::error::Error for ConfigError {}

impl AdmissionConfig {
    /// Says which setting makes no sense, if one does. The upper ends keep times and memory in range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let day_ms = 86_400_000;
        let checks = [
            ("queue_max", self.queue_max as u64, 1 << 20),
            ("queue_per_tenant_max", self.queue_per_tenant_max as u64, 1 << 20),
            ("wait_ms_max", self.wait_ms_max, day_ms),
            ("worker_unstarted_max", self.worker_unstarted_max.into(), 1 << 20),
            ("worker_prefill_ms_max", self.worker_prefill_ms_max, day_ms),
            ("aging_ms", self.aging_ms, day_ms),
            ("ttft_target_ms", self.ttft_target_ms.unwrap_or(1), day_ms),
            ("itl_target_ms", self.itl_target_ms.unwrap_or(1), day_ms),
            ("output_tokens_expected", self.output_tokens_expected.into(), 1 << 20),
            ("output_token_cost", self.output_token_cost.into(), 1000),
        ];
        match checks.into_iter().find(|(_, value, max)| !(1..=*max).contains(value)) {
            Some((name, _, max)) => Err(ConfigError { name, max }),
            None => Ok(()),
        }
    }

    /// A request's targets: its own, else the configured ones.
    pub(crate) fn targets(&self, own: Targets) -> Targets {
        Targets {
            ttft: own.ttft.or(self.ttft_target_ms.map(Duration::from_millis)),
            itl: own.itl.or(self.itl_target_ms.map(Duration::from_millis)),
        }
    }

    pub(crate) fn aging(&self) -> Duration {
        Duration::from_millis(self.aging_ms.max(1))
    }

    pub(crate) fn wait_max(&self) -> Duration {
        Duration::from_millis(self.wait_ms_max)
    }
}

/// What a tenant's share is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tenant {
    /// Its share against that of others where both wait; 1 is the usual.
    pub weight: u32,
    /// The highest priority with which its requests compete with those of others. Among its own, any counts.
    pub priority_max: i32,
}

impl Default for Tenant {
    fn default() -> Self {
        Self {
            weight: 1,
            priority_max: 0,
        }
    }
}

impl Tenant {
    /// Within what counters and classes can hold.
    pub(crate) fn bounded(self) -> Self {
        Self {
            weight: self.weight.max(1),
            priority_max: self.priority_max.clamp(-PRIORITY_MAX, PRIORITY_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_refused_by_name() {
        AdmissionConfig::default().validate().unwrap();
        let config = AdmissionConfig {
            aging_ms: 0,
            ..AdmissionConfig::default()
        };
        assert!(
            config
                .validate()
                .unwrap_err()
                .to_string()
                .contains("admission.aging_ms")
        );
        let config = AdmissionConfig {
            ttft_target_ms: Some(0),
            ..AdmissionConfig::default()
        };
        assert!(config.validate().unwrap_err().to_string().contains("ttft_target_ms"));
    }
}
