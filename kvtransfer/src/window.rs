//! The receiver's handle on a window. Dropping it closes the window; the machine behind it is
//! [`crate::window_state`].

use crate::WindowError;
use crate::window_state::Phase;
use crate::window_table::{WindowCell, WindowTable};
use bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// What one window allows beyond its ranges.
#[derive(Debug, Clone, Default)]
pub struct WindowOptions {
    /// Most bytes one lane of a push may write in total, counting repetitions; `None`: twice the bytes of the ranges.
    pub bytes_max: Option<u64>,
    /// How long [`Window::wait`] waits, from now; `None`: the agent's `window_lifetime`.
    pub lifetime: Option<Duration>,
}

/// Leave to write some ranges of a region, once, for whoever learns [`Window::id`].
///
/// The owner of a window must not free or read its blocks before the window is completed, closed or dropped. Once
/// [`Window::close`] or drop has returned, no byte of a late write lands.
#[derive(Debug)]
pub struct Window {
    cell: Arc<WindowCell>,
    table: Arc<WindowTable>,
    deadline: Instant,
    lifetime: Duration,
}

impl Window {
    pub(crate) fn new(cell: Arc<WindowCell>, table: Arc<WindowTable>, lifetime: Duration) -> Self {
        // A lifetime beyond what the clock can express is as good as a century.
        let deadline = Instant::now()
            .checked_add(lifetime)
            .unwrap_or_else(|| Instant::now() + Duration::from_secs(100 * 365 * 86_400));
        Self {
            cell,
            table,
            deadline,
            lifetime,
        }
    }

    /// What a transfer needs to close the window from outside of its task.
    pub(crate) fn parts(&self) -> (Arc<WindowCell>, Arc<WindowTable>) {
        (self.cell.clone(), self.table.clone())
    }

    /// The id to hand to the pushing side. Random, not guessable: knowing it is the permission.
    pub fn id(&self) -> u64 {
        self.cell.id()
    }

    /// Bytes landed so far, each counted once, in steps of whole frames.
    pub fn landed(&self) -> u64 {
        self.cell.landed()
    }

    /// Waits until the window is completed and gives the push's finishing payload. May be called again, and may be
    /// cancelled.
    ///
    /// A sender that fails before its push has named this window cannot be noticed here; the window then waits for its
    /// lifetime. Whoever hears of that failure by other means drops the window.
    ///
    /// # Errors
    /// Any [`WindowError`]; the window is then over and fenced. [`WindowError::Expired`] after the window's lifetime.
    pub async fn wait(&self) -> Result<Bytes, WindowError> {
        let result = self.cell.until(|phase| match phase {
            Phase::Open | Phase::Receiving => None,
            Phase::Completed(payload) => Some(Ok(payload.clone())),
            Phase::Failed(error) => Some(Err(error.clone())),
            Phase::Closed => Some(Err(WindowError::Closed)),
        });
        match tokio::time::timeout_at(self.deadline, result).await {
            Ok(result) => result,
            Err(_) => {
                self.cell.fail(WindowError::Expired {
                    lifetime: self.lifetime,
                });
                // It may have been completed in the same instant; what the machine says counts.
                match self.cell.phase() {
                    Phase::Completed(payload) => Ok(payload),
                    Phase::Failed(error) => Err(error),
                    Phase::Open | Phase::Receiving | Phase::Closed => Err(WindowError::Closed),
                }
            }
        }
    }

    /// Closes the window: after this returns nothing lands any more, and a running push is told. A completed window
    /// stays completed.
    pub fn close(&self) {
        self.table.close(&self.cell);
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.close();
    }
}
