//! What the tests stand on: a ledger, and a PostgreSQL of their own.

pub mod ledger;
pub mod server;
