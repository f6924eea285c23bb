//! The coordinators: where each is reached, and which key it signs the ledger with. Who votes is Raft's configuration, not
//! this.

use crate::audit;
use crate::bounds::{self, MEMBERS_MAX};
use crate::keys;
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::tables::TablesMut as _;
use crate::view;
use baton_proto::state::{PutMember, RemoveMember};

pub(crate) fn put(machine: &mut Machine<'_>, command: PutMember) -> Handled {
    let Some(member) = command.member else {
        return Err(Refused::invalid("a member is missing").into());
    };
    if member.id == 0 {
        return Err(Refused::invalid("a member's id is not 0").into());
    }
    bounds::text("the member's name", &member.name)?;
    bounds::text("the member's cluster address", &member.cluster_addr)?;
    bounds::text("the member's URL", &member.api_url)?;
    if !member.ledger_public_key.is_empty() {
        bounds::exactly("the member's signing key", &member.ledger_public_key, 32)?;
    }
    let known = view::member(machine, member.id)?;
    let changed = known.as_ref() != Some(&member);
    if known.is_none() && view::members(machine)?.len() >= MEMBERS_MAX {
        let max = MEMBERS_MAX as u64;
        return Err(Refused::TooMany { what: "members", max }.into());
    }
    if changed {
        machine.put_message(&keys::numbered(keys::MEMBERS, member.id), &member)?;
        audit::write(machine, "put_member", &member.id.to_string())?;
    }
    Ok(Applied::Stands { changed })
}

pub(crate) fn remove(machine: &mut Machine<'_>, command: &RemoveMember) -> Handled {
    let removed = view::member(machine, command.id)?.is_some();
    if removed {
        machine.delete(&keys::numbered(keys::MEMBERS, command.id))?;
        audit::write(machine, "remove_member", &command.id.to_string())?;
    }
    Ok(Applied::Removed { removed })
}
