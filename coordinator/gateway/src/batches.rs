//! `/v1/batches`: the requests of an uploaded file, run in the cluster's idle capacity at the price of the batch tier. Shapes
//! are OpenAI's.
//!
//! ```text
//!  routes ─▶ the replicated state ◀─ keeper: claims what nobody runs ─▶ run: validate, then lines ─▶ line: the gateway's own routes
//!                    ▲                                                     │ results, in steps
//!                    ╰──────────── StartBatch, AdvanceBatch, … ◀───────────╯
//! ```
//!
//! Which steps a batch may take is the state machine's business (`baton_state`). What keeps a line from being run or billed
//! twice: results count when the step that tells them is committed, under a claim that only one member has; and a line is run
//! under an idempotency key made of the batch and its number, so that one whose result was lost with its member is computed
//! again and settled as the row that stands. `docs/batches.md` has it all.

mod config;
mod input;
mod keeper;
mod line;
mod output;
mod routes;
mod run;
mod throttle;

pub use config::BatchesConfig;
pub(crate) use keeper::{Batches, start};
pub(crate) use line::Internal;
pub(crate) use routes::routes;

/// What the lines of a batch may call. Each is a route that answers whole, with the usage fields of chat completions.
pub(crate) const ENDPOINTS: &[&str] = &["/v1/chat/completions", "/v1/completions"];
