//! What is asked of admission and what it answers, in plain data.

use std::sync::Arc;
use std::time::Duration;

use crate::config::Tenant;

/// Priorities go from `-PRIORITY_MAX` to this; others are taken as the nearest. Enough steps for anybody, and small
/// enough that how often one request can be passed by others has a bound worth stating.
pub const PRIORITY_MAX: i32 = 100;
/// Longest time after which a retry is advised: an estimate further away than this is not worth its name.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Names a request from its offer to its end. Never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What a client wants of the latencies; `None` is no wish.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Targets {
    /// From arrival to the first token.
    pub ttft: Option<Duration>,
    /// Between two tokens.
    pub itl: Option<Duration>,
}

/// A request that wants to be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Whose share it counts against.
    pub tenant: Arc<str>,
    /// How large that share is, as of now: the latest word holds for all that waits.
    pub share: Tenant,
    /// Higher goes first; 0 is the usual. Clamped to ±[`PRIORITY_MAX`].
    pub priority: i32,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, what no worker has in its cache, if that is known.
    pub uncached_tokens: Option<u32>,
    /// Most tokens it may generate.
    pub max_tokens: u32,
    /// Its own targets; the configured ones hold where it has none.
    pub targets: Targets,
}

/// What a request really used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// Prompt tokens that came from a prefix cache.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub completion_tokens: u32,
    /// Whether it ended by itself. One that was cancelled or failed says nothing about how long answers are.
    pub complete: bool,
}

/// Why a request was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Its first token would come, or would have come, too late.
    TtftTarget,
    /// Its tokens would come too slowly.
    ItlTarget,
    /// Its tenant has as many requests waiting as it may, or more than others for whom there was no room.
    TenantShare,
    /// The queue is full, and nobody in it has more than this tenant.
    QueueFull,
    /// It waited as long as it may.
    WaitTimeout,
    /// There are workers, and they have as many requests as they take.
    NoCapacity,
    /// No worker serves the model.
    NoWorker,
}

impl Reason {
    /// The word for programs: header `x-baton-reject-reason` and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::TtftTarget => "ttft_target",
            Self::ItlTarget => "itl_target",
            Self::TenantShare => "tenant_share",
            Self::QueueFull => "queue_full",
            Self::WaitTimeout => "wait_timeout",
            Self::NoCapacity => "no_capacity",
            Self::NoWorker => "no_worker",
        }
    }
}

/// A refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub reason: Reason,
    /// When a retry is likely to fare better. At most [`RETRY_AFTER_MAX`].
    pub retry_after: Duration,
    /// What was expected, where a target was the reason: the time to the first token, or between two.
    pub expected: Option<Duration>,
}
