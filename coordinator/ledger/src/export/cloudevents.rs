//! CloudEvents 1.0 in JSON, one per line, as OpenMeter ingests them: `POST /api/v1/events` with the content type
//! `application/cloudevents+json` for one, or several in an array with `application/cloudevents-batch+json`.
//!
//! `id` is the row's content-derived id and `source` is fixed, so that an event sent twice counts once there. `subject` is
//! who is metered: the project, else the organisation, else the key, else `unassigned`. `type` is `baton.usage` or
//! `baton.correction`; a correction's values are differences. In `data`, token counts are numbers, money is decimal strings;
//! OpenMeter's meters read both (`$.completion_tokens`, `$.total_cost`).

use super::{Export, ExportError, Flat, rfc3339};
use crate::totals::Amounts;
use baton_proto::state::LedgerRow;
use serde_json::json;
use std::io::Write;

/// Every event's source.
const SOURCE: &str = "baton/ledger";
/// Subject of what belongs to nobody.
const UNASSIGNED: &str = "unassigned";

/// Writes them.
#[derive(Debug)]
pub struct CloudEvents<W>(W);

impl<W: Write> CloudEvents<W> {
    /// Writes to `out`.
    pub const fn new(out: W) -> Self {
        Self(out)
    }
}

/// The event of a row.
///
/// # Errors
/// [`ExportError::Row`] for a row without a body.
pub fn event(row: &LedgerRow) -> Result<serde_json::Value, ExportError> {
    let flat = Flat::of(row)?;
    let (usage, amounts) = (&flat.usage, Amounts::of(row));
    let subjects = [usage.project_id.as_str(), &usage.organization_id, &usage.key_id];
    let subject = subjects
        .into_iter()
        .find(|subject| !subject.is_empty())
        .unwrap_or(UNASSIGNED);
    let cost = |nano: i128| crate::money::Nano(nano).to_string();
    let mut data = json!({
        "sequence": row.sequence,
        "request_id": usage.request_id,
        "prompt_tokens": flat.prompt_tokens,
        "cached_tokens": flat.cached_tokens,
        "uncached_tokens": flat.prompt_tokens.saturating_sub(flat.cached_tokens),
        "completion_tokens": flat.completion_tokens,
        "currency": flat.charge.currency,
        "input_cost": cost(amounts.input_nano),
        "cached_input_cost": cost(amounts.cached_input_nano),
        "output_cost": cost(amounts.output_nano),
        "total_cost": amounts.total().to_string(),
    });
    let more = match flat.correction {
        Some(correction) => json!({
            "corrects_sequence": correction.sequence,
            "correction_id": correction.correction_id,
            "reason": correction.reason,
        }),
        None => json!({
            "status": flat.status(),
            "model": usage.model,
            "revision": usage.revision,
            "endpoint": usage.endpoint,
            "service_tier": usage.service_tier,
            "organization_id": usage.organization_id,
            "project_id": usage.project_id,
            "key_id": usage.key_id,
            "user": usage.user,
            "reasoning_tokens": usage.reasoning_tokens,
            "price_id": flat.charge.price_id,
        }),
    };
    if let (Some(data), serde_json::Value::Object(more)) = (data.as_object_mut(), more) {
        data.extend(more);
    }
    Ok(json!({
        "specversion": "1.0",
        "type": format!("baton.{}", flat.kind()),
        "id": crate::hex(&row.id),
        "source": SOURCE,
        "time": rfc3339(row.at_unix_ms),
        "subject": subject,
        "datacontenttype": "application/json",
        "data": data,
    }))
}

impl<W: Write> Export for CloudEvents<W> {
    fn row(&mut self, row: &LedgerRow) -> Result<(), ExportError> {
        serde_json::to_writer(&mut self.0, &event(row)?).map_err(std::io::Error::from)?;
        self.0.write_all(b"\n")?;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ExportError> {
        Ok(self.0.flush()?)
    }

    fn finish(mut self: Box<Self>) -> Result<(), ExportError> {
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Format, tests::exported};
    use std::collections::HashSet;

    #[test]
    fn events_say_what_the_rows_say() {
        let bytes = exported(Format::CloudEvents, 8);
        let rows = crate::tests::ledger(8).rows;
        let mut ids = HashSet::new();
        let mut lines = 0;
        for (line, row) in bytes.split(|byte| *byte == b'\n').zip(&rows) {
            let event: serde_json::Value = serde_json::from_slice(line).expect("JSON");
            for required in ["specversion", "type", "id", "source", "subject", "time"] {
                assert!(
                    event[required].as_str().is_some_and(|text| !text.is_empty()),
                    "{required}"
                );
            }
            assert!(ids.insert(event["id"].as_str().expect("text").to_owned()));
            assert_eq!(event["data"]["sequence"], row.sequence);
            assert!(event["data"]["total_cost"].is_string());
            lines += 1;
        }
        assert_eq!(lines, 8);
        let first: serde_json::Value =
            serde_json::from_slice(bytes.split(|b| *b == b'\n').next().expect("a line")).expect("JSON");
        assert_eq!(
            (first["type"].as_str(), first["subject"].as_str()),
            (Some("baton.usage"), Some("proj"))
        );
        assert_eq!(first["data"]["uncached_tokens"], 6);
        // 6 × 20 + 4 × 5.000000001 + 8 × 80 per million: 0.00012 + 0.00002 + 0.00064.
        assert_eq!(first["data"]["total_cost"], "0.00078");
        let correction: serde_json::Value =
            serde_json::from_slice(bytes.split(|b| *b == b'\n').nth(3).expect("a line")).expect("JSON");
        assert_eq!(
            (correction["type"].as_str(), correction["subject"].as_str()),
            (Some("baton.correction"), Some("unassigned"))
        );
        assert_eq!(correction["data"]["completion_tokens"], -1);
        assert_eq!(correction["data"]["total_cost"], "-0.00008");
    }
}
