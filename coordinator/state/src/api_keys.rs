//! API keys. The secret is nowhere: a key is found by its SHA-256. What a key may do can change, what it is cannot:
//! its hash and its project stay, and once revoked it is revoked.

use crate::audit;
use crate::bounds::{self, KEY_MODELS_MAX};
use crate::keys;
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::tables::TablesMut as _;
use crate::view;
use baton_proto::state::{ApiKey, PutKey, RevokeKey, Scope};

pub(crate) fn put(machine: &mut Machine<'_>, command: PutKey) -> Handled {
    let Some(mut key) = command.key else {
        return Err(Refused::invalid("a key is missing").into());
    };
    check(&key)?;
    if view::project(machine, &key.project_id)?.is_none() {
        return Err(Refused::unknown("project", &key.project_id).into());
    }
    let known = view::key(machine, &key.id)?;
    // When it was made is for the state to say.
    key.created_unix_ms = known.as_ref().map_or(machine.now_ms, |known| known.created_unix_ms);
    match &known {
        Some(known) if known.revoked => return Err(Refused::KeyRevoked { id: key.id }.into()),
        Some(known) if known.sha256 != key.sha256 => return Err(Refused::fixed("key", &key.id, "the hash").into()),
        Some(known) if known.project_id != key.project_id => {
            return Err(Refused::fixed("key", &key.id, "the project").into());
        }
        Some(_) => {}
        None => {
            if let Some(other) = view::key_by_hash(machine, &key.sha256)? {
                return Err(Refused::KeyHashTaken { id: other.id }.into());
            }
        }
    }
    let changed = known.as_ref() != Some(&key);
    if changed {
        if known.is_none() {
            machine.put(&view::key_hash_key(&key.sha256), key.id.as_bytes())?;
        }
        machine.put_message(&keys::named(keys::API_KEYS, &key.id), &key)?;
        let action = if known.is_some() { "put_key" } else { "create_key" };
        audit::write(machine, action, &key.id)?;
    }
    Ok(Applied::Stands { changed })
}

pub(crate) fn revoke(machine: &mut Machine<'_>, command: &RevokeKey) -> Handled {
    let Some(mut key) = view::key(machine, &command.id)? else {
        return Err(Refused::unknown("key", &command.id).into());
    };
    let changed = !key.revoked;
    if changed {
        key.revoked = true;
        machine.put_message(&keys::named(keys::API_KEYS, &key.id), &key)?;
        audit::write(machine, "revoke_key", &key.id)?;
    }
    Ok(Applied::Stands { changed })
}

fn check(key: &ApiKey) -> Result<(), Refused> {
    bounds::name("the key's id", &key.id)?;
    bounds::exactly("the key's SHA-256", &key.sha256, 32)?;
    bounds::text("the key's hint", &key.hint)?;
    bounds::text("the key's name", &key.name)?;
    let known = |scope: &i32| Scope::try_from(*scope).is_ok_and(|scope| scope != Scope::Unspecified);
    let mut scopes = key.scopes.clone();
    scopes.sort_unstable();
    scopes.dedup();
    if scopes.is_empty() || scopes.len() != key.scopes.len() || !scopes.iter().all(known) {
        return Err(Refused::invalid("a key has scopes, each known and once"));
    }
    if key.models.len() > KEY_MODELS_MAX {
        return Err(Refused::invalid(format!(
            "a key allows at most {KEY_MODELS_MAX} models by name"
        )));
    }
    for model in &key.models {
        bounds::name("a model of the key", model)?;
    }
    if key.revoked {
        return Err(Refused::invalid("a key is revoked by its own command"));
    }
    Ok(())
}
