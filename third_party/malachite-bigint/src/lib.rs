//! Stands in for the crate `malachite-bigint`, whose interface is that of `num-bigint` over an LGPL library. It comes with
//! `tool-parser` by way of `rustpython-parser`, which wants big integers for Python's literals and takes either crate, but
//! whose default features name this one. Replaced by `[patch.crates-io]`, so that nothing under the LGPL is linked.
#![forbid(unsafe_code)]

pub use num_bigint::{BigInt, BigUint, ParseBigIntError, Sign, ToBigInt, ToBigUint, TryFromBigIntError};
