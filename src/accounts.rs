//! `baton keys`, `projects`, `budgets`, `usage`, `costs`, `audit`: each asks a coordinator's API and prints the answer, as a
//! table or as it came.

mod admin;
mod remote;
mod reports;

pub use admin::{audit, budgets, deployments, keys, projects};
pub use remote::{Api, cell, escape, run, table};
pub use reports::{costs, usage};
