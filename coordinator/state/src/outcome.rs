//! What a command is answered with.

/// The answer to a command that was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// The worker is registered under this epoch. Epochs come from one counter of the group, so they grow for each
    /// worker id, and a later registration of anything has a higher one.
    Registered {
        /// The new epoch.
        epoch: u64,
    },
    /// The worker is gone, or was not there under that epoch.
    Removed {
        /// False if the epoch was not the current one: nothing changed.
        removed: bool,
    },
    /// An admin change is in force.
    Stands {
        /// False if it was before.
        changed: bool,
    },
    /// The record is settled, now or before with the same contents.
    Settled {
        /// Its number: 1, 2, 3, ... without gaps.
        sequence: u64,
    },
}

/// Why a command was refused. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It makes no sense.
    #[error("the command is invalid: {0}")]
    Invalid(String),
    /// Another record was settled under the same request id.
    #[error("request {request_id} is already settled, with other contents, as record {sequence}")]
    UsageConflict {
        /// The request id.
        request_id: String,
        /// Number of the record that stands.
        sequence: u64,
    },
}

impl Refused {
    pub(crate) fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid(reason.into())
    }
}

/// The answer to a command.
pub type Outcome = Result<Applied, Refused>;

/// The outcome as it enters the hash, so that members that judged a command differently find out.
pub(crate) fn code(outcome: &Outcome) -> [u8; 9] {
    let (tag, value) = match outcome {
        Ok(Applied::Registered { epoch }) => (1, *epoch),
        Ok(Applied::Removed { removed }) => (2, u64::from(*removed)),
        Ok(Applied::Settled { sequence }) => (3, *sequence),
        Err(Refused::UsageConflict { sequence, .. }) => (4, *sequence),
        Err(Refused::Invalid(_)) => (5, 0),
        Ok(Applied::Stands { changed }) => (6, u64::from(*changed)),
    };
    let mut code = [0; 9];
    code[0] = tag;
    code[1..].copy_from_slice(&value.to_le_bytes());
    code
}
