//! Moves blocks of bytes between processes: registered memory, windows and exports, pushes and reads, notifications.
//! NIXL's verbs over transports of its own. Knows nothing of models or requests; it moves byte ranges and small
//! payloads, and says truthfully whether they arrived.
//!
//! # The model
//!
//! Every transfer is a *push* into a *window*. A receiver opens a [`Window`] over ranges of its [`Memory`] and gives its
//! id, by other means, to whoever is to fill it. There are two ways to use that:
//!
//! ```text
//! push, written while it is computed              write / read, a whole list at once
//! receiver              sender                    reader                 owner
//! open_window ── id ──► push(peer, id, memory)                           export(memory, ranges, lease)
//!                       writer.write(..)          read(peer, grant, ..)  ◄── grant ──┘
//!   bytes land ◄─────── layer by layer              opens a window ── READ ──► checks the lease
//! window.wait()  ◄───── finish(payload)             bytes land ◄────────────── pushes into it
//!   payload      DONE ► PushReport                  heartbeats ──────────────► the lease lives
//! ```
//!
//! * [`Agent::push`] gives a [`Push`] whose [`PushWriter`] compute calls between layers; it never blocks. The report says
//!   how much of the sending was hidden behind compute.
//! * [`Agent::write`] is a push of a [`DescriptorList`]; [`Agent::read`] asks an owner to push. Both give a [`Transfer`]
//!   to poll, wait for, cancel, and give a deadline, and may notify the peer when done.
//! * [`Agent::export`] lends ranges for reading, under a lease that heartbeats renew. When it ends, by its term, the
//!   reader's release or loss, or the owner, the bytes are the owner's again at once.
//! * [`Agent::metadata`] and [`Agent::add_peer`] introduce agents; [`Agent::notify`] and [`Agent::notifications`] carry a
//!   word.
//! * Memory is a [`Region`] of this host, or a [`FileMemory`]. Device memory has its place in [`MemoryKind`].
//!
//! `examples/two_agents.rs` and `examples/read_write_notify.rs` run both ways in one process.
//!
//! # The states
//!
//! ```text
//! window   Open ─ claim ─► Receiving ─ all of FINISH's total landed ─► Completed
//!            └────── fail, close ──┴─ or the grace after the last lane ─► Failed / Closed
//! push     Writing ─ finish ─► Finishing ─ DONE ─► settled well
//!            └─ abort, refusal, deadline, no lane left ─► settled ill
//! slot     Unused ─► Live ─► Finished          (of a push: one of its parallel lanes)
//!                     │ broke: its descriptors go back to the queue
//!                     └─► Waiting (backoff) ─► Live, a generation later ─► ... ─► Dead
//! lease    Held ─ Released / Completed / Expired / ReaderLost / Revoked
//! ```
//!
//! Ends are final.
//!
//! # Lanes
//!
//! A push travels over one or more ordered, reliable byte streams. What has landed is kept as a set of positions, so
//! frames of different lanes come in any order and repetitions change nothing. A lane that breaks while its peer lives
//! costs a retry, not the push: what it carried and was not acknowledged goes over the others, or a new one. Retries are
//! bounded, and end when the receiver's window stops waiting (`lane_grace`). A peer that was restarted does not know the
//! window, and says so at once.
//!
//! # The invariants
//!
//! 1. **Bounds.** A push writes only inside the ranges of the window it named, and a window takes one push in its life.
//! 2. **Receiver's fence.** Once [`Window::close`] or drop has returned, or a window has failed, no byte lands any more:
//!    not of a late lane, nor of a lane that a newer generation replaced. Every landing checks.
//! 3. **Sender's fence.** Once a [`Push`] is dropped, aborted or settled, a [`Transfer`] cancelled, or an [`Export`] over,
//!    nothing that is read from its memory any more can reach a window that completes.
//! 4. **Truth.** `finish` succeeds only on the receiver's acknowledgement of exactly the bytes written, each counted
//!    once; `wait` succeeds only after all of them have landed. An acknowledgement that got lost is given again.
//! 5. **Both sides know.** Giving up on one side ends the other at once, ahead of queued bytes. A dead peer is found by
//!    the closing of its connection or by silence (`keep_alive`, `idle_timeout`), an absent reader by its lease's term.
//! 6. **Integrity.** Transports that do not authenticate carry hashes, and a damaged frame lands nothing.
//! 7. **Bounded.** Queues, windows, exports, lanes, retries, frames and waits have limits, in [`limits`].
//! 8. **Compatible or refused.** Two agents exchange version and digest before anything else; a mismatch is an error
//!    with both sides' values.
//!
//! `sim` checks 1 to 6 over thousands of seeded faulty runs in virtual time.
//!
//! # The files
//!
//! Sans-IO cores: `ranges`, `coverage`, `wire`, `control`, `hello`, `window_state`, `incoming` (receiving), `push_state`,
//! `busy` (sending), `lease` (lending). Handles and locks: `window`, `window_table`, `push`, `transfer`, `export`, `hold`,
//! `inbox`, `agent`, `verbs`. Memory: `memory`, `copy` and `shared_memory/mapping` (the
//! files with `unsafe`, beside calls into a C library in `nixl`), and `storage`. Transports: `transport` (the seam and
//! the choice), `shared_memory` and `nixl` over what they share in `pull`, `network` with `quic` and `tcp`. Tests of the
//! cores together: `pair`, `sim`.
#![deny(missing_docs, unsafe_code)]

mod agent;
mod busy;
mod control;
#[allow(unsafe_code)]
mod copy;
mod coverage;
mod descriptors;
mod error;
mod export;
mod hello;
mod hold;
mod inbox;
mod incoming;
mod lease;
pub mod limits;
#[allow(unsafe_code)]
mod memory;
mod metadata;
mod network;
#[cfg(target_os = "linux")]
mod nixl;
#[cfg(not(target_os = "linux"))]
#[path = "no_nixl.rs"]
mod nixl;
#[cfg(test)]
mod pair;
#[cfg(target_os = "linux")]
mod pull;
#[cfg(not(target_os = "linux"))]
#[path = "no_pull.rs"]
mod pull;
mod push;
mod push_state;
mod quic;
mod ranges;
mod refusal;
#[cfg(target_os = "linux")]
mod shared_memory;
#[cfg(not(target_os = "linux"))]
#[path = "no_shared_memory.rs"]
mod shared_memory;
#[cfg(test)]
mod sim;
mod stats;
mod storage;
mod tcp;
mod transfer;
mod transport;
mod verbs;
mod window;
mod window_state;
mod window_table;
mod wire;

pub use agent::{Agent, AgentConfig, PushOptions};
pub use descriptors::DescriptorList;
pub use error::{AbortReason, PushError, SetupError, TransferError, WindowError};
pub use export::{Export, ExportGrant};
pub use hold::Hold;
pub use inbox::Notification;
pub use lease::{LeaseEnd, LeaseOptions};
pub use limits::TransferLimits;
pub use memory::{ALIGN, Region};
pub use metadata::{AgentMetadata, MemoryDescription, Peer};
pub use push::{Push, PushWriter};
pub use push_state::PushReport;
pub use ranges::Descriptor;
pub use refusal::Refusal;
pub use stats::TransferStats;
pub use storage::{FileMemory, Memory, MemoryKind};
pub use transfer::{Transfer, TransferOptions, TransferReport, TransferStatus};
pub use transport::{TransportKind, TransportOptions};
pub use verbs::Registered;
pub use window::{Window, WindowOptions};
