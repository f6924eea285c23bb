//! The cache-aware router: which worker holds which KV block, and where a request goes. Pure state machines: no IO, no
//! clock, no randomness; equal inputs give equal choices, so a simulation routes exactly as production does.
//!
//! ```text
//! tokens ─▶ names (chained, salted; known prefixes from a cache)
//! block events ─▶ feed ─▶ index ──┐ look_up(names) ─▶ Prefixes ─▶ Candidate::prefix ─┐
//! placements ──▶ recent ──────────┘                                                  ▼
//! measured first tokens ─▶ calibration ───────────────────────────────▶ choose(candidates, ask) ─▶ Choice
//! ```
//!
//! # How to use it
//!
//! 1. [`Router::join`] when a worker registers gives a [`Seat`], its small number; [`Router::leave`] when it is gone. A
//!    worker that registers anew gets a new seat: nothing of its earlier life is found under it.
//! 2. [`Router::apply`] every message of block events; ask the worker for a resync where it answers
//!    [`Verdict::Resync`]. Call [`Router::sweep`] now and then.
//! 3. For a request: [`Router::look_up`] the names of its prompt's blocks (first eight bytes of each chained hash, by
//!    [`Namer::names`]), fill [`Candidate::prefix`] from [`Prefixes::of`], and [`Router::choose`]. [`Estimate::ttft_s`] of the answer is the
//!    predicted time to the first token; [`Router::predicted_ttft`] gives only that, for admission.
//! 4. [`Router::placed`] what was sent; [`Router::first_token`] when its first token came.
//!
//! The cost model is in [`cost`], the rules of the choice in [`mod@choose`], ways to choose without them in [`mode`], what of a worker's events is believed in
//! [`feed`], and the index in [`index`]. Figures and their derivation are in `docs/routing.md`.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod calibration;
pub mod choose;
pub mod cost;
pub mod feed;
pub mod index;
pub mod mode;
pub mod names;
mod owners;
mod recent;
pub mod router;
mod table;

pub use choose::Choice;
pub use cost::{Ask, Candidate, Estimate, Policy, Prefix, Rates, Role};
pub use feed::{BlockUpdate, Verdict};
pub use index::{Index, IndexStats, Matches, Slot, Tier};
pub use mode::Mode;
pub use names::Namer;
pub use router::{Prefixes, Router, RouterStats, Seat};
