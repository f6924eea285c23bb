//! The audit log: one row for each admin change that changed something, numbered without gaps, never altered.

use crate::keys;
use crate::machine::Machine;
use crate::tables::TablesError;
use crate::view;
use baton_proto::state::AuditRow;

pub(crate) fn write(machine: &mut Machine<'_>, action: &str, subject: &str) -> Result<(), TablesError> {
    let sequence = view::audited(machine)? + 1;
    let row = AuditRow {
        sequence,
        raft_index: machine.index,
        at_unix_ms: machine.now_ms,
        actor: machine.actor.to_owned(),
        action: action.to_owned(),
        subject: subject.to_owned(),
        command: machine.command.to_vec().into(),
    };
    machine.put_message(&keys::numbered(keys::AUDIT, sequence), &row)
}
