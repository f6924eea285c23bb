//! How the counts of a usage record can contradict each other.

/// What of a usage record contradicts what.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// More delivered than sampled.
    #[error("{delivered} tokens delivered of {sampled} sampled")]
    DeliveredBeyondSampled {
        /// By the gateway.
        delivered: u32,
        /// By the workers.
        sampled: u32,
    },
    /// More of the prompt cached than it has.
    #[error("{cached} cached tokens of a prompt of {prompt}")]
    CachedBeyondPrompt {
        /// Cached tokens.
        cached: u32,
        /// Prompt tokens.
        prompt: u32,
    },
    /// A part of the completion is more than the completion.
    #[error("{part} {what} tokens of a completion of {completion}")]
    PartBeyondCompletion {
        /// Which part.
        what: &'static str,
        /// Its tokens.
        part: u32,
        /// Completion tokens.
        completion: u32,
    },
    /// The placements brought more than was sampled.
    #[error("{attempts} tokens of all attempts, and {sampled} sampled")]
    AttemptsBeyondSampled {
        /// Sum over the attempts.
        attempts: u64,
        /// By the workers.
        sampled: u32,
    },
    /// More placements are listed than counted.
    #[error("{listed} attempts are listed and {counted} counted")]
    AttemptsBeyondCount {
        /// In the list.
        listed: u64,
        /// Counted.
        counted: u32,
    },
    /// A status that this release does not know.
    #[error("status {0} is unknown")]
    UnknownStatus(i32),
}
