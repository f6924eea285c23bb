//! The seam to the replicated state: what was applied here, and a way to propose commands. The coordinator implements it
//! over Raft, tests over tables in memory.

use std::future::Future;
use std::pin::Pin;

use baton_proto::state::{Checkpoint, Command, command::Kind};
use baton_state::{Applied, Refused, Tables, TablesError};

use crate::clock::unix_ms;

/// One consistent version of the applied state.
pub type TablesBox = Box<dyn Tables + Send>;

/// What a proposal comes to.
pub type Proposed<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Why the state could not be read or changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The command was judged, and changed nothing.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The state cannot be read.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// It is not known whether the command took effect, or it could not be proposed: no leader, overload, shutdown.
    #[error("{0}")]
    Unavailable(String),
}

/// The replicated state as one member has it.
pub trait AccountStore: Send + Sync + 'static {
    /// The applied state of this member. Reads of a few entries are quick; longer ones belong on a blocking thread.
    fn tables(&self) -> Result<TablesBox, StoreError>;

    /// Log index of the last applied command: while it stays, so does the state.
    fn applied_index(&self) -> u64;

    /// This member's id in the group.
    fn member_id(&self) -> u64;

    /// Proposes a command; on `Ok` it is durable and applied here. The implementer bounds the time.
    fn propose(&self, command: Command) -> Proposed<'_, Applied>;

    /// Closes the rows since the last checkpoint and signs them. Nothing if there are none.
    fn seal(&self, actor: &str) -> Proposed<'_, Option<Checkpoint>>;
}

/// A command of `actor`, told now.
pub fn command(actor: &str, kind: Kind) -> Command {
    Command {
        at_unix_ms: unix_ms(),
        actor: actor.to_owned(),
        kind: Some(kind),
    }
}
