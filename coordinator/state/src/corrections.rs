//! Corrections: new rows with differences, never an edit. All corrections of a request together leave none of its counts
//! and amounts below zero, and no more cached than prompt. They change what is owed; budgets, which guard what is being
//! spent, do not move.

use crate::aggregates;
use crate::audit;
use crate::bounds;
use crate::keys;
use crate::machine::{Handled, Machine};
use crate::outcome::{Applied, Refused};
use crate::rows;
use crate::tables::TablesMut as _;
use crate::view;
use baton_ledger::row::body_id;
use baton_proto::state::{Charge, CorrectUsage, Corrected, Correction, LedgerRow, UsageRecord, ledger_row::Body};

pub(crate) fn correct(machine: &mut Machine<'_>, command: CorrectUsage) -> Handled {
    let Some(correction) = command.correction else {
        return Err(Refused::invalid("a correction is missing").into());
    };
    bounds::name("the correction's id", &correction.correction_id)?;
    bounds::name("the reason", &correction.reason)?;
    bounds::name("the request id", &correction.request_id)?;
    let body = Body::Correction(correction.clone());
    let id = body_id(&body);
    if let Some((sequence, known)) = view::correction(machine, &correction.correction_id)? {
        return if known == id {
            Ok(Applied::Corrected { sequence })
        } else {
            let correction_id = correction.correction_id;
            Err(Refused::CorrectionConflict {
                correction_id,
                sequence,
            }
            .into())
        };
    }
    if differences(&correction) == [0; 6] {
        return Err(Refused::invalid("a correction that changes nothing").into());
    }
    let Some(row) = view::usage_row(machine, &correction.request_id)? else {
        return Err(Refused::unknown("request", &correction.request_id).into());
    };
    if row.sequence != correction.sequence {
        let sequence = row.sequence;
        return Err(Refused::invalid(format!("the request's row is {sequence}")).into());
    }
    let before = view::corrected(machine, &correction.request_id)?;
    let after = add(&before, &correction).ok_or_else(|| below(&correction, "a difference"))?;
    let LedgerRow {
        body: Some(Body::Usage(record)),
        charge,
        ..
    } = row
    else {
        return Err(crate::tables::TablesError::Corrupt("a request's row has no usage".into()).into());
    };
    let charge = charge.unwrap_or_default();
    check(&correction, &record, &charge, &after)?;
    aggregates::add_correction(machine, &record, &charge.currency, &correction)?;
    machine.put_message(&keys::named(keys::CORRECTED, &correction.request_id), &after)?;
    let row = rows::append(machine, body, baton_ledger::charge::of_correction(&charge))?;
    let entry = [&row.sequence.to_le_bytes()[..], &id].concat();
    machine.put(&keys::named(keys::CORRECTIONS, &correction.correction_id), &entry)?;
    audit::write(machine, "correct_usage", &correction.request_id)?;
    Ok(Applied::Corrected { sequence: row.sequence })
}

fn differences(correction: &Correction) -> [i64; 6] {
    [
        correction.prompt_tokens,
        correction.cached_tokens,
        correction.completion_tokens,
        correction.input_nano,
        correction.cached_input_nano,
        correction.output_nano,
    ]
}

/// Nothing where a sum leaves 64 bits.
fn add(before: &Corrected, correction: &Correction) -> Option<Corrected> {
    Some(Corrected {
        prompt_tokens: before.prompt_tokens.checked_add(correction.prompt_tokens)?,
        cached_tokens: before.cached_tokens.checked_add(correction.cached_tokens)?,
        completion_tokens: before.completion_tokens.checked_add(correction.completion_tokens)?,
        input_nano: before.input_nano.checked_add(correction.input_nano)?,
        cached_input_nano: before.cached_input_nano.checked_add(correction.cached_input_nano)?,
        output_nano: before.output_nano.checked_add(correction.output_nano)?,
    })
}

fn check(correction: &Correction, record: &UsageRecord, charge: &Charge, sum: &Corrected) -> Result<(), Refused> {
    let prompt = i128::from(record.prompt_tokens) + i128::from(sum.prompt_tokens);
    let cached = i128::from(record.cached_tokens) + i128::from(sum.cached_tokens);
    let completion = i128::from(record.completion_tokens) + i128::from(sum.completion_tokens);
    let money = |charged: u64, difference: i64| i128::from(charged) + i128::from(difference);
    let input = money(charge.input_nano, sum.input_nano);
    let cached_input = money(charge.cached_input_nano, sum.cached_input_nano);
    let output = money(charge.output_nano, sum.output_nano);
    for (what, left) in [
        ("prompt tokens", prompt),
        ("cached tokens", cached.min(prompt - cached)),
        ("completion tokens", completion),
        ("input", input),
        ("cached input", cached_input),
        ("output", output),
    ] {
        if left < 0 {
            return Err(below(correction, what));
        }
    }
    if charge.currency.is_empty() && (input, cached_input, output) != (0, 0, 0) {
        return Err(Refused::invalid("the request has no price, so no amount to correct"));
    }
    Ok(())
}

fn below(correction: &Correction, what: &'static str) -> Refused {
    let request_id = correction.request_id.clone();
    Refused::BelowZero { request_id, what }
}
