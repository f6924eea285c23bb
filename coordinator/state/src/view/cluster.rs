//! The cluster: hash, time, workers, members, deployments.

use super::{decode, message, number, page_after};
use crate::keys;
use crate::tables::{Tables, TablesError};
use baton_proto::state::{Deployment, Member, WorkerRecord};
use std::ops::ControlFlow;

/// The hash chained over every applied command, its outcome and what it wrote: members at one index have the same. Zero at
/// the start.
pub fn hash(tables: &(impl Tables + ?Sized)) -> Result<[u8; 32], TablesError> {
    match tables.get(keys::HASH)? {
        None => Ok([0; 32]),
        Some(hash) => hash
            .try_into()
            .map_err(|_| TablesError::Corrupt("the hash is not 32 bytes".into())),
    }
}

/// Which group's state it is: empty for one that was founded, else what its restoration chose.
pub fn group(tables: &(impl Tables + ?Sized)) -> Result<Vec<u8>, TablesError> {
    Ok(tables.get(keys::GROUP)?.unwrap_or_default())
}

/// Replicated time in milliseconds of Unix time: the greatest that any command has told.
pub fn time(tables: &(impl Tables + ?Sized)) -> Result<u64, TablesError> {
    let value = tables.get(keys::TIME)?;
    value.map_or(Ok(0), |value| number(&value, "the time"))
}

/// The last epoch given, 0 at the start.
pub fn last_epoch(tables: &(impl Tables + ?Sized)) -> Result<u64, TablesError> {
    let value = tables.get(keys::LAST_EPOCH)?;
    value.map_or(Ok(0), |value| number(&value, "the last epoch"))
}

/// A registered worker.
pub fn worker(tables: &(impl Tables + ?Sized), id: &str) -> Result<Option<WorkerRecord>, TablesError> {
    message(tables, &keys::named(keys::WORKERS, id), "a worker record")
}

/// The registered workers, by id: all of them, as the registry needs them. They are as many as machines, and each is
/// authenticated.
pub fn workers(tables: &(impl Tables + ?Sized)) -> Result<Vec<WorkerRecord>, TablesError> {
    all(tables, keys::WORKERS, "a worker record")
}

/// A page of the registered workers, by id.
pub fn workers_after(
    tables: &(impl Tables + ?Sized),
    after: &str,
    limit: usize,
) -> Result<Vec<WorkerRecord>, TablesError> {
    page_after(tables, keys::WORKERS, after, limit, "a worker record")
}

/// A coordinator.
pub fn member(tables: &(impl Tables + ?Sized), id: u64) -> Result<Option<Member>, TablesError> {
    message(tables, &keys::numbered(keys::MEMBERS, id), "a member")
}

/// The coordinators, by id: at most [`MEMBERS_MAX`](crate::bounds::MEMBERS_MAX).
pub fn members(tables: &(impl Tables + ?Sized)) -> Result<Vec<Member>, TablesError> {
    all(tables, keys::MEMBERS, "a member")
}

/// What is served under a model's name.
pub fn deployment(tables: &(impl Tables + ?Sized), model: &str) -> Result<Option<Deployment>, TablesError> {
    message(tables, &keys::named(keys::DEPLOYMENTS, model), "a deployment")
}

/// A page of the deployments, by model.
pub fn deployments_after(
    tables: &(impl Tables + ?Sized),
    after: &str,
    limit: usize,
) -> Result<Vec<Deployment>, TablesError> {
    page_after(tables, keys::DEPLOYMENTS, after, limit, "a deployment")
}

fn all<M: prost::Message + Default>(
    tables: &(impl Tables + ?Sized),
    table: u8,
    what: &str,
) -> Result<Vec<M>, TablesError> {
    let mut found = Vec::new();
    let (from, to) = keys::whole(table);
    tables.scan(&from, &to, &mut |_, value| {
        found.push(decode(value, what)?);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(found)
}
