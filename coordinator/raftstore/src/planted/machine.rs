//! The state machine as members under test run it: the real one, over tables that a planted bug falsifies. The simulation's
//! reference runs the same with the same bug, so that bugs of the machine must be found by what they break.

use super::Bug;
use super::switch::{applying, is, note};
use baton_proto::state::{
    ApiKey, Budget, Command, LedgerRow, Price, ReturnSlice, Slice, command::Kind, ledger_row::Body,
};
use baton_state::{Outcome, Pair, Tables, TablesError, TablesMut, Visit, keys, view};
use prost::Message as _;
use std::ops::ControlFlow;

/// As [`baton_state::apply`].
pub(crate) fn apply(tables: &mut dyn TablesMut, index: u64, command: &[u8]) -> Result<Outcome, TablesError> {
    let outcome = falsified(tables, index, command)?;
    note(&outcome);
    Ok(outcome)
}

fn falsified(tables: &mut dyn TablesMut, index: u64, command: &[u8]) -> Result<Outcome, TablesError> {
    let Ok(mut decoded) = Command::decode(command) else {
        return baton_state::apply(tables, index, command);
    };
    let mut command = command.to_vec();
    if is(Bug::RemovalNotFenced)
        && let Some(Kind::RemoveWorker(remove)) = &mut decoded.kind
        && let Some(worker) = view::worker(tables, &remove.worker_id)?
    {
        remove.epoch = worker.epoch;
        command = decoded.encode_to_vec();
    }
    if is(Bug::VotesOfOtherEpochs)
        && let Some(Kind::WitnessWorker(witness)) = &mut decoded.kind
        && let Some(worker) = view::worker(tables, &witness.worker_id)?
    {
        witness.epoch = worker.epoch;
        command = decoded.encode_to_vec();
    }
    if is(Bug::WitnessesNotCompared)
        && let Some(Kind::SettleUsage(settle)) = &mut decoded.kind
        && let Some(record) = &mut settle.record
    {
        record.sampled_tokens = record.sampled_tokens.max(record.completion_tokens);
        command = decoded.encode_to_vec();
    }
    if is(Bug::SliceEndsWithoutGrace) {
        end_slices(tables, index, &decoded)?;
    }
    let mut tables = Falsified {
        tables,
        kind: decoded.kind,
    };
    let outcome = baton_state::apply(&mut tables, index, &command)?;
    if is(Bug::CorrectionEditsRow)
        && outcome.is_ok()
        && let Some(Kind::CorrectUsage(correct)) = &tables.kind
        && let Some(correction) = &correct.correction
        && let Some(mut row) = view::row(tables.tables, correction.sequence)?
        && let Some(Body::Usage(record)) = &mut row.body
    {
        record.completion_tokens = record
            .completion_tokens
            .saturating_add_signed(correction.completion_tokens as i32);
        let key = keys::numbered(keys::ROWS, row.sequence);
        tables.tables.put(&key, &LedgerRow::encode_to_vec(&row))?;
    }
    Ok(outcome)
}

