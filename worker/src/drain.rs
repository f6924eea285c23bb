//! Leaving in order: take nothing new, let what is here end or be moved, then go.
//!
//! ```text
//!            a coordinator's order, with its deadline                 nothing left, or the deadline
//! serving ─────────────────────────────────────────────▶ draining ──────────────────────────────────▶ leaving: goodbye, exit 0
//!            a signal to stop: [`STOP_DEADLINE`]
//! ```
//!
//! The heartbeat says `draining`, so that every coordinator moves its streams off; a refused request goes elsewhere by itself.
//! Pushes under way are finished: a prefill worker's callers wait for them. What nobody takes stays until it has ended, or
//! the deadline has come. The engine refuses (`engine_loop`); here is only when to leave.

use crate::engine_thread::EngineHandle;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Time after a signal to stop. Below what supervisors grant before they kill: `baton up` four seconds, others ten and more.
const STOP_DEADLINE: Duration = Duration::from_secs(3);
/// Pause before the goodbye, in which the last tokens leave the process.
const LINGER: Duration = Duration::from_millis(50);

/// Where drain orders go; one is enough, further ones change nothing.
pub(crate) type DrainOrders = mpsc::Sender<Duration>;

/// Waits for an order or a signal, drains, and then cancels `leave`.
pub(crate) async fn run(
    engine: &EngineHandle,
    mut orders: mpsc::Receiver<Duration>,
    stop: &CancellationToken,
    leave: &CancellationToken,
) {
    let deadline = tokio::select! {
        () = stop.cancelled() => STOP_DEADLINE,
        Some(deadline) = orders.recv() => deadline,
    };
    engine.drain();
    tracing::info!(?deadline, "draining: nothing new is taken");
    // A signal shortens an order.
    let stopped = async {
        stop.cancelled().await;
        tokio::time::sleep(STOP_DEADLINE).await;
    };
    tokio::select! {
        () = engine.at_rest() => tokio::time::sleep(LINGER).await,
        () = tokio::time::sleep(deadline) => tracing::warn!("the deadline for draining has come; what is left is given up"),
        () = stopped => tracing::warn!("told to stop while draining; what is left is given up"),
    }
    leave.cancel();
}
