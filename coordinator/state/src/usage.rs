//! The usage records: one per request id, numbered without gaps.

use crate::keys;
use crate::outcome::{Applied, Outcome, Refused};
use crate::tables::{TablesError, TablesMut};
use crate::view;
use baton_proto::state::SettleUsage;
use prost::Message as _;

pub(crate) fn settle(tables: &mut dyn TablesMut, command: SettleUsage) -> Result<Outcome, TablesError> {
    let Some(record) = command.record else {
        return Ok(Err(Refused::invalid("a settlement without a record")));
    };
    if record.request_id.is_empty() {
        return Ok(Err(Refused::invalid("a usage record without a request id")));
    }
    if let Some(known) = view::usage(tables, &record.request_id)? {
        let sequence = known.sequence;
        return Ok(if known.record == record {
            Ok(Applied::Settled { sequence })
        } else {
            let request_id = record.request_id;
            Err(Refused::UsageConflict { request_id, sequence })
        });
    }
    let sequence = view::settled(tables)? + 1;
    tables.put(&keys::numbered(keys::USAGE, sequence), &record.encode_to_vec())?;
    let id = keys::named(keys::USAGE_IDS, &record.request_id);
    tables.put(&id, &sequence.to_le_bytes())?;
    Ok(Ok(Applied::Settled { sequence }))
}
