//! The handle on a write or a read: poll, wait, cancel. Dropping it before it is done cancels it.
//!
//! Whatever ends a transfer has fenced it first: when [`Transfer::cancel`] has returned, or an error been seen, nothing
//! of the transfer reads or writes this agent's memory any more.

use crate::push::Outgoing;
use crate::window_table::{WindowCell, WindowTable};
use crate::{AbortReason, PushError, TransferError};
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// What one transfer may take, and whom it tells.
#[derive(Debug, Clone, Default)]
pub struct TransferOptions {
    /// From its start to its end; `None`: as long as it makes progress (write), the window lifetime (read).
    pub deadline: Option<Duration>,
    /// Delivered to the peer's [`Agent::notifications`](crate::Agent::notifications) when the transfer is done, and only
    /// then. At most [`PAYLOAD_BYTES_MAX`](crate::limits::PAYLOAD_BYTES_MAX) bytes.
    pub notification: Option<Bytes>,
}

/// What a completed transfer did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferReport {
    /// Bytes moved, each counted once.
    pub bytes: u64,
    /// From its start to its end as seen here.
    pub elapsed: Duration,
}

/// How far a transfer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TransferStatus {
    /// Under way.
    InProgress,
    /// Done.
    Done(TransferReport),
    /// Over without success.
    Failed(TransferError),
}

/// The outcome of a read, once there is one.
pub(crate) type Outcome = Option<Result<TransferReport, TransferError>>;

/// A write or read under way.
#[derive(Debug)]
pub struct Transfer {
    kind: Kind,
    started: Instant,
}

#[derive(Debug)]
enum Kind {
    /// A push to its end.
    Write(Arc<Outgoing>),
    /// A task that fills a window.
    Read {
        cell: Arc<WindowCell>,
        table: Arc<WindowTable>,
        task: AbortHandle,
        outcome: watch::Sender<Outcome>,
    },
    /// It never began.
    Failed(TransferError),
}

impl Transfer {
    pub(crate) fn write(push: Arc<Outgoing>) -> Self {
        Self::of(Kind::Write(push))
    }

    pub(crate) fn read(
        cell: Arc<WindowCell>,
        table: Arc<WindowTable>,
        task: AbortHandle,
        outcome: watch::Sender<Outcome>,
    ) -> Self {
        Self::of(Kind::Read {
            cell,
            table,
            task,
            outcome,
        })
    }

    pub(crate) fn failed(error: TransferError) -> Self {
        Self::of(Kind::Failed(error))
    }

    fn of(kind: Kind) -> Self {
        Self {
            kind,
            started: Instant::now(),
        }
    }

    /// How far it is; never waits.
    pub fn poll(&self) -> TransferStatus {
        let result = match &self.kind {
            Kind::Write(push) => push.result().map(|result| self.report(result)),
            Kind::Read { outcome, .. } => outcome.borrow().clone(),
            Kind::Failed(error) => Some(Err(error.clone())),
        };
        match result {
            None => TransferStatus::InProgress,
            Some(Ok(report)) => TransferStatus::Done(report),
            Some(Err(error)) => TransferStatus::Failed(error),
        }
    }

    /// Waits for its end. May be cancelled and called again.
    ///
    /// # Errors
    /// Any [`TransferError`].
    pub async fn wait(&self) -> Result<TransferReport, TransferError> {
        match &self.kind {
            Kind::Write(push) => self.report(push.settled().await),
            Kind::Read { outcome, .. } => {
                let mut watching = outcome.subscribe();
                let ended = watching.wait_for(Option::is_some).await;
                // The sender is this handle's own, so it is not gone.
                ended.map_or(Err(TransferError::Cancelled), |outcome| {
                    outcome.clone().unwrap_or(Err(TransferError::Cancelled))
                })
            }
            Kind::Failed(error) => Err(error.clone()),
        }
    }

    /// Gives it up, unless it is over. When this returns, nothing of it touches this agent's memory any more; the
    /// peer hears of it at once.
    pub fn cancel(&self) {
        match &self.kind {
            Kind::Write(push) => push.fail(PushError::Aborted(AbortReason::Cancelled)),
            Kind::Read {
                cell,
                table,
                task,
                outcome,
            } => {
                outcome.send_if_modified(|outcome| {
                    let open = outcome.is_none();
                    if open {
                        // Under the outcome's lock: the task, which wakes by the closing, finds it decided.
                        table.close(cell);
                        *outcome = Some(Err(TransferError::Cancelled));
                    }
                    open
                });
                task.abort();
            }
            Kind::Failed(_) => {}
        }
    }

    fn report(&self, result: Result<crate::PushReport, PushError>) -> Result<TransferReport, TransferError> {
        match result {
            Ok(report) => Ok(TransferReport {
                bytes: report.bytes,
                elapsed: report.last_ack.saturating_duration_since(self.started),
            }),
            Err(PushError::Aborted(AbortReason::Cancelled)) => Err(TransferError::Cancelled),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.cancel();
    }
}
