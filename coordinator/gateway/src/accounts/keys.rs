//! From a presented key to who calls. A key is looked up by its SHA-256 in the applied state, so what an observer could time
//! is a comparison of hashes, from which no secret can be worked out.
//!
//! Answers are kept as long as no admin change was applied: the applied index tells whether anything was, and the length of
//! the audit log whether it was an admin change. So a revocation counts from the first request after it was applied.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use baton_proto::state::{ApiKey, Budget, Project, Scope};
use baton_state::view::{self, Access};

use super::store::{AccountStore, StoreError};
use crate::clock::unix_ms;

/// Answers kept. Unknown keys count too, so an attacker can fill it; then all are looked up again.
const ANSWERS_MAX: usize = 65_536;

/// A key of the state with all that a request of it needs.
#[derive(Debug, PartialEq)]
pub(crate) struct Account {
    pub key: ApiKey,
    pub project: Project,
    /// Of the project and of the key.
    pub budgets: Vec<Budget>,
}

impl Account {
    /// Whether the key may call a model.
    pub fn allows(&self, model: &str) -> bool {
        self.key.models.is_empty() || self.key.models.iter().any(|allowed| allowed == model)
    }
}

/// What a presented key is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Presented {
    Valid(Arc<Account>),
    /// It is known and not to be taken, because it …
    Refused(&'static str),
    Unknown,
}

/// What was looked up since the last admin change.
#[derive(Default)]
pub(crate) struct KeyCache(Mutex<Answers>);

#[derive(Default)]
struct Answers {
    /// As of this applied index …
    applied: Option<u64>,
    /// … and this many admin changes.
    audited: u64,
    by_sha256: HashMap<[u8; 32], Presented>,
    admin: Option<bool>,
}

impl KeyCache {
    /// Judges a key by its SHA-256.
    pub fn presented(&self, store: &dyn AccountStore, sha256: &[u8; 32]) -> Result<Presented, StoreError> {
        let mut answers = self.current(store)?;
        let found = match answers.by_sha256.get(sha256) {
            Some(found) => found.clone(),
            None => {
                let found = look_up(store, sha256)?;
                if answers.by_sha256.len() >= ANSWERS_MAX {
                    answers.by_sha256.clear();
                }
                answers.by_sha256.insert(*sha256, found.clone());
                found
            }
        };
        Ok(match found {
            // Time passes without commands.
            Presented::Valid(account) if is_over(&account.key) => Presented::Refused(EXPIRED),
            found => found,
        })
    }

    /// Whether the state has a key for administration that may be used.
    pub fn has_admin(&self, store: &dyn AccountStore) -> Result<bool, StoreError> {
        let mut answers = self.current(store)?;
        if let Some(known) = answers.admin {
            return Ok(known);
        }
        let tables = store.tables()?;
        let mut after = String::new();
        let found = loop {
            let page = view::keys_after(&*tables, &after, view::PAGE_RECORDS_MAX)?;
            let Some(last) = page.last() else { break false };
            after.clone_from(&last.id);
            if page
                .iter()
                .any(|key| !key.revoked && key.scopes().any(|scope| scope == Scope::Admin))
            {
                break true;
            }
        };
        answers.admin = Some(found);
        Ok(found)
    }

    /// The answers, those that may have changed forgotten.
    fn current(&self, store: &dyn AccountStore) -> Result<MutexGuard<'_, Answers>, StoreError> {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Read before the state, so that a change in between is looked for again next time.
        let applied = store.applied_index();
        if answers.applied != Some(applied) {
            let audited = view::audited(&*store.tables()?)?;
            if answers.audited != audited {
                *answers = Answers {
                    audited,
                    ..Answers::default()
                };
            }
            answers.applied = Some(applied);
        }
        Ok(answers)
    }
}

const EXPIRED: &str = "has expired";

fn is_over(key: &ApiKey) -> bool {
    key.expires_unix_ms != 0 && key.expires_unix_ms <= unix_ms()
}

fn look_up(store: &dyn AccountStore, sha256: &[u8; 32]) -> Result<Presented, StoreError> {
    let tables = store.tables()?;
    Ok(match view::access(&*tables, sha256, unix_ms())? {
        Access::Granted { key, project } => {
            let mut budgets = view::budgets_of(&*tables, &project.id, "")?;
            budgets.extend(view::budgets_of(&*tables, &project.id, &key.id)?);
            Presented::Valid(Arc::new(Account {
                key: *key,
                project: *project,
                budgets,
            }))
        }
        Access::Unknown => Presented::Unknown,
        Access::Revoked => Presented::Refused("was revoked"),
        Access::Expired => Presented::Refused(EXPIRED),
        Access::Archived => Presented::Refused("is of an archived project"),
    })
}

/// SHA-256 of a secret.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}
