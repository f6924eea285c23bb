//! The coordinators: where each is reached. Who votes is Raft's configuration, not this.

use crate::keys;
use crate::outcome::{Applied, Outcome, Refused};
use crate::tables::{TablesError, TablesMut};
use crate::view;
use baton_proto::state::{PutMember, RemoveMember};
use prost::Message as _;

/// Coordinators on record: several times what a group can have.
pub(crate) const MEMBERS_MAX: usize = 32;
/// Longest name or address, in bytes.
const TEXT_BYTES_MAX: usize = 256;

pub(crate) fn put(tables: &mut dyn TablesMut, command: PutMember) -> Result<Outcome, TablesError> {
    let Some(member) = command.member.filter(|member| member.id != 0) else {
        return Ok(Err(Refused::invalid("a member without an id")));
    };
    let texts = [&member.name, &member.cluster_addr, &member.api_url];
    if texts.iter().any(|text| text.len() > TEXT_BYTES_MAX) {
        return Ok(Err(Refused::invalid("a member's name or address is too long")));
    }
    let known = view::members(tables)?;
    let before = known.iter().find(|known| known.id == member.id);
    let changed = before != Some(&member);
    if before.is_none() && known.len() >= MEMBERS_MAX {
        return Ok(Err(Refused::invalid("there are too many members")));
    }
    if changed {
        tables.put(&keys::numbered(keys::MEMBERS, member.id), &member.encode_to_vec())?;
    }
    Ok(Ok(Applied::Stands { changed }))
}

pub(crate) fn remove(tables: &mut dyn TablesMut, command: &RemoveMember) -> Result<Outcome, TablesError> {
    let key = keys::numbered(keys::MEMBERS, command.id);
    let removed = tables.get(&key)?.is_some();
    if removed {
        tables.delete(&key)?;
    }
    Ok(Ok(Applied::Removed { removed }))
}
