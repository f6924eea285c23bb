//! Limits of stored responses.

use serde::Deserialize;

use crate::error::GatewayError;

/// Above this a stored response would be held in memory too often at once: a whole one is read and written in one piece.
const RESPONSE_BYTES_MAX: u64 = 64 << 20;
/// Ten years.
const KEPT_S_MAX: u64 = 315_360_000;
/// A day: how long a run may occupy a place among the requests in work.
const BACKGROUND_S_MAX: u64 = 86_400;

/// `[gateway.responses]`. Every field has a default.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ResponsesConfig {
    /// Largest stored response in bytes: its answer and the whole conversation before it. A larger one is answered, and not
    /// stored.
    pub response_bytes_max: u64,
    /// Stored responses of one project, or of one configured tenant. One more takes the place of the oldest.
    pub project_responses_max: u64,
    /// Bytes in stored responses of one project. More take the place of the oldest. What all projects store counts towards
    /// `files.bytes_max` too.
    pub project_bytes_max: u64,
    /// How long a response is kept, in seconds; OpenAI's 30 days.
    pub kept_s: u64,
    /// How long one in the background may take, in seconds, waiting included.
    pub background_s_max: u64,
}

impl Default for ResponsesConfig {
    fn default() -> Self {
        Self {
            response_bytes_max: 16 << 20,
            project_responses_max: 100_000,
            project_bytes_max: 2 << 30,
            kept_s: 30 * 86_400,
            background_s_max: 3_600,
        }
    }
}

impl ResponsesConfig {
    pub(crate) fn validate(&self) -> Result<(), GatewayError> {
        for (name, value, max) in [
            (
                "responses.response_bytes_max",
                self.response_bytes_max,
                RESPONSE_BYTES_MAX,
            ),
            ("responses.kept_s", self.kept_s, KEPT_S_MAX),
            ("responses.background_s_max", self.background_s_max, BACKGROUND_S_MAX),
        ] {
            if !(1..=max).contains(&value) {
                return Err(GatewayError::Setting {
                    name,
                    problem: format!("must be from 1 to {max}"),
                });
            }
        }
        Ok(())
    }
}
