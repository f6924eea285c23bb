//! Projects, keys, who may come in, and the audit log.

use super::{message, page, page_after};
use crate::keys::{self, Key};
use crate::tables::{Tables, TablesError};
use baton_proto::state::{ApiKey, AuditRow, Project};

/// What a presented key is worth.
#[derive(Debug, Clone, PartialEq)]
pub enum Access {
    /// It is valid. Scopes, models and limits are for the caller to hold against the request.
    Granted {
        /// The key.
        key: Box<ApiKey>,
        /// Its project.
        project: Box<Project>,
    },
    /// No key has this hash.
    Unknown,
    /// It was revoked.
    Revoked,
    /// Its time is over.
    Expired,
    /// Its project is archived.
    Archived,
}

/// Judges a key by its SHA-256. `now_unix_ms` is the caller's clock; replicated time counts if it is later.
pub fn access(tables: &(impl Tables + ?Sized), sha256: &[u8], now_unix_ms: u64) -> Result<Access, TablesError> {
    let Some(key) = key_by_hash(tables, sha256)? else {
        return Ok(Access::Unknown);
    };
    if key.revoked {
        return Ok(Access::Revoked);
    }
    let now_ms = now_unix_ms.max(super::time(tables)?);
    if key.expires_unix_ms != 0 && key.expires_unix_ms <= now_ms {
        return Ok(Access::Expired);
    }
    let missing = || TablesError::Corrupt(format!("the project of key {} is missing", key.id));
    let project = project(tables, &key.project_id)?.ok_or_else(missing)?;
    if project.archived {
        return Ok(Access::Archived);
    }
    Ok(Access::Granted {
        key: Box::new(key),
        project: Box::new(project),
    })
}

/// A project.
pub fn project(tables: &(impl Tables + ?Sized), id: &str) -> Result<Option<Project>, TablesError> {
    message(tables, &keys::named(keys::PROJECTS, id), "a project")
}

/// A page of the projects, by id.
pub fn projects_after(tables: &(impl Tables + ?Sized), after: &str, limit: usize) -> Result<Vec<Project>, TablesError> {
    page_after(tables, keys::PROJECTS, after, limit, "a project")
}

/// A key, revoked or not.
pub fn key(tables: &(impl Tables + ?Sized), id: &str) -> Result<Option<ApiKey>, TablesError> {
    message(tables, &keys::named(keys::API_KEYS, id), "a key")
}

/// A page of the keys, by id, revoked ones included.
pub fn keys_after(tables: &(impl Tables + ?Sized), after: &str, limit: usize) -> Result<Vec<ApiKey>, TablesError> {
    page_after(tables, keys::API_KEYS, after, limit, "a key")
}

/// The key with this SHA-256, revoked or not. For judging one that was presented, use [`access`].
pub fn key_by_hash(tables: &(impl Tables + ?Sized), sha256: &[u8]) -> Result<Option<ApiKey>, TablesError> {
    let Some(id) = tables.get(&key_hash_key(sha256))? else {
        return Ok(None);
    };
    let id = String::from_utf8_lossy(&id);
    let found = key(tables, &id)?;
    let missing = || TablesError::Corrupt(format!("key {id} is missing"));
    Ok(Some(found.ok_or_else(missing)?))
}

pub(crate) fn key_hash_key(sha256: &[u8]) -> Vec<u8> {
    Key::of(keys::API_KEY_HASHES).rest(sha256).done()
}

/// How many admin changes are in the audit log; also the number of the last one.
pub fn audited(tables: &(impl Tables + ?Sized)) -> Result<u64, TablesError> {
    let (from, to) = keys::whole(keys::AUDIT);
    let damaged = || TablesError::Corrupt("a key of the audit log is not a number".into());
    match tables.last(&from, &to)? {
        None => Ok(0),
        Some((key, _)) => keys::number_of(&key).ok_or_else(damaged),
    }
}

/// A page of the audit log after the row `sequence`, oldest first.
pub fn audit_after(tables: &(impl Tables + ?Sized), sequence: u64, limit: usize) -> Result<Vec<AuditRow>, TablesError> {
    let from = keys::numbered(keys::AUDIT, sequence.saturating_add(1));
    page(tables, &from, &keys::whole(keys::AUDIT).1, limit, "an audit row")
}
