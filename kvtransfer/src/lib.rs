//! Moves KV blocks between processes: registered memory, windows, pushes. Knows nothing of models, blocks or
//! requests; it moves byte ranges and a finishing payload, and says truthfully whether they arrived.
//!
//! # The model
//!
//! A receiver has a [`Region`] and opens a [`Window`] over some of its ranges. It sends the window's id, by other
//! means, to whoever is to fill it. The sender starts a [`Push`] to that window and, while it computes, queues writes on
//! a [`PushWriter`]; [`Push::finish`] sends a last payload and resolves when the receiver has acknowledged everything.
//! [`Window::wait`] resolves at the same moment on the other side.
//!
//! ```text
//! receiver                                        sender
//! agent.open_window(region, ranges) ── id ──►     agent.push(peer, id, region)
//!                                                 writer.write(local, remote)   layer by layer, never blocks
//!   bytes land in the ranges        ◄── QUIC ──     the transport copies and streams
//! window.wait() -> payload          ◄── FINISH ── push.finish(payload)
//!                                   ── DONE ──►     -> PushReport
//! ```
//!
//! # The states
//!
//! A window is *open*, then *receiving*, and ends *completed*, *failed* or *closed*
//! ([`window_state`](crate::Window)). A push is *writing*, then *finishing*, and ends *settled*, well or ill. Ends are
//! final.
//!
//! # The invariants
//!
//! 1. **Bounds.** A push writes only inside the ranges of the window it named, at most the window's byte bound, and a
//!    window takes one push in its life.
//! 2. **Receiver's fence.** Once [`Window::close`] or drop has returned, or a window has failed, no byte lands any more.
//! 3. **Sender's fence.** Once a [`Push`] is dropped, aborted or settled, its region is not read any more.
//! 4. **Truth.** `finish` succeeds only on the receiver's acknowledgement of exactly the bytes sent; `wait` succeeds
//!    only after all of them have landed.
//! 5. **Both sides know.** Giving up on one side ends the other at once, ahead of queued bytes. A dead peer is found by
//!    the closing of its connection or by silence (`keep_alive`, `idle_timeout`).
//! 6. **Bounded.** Queues, windows, connections, frames and waits have limits, in [`limits`].
//! 7. **Compatible or refused.** Two agents exchange version and digest before anything else; a mismatch is an error
//!    with both sides' values, and nothing is retried silently.
//!
//! # The files
//!
//! Sans-IO cores: `ranges`, `wire`, `hello`, `window_state`, `incoming` (receiving), `push_state`, `busy` (sending).
//! Handles and locks: `window`, `window_table`, `push`, `agent`. Memory: `memory`, the only file with `unsafe`.
//! Transports: `transport` (the seam), `quic` and `tcp`, both held by `network`. Tests of both cores together over a fake stream: `pair`.
#![deny(unsafe_code)]

mod agent;
mod busy;
mod error;
mod hello;
mod incoming;
pub mod limits;
#[allow(unsafe_code)]
mod memory;
mod network;
#[cfg(test)]
mod pair;
mod push;
mod push_state;
mod quic;
mod ranges;
mod refusal;
mod stats;
mod tcp;
mod transport;
mod window;
mod window_state;
mod window_table;
mod wire;

pub use agent::{Agent, AgentConfig};
pub use error::{AbortReason, PushError, SetupError, WindowError};
pub use limits::{Network, TransferLimits};
pub use memory::{ALIGN, Region};
pub use push::{Push, PushWriter};
pub use push_state::PushReport;
pub use refusal::Refusal;
pub use stats::TransferStats;
pub use window::{Window, WindowOptions};
