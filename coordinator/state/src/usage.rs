//! Settling: one row per request id, charged under the price that its record pins, or else the one that held when it
//! started. What costs what stands in `baton_ledger::charge`; which budgets it is taken from, in [`postings`].

use crate::bounds::{self, ATTEMPTS_MAX};
use crate::calendar::TIME_MAX_UNIX_MS;
use crate::fault::Fault;
use crate::keys;
use crate::machine::{Handled, Machine, Stop};
use crate::outcome::{Applied, Refused};
use crate::postings::{self, Plan};
use crate::tables::TablesMut as _;
use crate::{aggregates, idempotency, prices, rows, view};
use baton_ledger::{charge, row};
use baton_proto::state::{Charge, Price, SettleUsage, UsageRecord, UsageStatus, ledger_row::Body};

pub(crate) fn settle(machine: &mut Machine<'_>, command: SettleUsage) -> Handled {
    let Some(record) = command.record else {
        return Err(Refused::invalid("a settlement without a record").into());
    };
    check(&record)?;
    let request_id = record.request_id.clone();
    // What is stored may differ from what was handed in: its price is filled in, its status may be another.
    let body = Body::Usage(record);
    let handed_in = row::body_id(&body);
    let Body::Usage(mut record) = body else {
        unreachable!("it was made above")
    };
    if let Some(known) = view::request(machine, &request_id)? {
        let sequence = known.sequence;
        return if known.handed_in == handed_in {
            Ok(Applied::Settled { sequence })
        } else {
            Err(Refused::UsageConflict { request_id, sequence }.into())
        };
    }
    if let Some(known) = idempotency::known(machine, &record)? {
        // The client asked twice, and pays once.
        return if known.request_sha256 == record.request_sha256 {
            let sequence = known.sequence;
            Ok(Applied::Settled { sequence })
        } else {
            let request_id = known.request_id;
            Err(Refused::IdempotencyConflict { request_id }.into())
        };
    }
    let (status, pinned) = (record.status, record.price_id.clone());
    let price = price(machine, &record)?;
    record.price_id = price.as_ref().map(|price| price.id.clone()).unwrap_or_default();
    let mut charge = charged(&record, price.as_ref())?;
    match postings::plan(machine, &record, &charge)? {
        Plan::Post(posts) => postings::post(machine, posts, &charge)?,
        Plan::Late => {
            record.status = UsageStatus::Expired.into();
            charge = charged(&record, price.as_ref())?;
        }
    }
    aggregates::add_usage(machine, &record, &charge)?;
    let head = rows::head(machine)?;
    let sequence = head.sequence + 1;
    idempotency::remember(machine, &record, sequence)?;
    let unchanged = (record.status, &record.price_id) == (status, &pinned);
    let body = Body::Usage(record);
    let id = if unchanged { handed_in } else { row::body_id(&body) };
    rows::append_after(machine, head, id, body, charge)?;
    let entry = [&sequence.to_le_bytes()[..], &handed_in].concat();
    machine.put(&keys::named(keys::REQUESTS, &request_id), &entry)?;
    Ok(Applied::Settled { sequence })
}

fn price(machine: &Machine<'_>, record: &UsageRecord) -> Result<Option<Price>, Stop> {
    if record.price_id.is_empty() {
        let found = prices::at(machine, &record.model, &record.service_tier, record.started_unix_ms)?;
        return Ok(found);
    }
    let pinned = view::price(machine, &record.price_id)?.filter(|price| {
        (price.model == record.model || price.model == prices::ALL_MODELS)
            && prices::holds(price, record.started_unix_ms)
    });
    if pinned.is_none() {
        return Err(Refused::WrongPrice {
            request_id: record.request_id.clone(),
            price_id: record.price_id.clone(),
            model: record.model.clone(),
        }
        .into());
    }
    Ok(pinned)
}

fn charged(record: &UsageRecord, price: Option<&Price>) -> Result<Charge, Refused> {
    charge::of_record(record, price).map_err(|error| Refused::invalid(error.to_string()))
}

fn check(record: &UsageRecord) -> Result<(), Refused> {
    bounds::name("the request id", &record.request_id)?;
    for (what, text) in [
        ("the model", &record.model),
        ("the prefill worker's id", &record.prefill_worker_id),
        ("the decode worker's id", &record.decode_worker_id),
        ("the organisation's id", &record.organization_id),
        ("the project's id", &record.project_id),
        ("the key's id", &record.key_id),
        ("the user", &record.user),
        ("the revision", &record.revision),
        ("the endpoint", &record.endpoint),
        ("the service tier", &record.service_tier),
        ("the price's id", &record.price_id),
    ] {
        bounds::text(what, text)?;
    }
    if record.started_unix_ms > TIME_MAX_UNIX_MS || record.settled_unix_ms > TIME_MAX_UNIX_MS {
        return Err(Refused::invalid("a record's times are before the year 10000"));
    }
    if record.attempt_list.len() > ATTEMPTS_MAX {
        return Err(Refused::invalid(format!(
            "a record lists at most {ATTEMPTS_MAX} attempts"
        )));
    }
    for attempt in &record.attempt_list {
        bounds::text("an attempt's prefill worker", &attempt.prefill_worker_id)?;
        bounds::text("an attempt's decode worker", &attempt.decode_worker_id)?;
    }
    postings::check(&record.postings)?;
    idempotency::check(record)?;
    match fault(record) {
        None => Ok(()),
        Some(fault) => {
            let request_id = record.request_id.clone();
            Err(Refused::Impossible { request_id, fault })
        }
    }
}

/// Gateway and workers count apart; here they meet.
fn fault(record: &UsageRecord) -> Option<Fault> {
    let completion = record.completion_tokens;
    let sampled = record.sampled_tokens;
    if !UsageStatus::try_from(record.status).is_ok_and(|status| status != UsageStatus::Unspecified) {
        return Some(Fault::UnknownStatus(record.status));
    }
    if completion > sampled {
        let delivered = completion;
        return Some(Fault::DeliveredBeyondSampled { delivered, sampled });
    }
    if record.cached_tokens > record.prompt_tokens {
        let (cached, prompt) = (record.cached_tokens, record.prompt_tokens);
        return Some(Fault::CachedBeyondPrompt { cached, prompt });
    }
    for (what, part) in [
        ("reasoning", record.reasoning_tokens),
        ("accepted prediction", record.accepted_prediction_tokens),
    ] {
        if part > completion {
            return Some(Fault::PartBeyondCompletion { what, part, completion });
        }
    }
    let attempts: u64 = record
        .attempt_list
        .iter()
        .map(|attempt| u64::from(attempt.tokens))
        .sum();
    if attempts > u64::from(sampled) {
        return Some(Fault::AttemptsBeyondSampled { attempts, sampled });
    }
    let (listed, counted) = (record.attempt_list.len() as u64, record.attempts);
    (listed > u64::from(counted)).then_some(Fault::AttemptsBeyondCount { listed, counted })
}