fn end_slices(tables: &mut dyn TablesMut, index: u64, command: &Command) -> Result<(), TablesError> {
    let now_ms = view::time(tables)?.max(command.at_unix_ms);
    let mut over = Vec::new();
    let (from, to) = keys::whole(keys::SLICES);
    tables.scan(&from, &to, &mut |_, value| {
        let slice = Slice::decode(value).map_err(|error| TablesError::Corrupt(error.to_string()))?;
        if slice.expires_unix_ms <= now_ms {
            over.push(slice);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    for slice in over {
        let kind = Some(Kind::ReturnSlice(ReturnSlice {
            budget_id: slice.budget_id,
            slice_id: slice.slice_id,
        }));
        let give_back = Command {
            kind,
            ..Command::default()
        };
        let _ = baton_state::apply(tables, index, &give_back.encode_to_vec())?;
    }
    Ok(())
}

struct Falsified<'t> {
    tables: &'t mut dyn TablesMut,
    kind: Option<Kind>,
}

impl Falsified<'_> {
    /// The price at a key, with the amounts of the newest.
    fn newest_price(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        let decoded = |bytes: Option<Vec<u8>>| bytes.and_then(|bytes| Price::decode(&*bytes).ok());
        let (from, to) = keys::whole(keys::PRICES_BY_START);
        let newest = self.tables.last(&from, &to)?;
        let id = newest.map(|(_, id)| String::from_utf8_lossy(&id).into_owned());
        let newest = decoded(self.tables.get(&keys::named(keys::PRICES, &id.unwrap_or_default()))?);
        let mut price = decoded(self.tables.get(key)?);
        if let (Some(price), Some(newest)) = (&mut price, newest) {
            price.output_nano_per_mtok = newest.output_nano_per_mtok;
        }
        Ok(price.map(|price| price.encode_to_vec()))
    }
}

impl Tables for Falsified<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        let hidden = [
            (Bug::RequestsNotDeduplicated, keys::REQUESTS),
            (Bug::IdempotencyKeysForgotten, keys::IDEMPOTENCY),
            (Bug::CorrectionsNotDeduplicated, keys::CORRECTIONS),
        ];
        if hidden.iter().any(|(bug, table)| is(*bug) && key[0] == *table) {
            return Ok(None);
        }
        if is(Bug::EpochReusedAfterRemoval) && key == keys::LAST_EPOCH {
            let workers = view::workers(self.tables)?;
            let last = workers.iter().map(|worker| worker.epoch).max().unwrap_or(0);
            return Ok(Some(last.to_le_bytes().to_vec()));
        }
        if is(Bug::LimitIgnored) && key[0] == keys::BUDGETS && matches!(self.kind, Some(Kind::LeaseSlice(_))) {
            let mut budget = self.tables.get(key)?.and_then(|bytes| Budget::decode(&*bytes).ok());
            if let Some(budget) = &mut budget {
                budget.limit_nano = u64::MAX / 4;
            }
            return Ok(budget.map(|budget| budget.encode_to_vec()));
        }
        if is(Bug::PeriodOfLocalTime) && key == keys::TIME && matches!(self.kind, Some(Kind::LeaseSlice(_))) {
            return Ok(None);
        }
        if is(Bug::PriceNotPinned) && key[0] == keys::PRICES && matches!(self.kind, Some(Kind::SettleUsage(_))) {
            return self.newest_price(key);
        }
        if is(Bug::RevokedKeyComesBack) && key[0] == keys::API_KEYS && matches!(self.kind, Some(Kind::PutKey(_))) {
            let mut found = self.tables.get(key)?.and_then(|bytes| ApiKey::decode(&*bytes).ok());
            if let Some(found) = &mut found {
                found.revoked = false;
            }
            return Ok(found.map(|found| found.encode_to_vec()));
        }
        self.tables.get(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TablesError> {
        self.tables.scan(from, to, visit)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
        self.tables.last(from, to)
    }
}

impl TablesMut for Falsified<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), TablesError> {
        if is(Bug::SliceNotCharged) && key[0] == keys::SLICES && matches!(self.kind, Some(Kind::SettleUsage(_))) {
            return Ok(());
        }
        // Replicated time itself stays right.
        if is(Bug::PeriodOfLocalTime)
            && key == keys::TIME
            && self.tables.get(key)?.is_some_and(|known| {
                let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
                number(&known) >= number(value)
            })
        {
            return Ok(());
        }
        if is(Bug::PeriodNotCut) && key == keys::HEAD && matches!(self.kind, Some(Kind::ClosePeriod(_))) {
            return Ok(());
        }
        if is(Bug::StateOfOwnId) && key[0] == keys::WORKERS {
            let own = [value, &[0xf8, 0x3f, u8::try_from(applying()).unwrap_or(0)]].concat();
            return self.tables.put(key, &own);
        }
        self.tables.put(key, value)
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), TablesError> {
        let of_slice = [keys::SLICES, keys::SLICES_DUE].contains(&key[0]);
        if is(Bug::SliceSurvivesReturn) && of_slice && matches!(self.kind, Some(Kind::ReturnSlice(_))) {
            return Ok(());
        }
        self.tables.delete(key)
    }
}
