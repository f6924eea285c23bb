//! Admission: who may send work to the workers, and when. A state machine without IO, clocks or threads, one per model;
//! the coordinator drives it, tests and simulations too.
//!
//! Workers queue by age and cannot take a request back, so whatever waits, waits here, where priorities and shares still
//! count. What is hopeless is refused at once, with a word for programs and a time after which a retry makes sense.
//!
//! Deliberately not here: which worker (router), what the client is told (gateway), and retries of a request that was
//! admitted once (a running request never stands in this queue again).
//!
//! See [`Admission`] for states, rules and invariants, and `docs/admission.md` for the reasons.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod admission;
mod ask;
mod config;
mod estimate;
mod fair_queue;
mod outlook;
mod own_load;

pub use admission::{Admission, Decision, FirstToken, Outcome};
pub use ask::{Ask, PRIORITY_MAX, RETRY_AFTER_MAX, Reason, Refusal, Targets, Ticket, Used};
pub use config::{AdmissionConfig, ConfigError, Tenant};
pub use outlook::{Fleet, Outlook, Prospect, WorkerLoad, WorkerRole};
pub use own_load::OwnLoad;
