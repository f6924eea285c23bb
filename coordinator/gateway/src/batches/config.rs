//! Limits of batches.

use serde::Deserialize;

use crate::error::GatewayError;

/// Above what one gateway takes in work.
const CONCURRENCY_MAX: usize = 1024;
/// Batches that one coordinator may run at once: each holds an input chunk and some results in memory.
const AT_ONCE_MAX: usize = 64;

/// `[gateway.batches]`. Every field has a default.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchesConfig {
    /// Lines of one batch that this coordinator has in work at most. How many it really has goes by what the workers take.
    pub concurrency_max: usize,
    /// Batches that this coordinator runs at once; the others wait. At most half of them are of one project.
    pub at_once_max: usize,
    /// Batches of one project that are not over. One more is refused.
    pub project_open_max: u64,
}

impl Default for BatchesConfig {
    fn default() -> Self {
        Self {
            concurrency_max: 64,
            at_once_max: 4,
            project_open_max: 100,
        }
    }
}

impl BatchesConfig {
    pub(crate) fn validate(&self) -> Result<(), GatewayError> {
        let wrong = |name, problem: String| Err(GatewayError::Setting { name, problem });
        if !(1..=CONCURRENCY_MAX).contains(&self.concurrency_max) {
            return wrong(
                "batches.concurrency_max",
                format!("must be from 1 to {CONCURRENCY_MAX}"),
            );
        }
        if self.at_once_max > AT_ONCE_MAX {
            return wrong(
                "batches.at_once_max",
                format!("must be at most {AT_ONCE_MAX}; with 0 this coordinator runs none"),
            );
        }
        Ok(())
    }
}
