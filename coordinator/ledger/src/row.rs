//! Rows: canonical bytes of a body, the id derived from them, and the chain.
//!
//! ```text
//! id   = BLAKE3("baton.ledger.body\n" ‖ version ‖ kind ‖ fields…)
//! hash = BLAKE3("baton.ledger.row\n" ‖ version ‖ hash of the row before ‖ sequence ‖ raft index ‖ id ‖ charge ‖ time)
//! ```
//!
//! The first row follows [`GENESIS`](crate::GENESIS). `docs/ledger-format.md` lists every field in order; the tests here hold vectors, so
//! that an accidental change is noticed. **Versioning**: fields that are added to a record later are encoded under a higher
//! version, which is used exactly when one of them is set. So the encoding of what was written before never changes, and
//! neither do its hashes.

use crate::encoding::Encoder;
use crate::{Hash, hex};
use baton_proto::state::{Charge, Correction, LedgerRow, Price, UsageRecord, ledger_row::Body};

/// Version of the encodings in this file.
const VERSION: u8 = 1;
/// Bytes of a price's hash that its id shows. 160 bits: nobody finds two prices with one id.
const PRICE_ID_BYTES: usize = 20;

/// Canonical bytes of a body.
pub fn canonical_body(body: &Body) -> Vec<u8> {
    encode_body(body).finish()
}

/// The content-derived id of a body.
pub fn body_id(body: &Body) -> Hash {
    encode_body(body).hash()
}

fn encode_body(body: &Body) -> Encoder {
    let mut out = Encoder::new("baton.ledger.body");
    out.u8(VERSION);
    match body {
        Body::Usage(record) => encode_usage(out.u8(1), record),
        Body::Correction(correction) => encode_correction(out.u8(2), correction),
    }
    out
}

fn encode_usage(out: &mut Encoder, record: &UsageRecord) {
    out.string(&record.request_id)
        .string(&record.model)
        .u32(record.status.cast_unsigned())
        .u32(record.prompt_tokens)
        .u32(record.cached_tokens)
        .u32(record.completion_tokens)
        .string(&record.prefill_worker_id)
        .string(&record.decode_worker_id)
        .u64(record.started_unix_ms)
        .u64(record.settled_unix_ms)
        .u32(record.attempts)
        .u32(record.sampled_tokens)
        .u32(record.reasoning_tokens)
        .u32(record.accepted_prediction_tokens)
        .u32(record.rejected_prediction_tokens)
        .string(&record.organization_id)
        .string(&record.project_id)
        .string(&record.key_id)
        .string(&record.user)
        .string(&record.revision)
        .string(&record.endpoint)
        .string(&record.service_tier);
    out.length(record.attempt_list.len());
    for attempt in &record.attempt_list {
        out.string(&attempt.prefill_worker_id)
            .string(&attempt.decode_worker_id)
            .u64(attempt.decode_epoch)
            .u32(attempt.tokens);
    }
    out.length(record.postings.len());
    for posting in &record.postings {
        out.string(&posting.budget_id)
            .string(&posting.slice_id)
            .u64(posting.reserved_nano);
    }
    out.bytes(&record.idempotency_key_sha256)
        .bytes(&record.request_sha256)
        .string(&record.price_id);
}

fn encode_correction(out: &mut Encoder, correction: &Correction) {
    out.string(&correction.request_id)
        .u64(correction.sequence)
        .i64(correction.prompt_tokens)
        .i64(correction.cached_tokens)
        .i64(correction.completion_tokens)
        .i64(correction.input_nano)
        .i64(correction.cached_input_nano)
        .i64(correction.output_nano)
        .string(&correction.reason)
        .string(&correction.correction_id);
}

fn encode_charge(out: &mut Encoder, charge: &Charge) {
    out.string(&charge.price_id)
        .string(&charge.currency)
        .u64(charge.input_nano)
        .u64(charge.cached_input_nano)
        .u64(charge.output_nano);
}

/// The hash of a row: of everything in it but its own hash. `id` and `previous_hash` are taken as they stand, whatever
/// their length (another length gives another hash); an absent charge counts as an empty one.
pub fn row_hash(row: &LedgerRow) -> Hash {
    let mut out = Encoder::new("baton.ledger.row");
    out.u8(VERSION)
        .bytes(&row.previous_hash)
        .u64(row.sequence)
        .u64(row.raft_index)
        .bytes(&row.id);
    match &row.charge {
        Some(charge) => encode_charge(&mut out, charge),
        None => encode_charge(&mut out, &Charge::default()),
    }
    out.u64(row.at_unix_ms).hash()
}

/// Makes the row after `previous` (or after [`GENESIS`](crate::GENESIS)), with its id and hash.
pub fn seal(previous: &Hash, sequence: u64, raft_index: u64, at_unix_ms: u64, body: Body, charge: Charge) -> LedgerRow {
    let id = body_id(&body);
    seal_known(previous, sequence, raft_index, at_unix_ms, id, body, charge)
}

/// The same, for who has the body's [`body_id`] already.
pub fn seal_known(
    previous: &Hash,
    sequence: u64,
    raft_index: u64,
    at_unix_ms: u64,
    id: Hash,
    body: Body,
    charge: Charge,
) -> LedgerRow {
    let mut row = LedgerRow {
        sequence,
        raft_index,
        id: id.to_vec().into(),
        body: Some(body),
        charge: Some(charge),
        previous_hash: previous.to_vec().into(),
        hash: Default::default(),
        at_unix_ms,
    };
    row.hash = row_hash(&row).to_vec().into();
    row
}

/// The content-derived id of a price, from everything in it but the id: `price-` and 40 hexadecimal digits.
pub fn price_id(price: &Price) -> String {
    let mut out = Encoder::new("baton.ledger.price");
    out.u8(VERSION)
        .string(&price.model)
        .string(&price.service_tier)
        .string(&price.currency)
        .u64(price.input_nano_per_mtok)
        .u64(price.cached_input_nano_per_mtok)
        .u64(price.output_nano_per_mtok)
        .u64(price.effective_from_unix_ms)
        .u64(price.effective_to_unix_ms);
    format!("price-{}", hex(&out.hash()[..PRICE_ID_BYTES]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GENESIS;
    use crate::tests::full_record as record;
    use baton_proto::state::Attempt;
    use std::collections::HashSet;

    fn charge() -> Charge {
        Charge {
            price_id: "price".into(),
            currency: "USD".into(),
            input_nano: 1,
            cached_input_nano: 2,
            output_nano: 3,
        }
    }

    /// Vectors that other implementations can check themselves against; they never change. Made by a second
    /// implementation (Python), from the document.
    #[test]
    fn vectors() {
        let first = seal(&GENESIS, 1, 41, 1_764_000_000_501, Body::Usage(record()), charge());
        assert_eq!(
            hex(&first.id),
            "2578a52fba1669c6629a8e2f5dcce26c4bdde6f6e1a1fb2fe0544730eef10892"
        );
        assert_eq!(
            hex(&first.hash),
            "7c588ff6393b9887e4974049e14b0da3ae15553ff40143d36e9253e1ba9d1506"
        );
        let correction = Correction {
            request_id: "chatcmpl-1".into(),
            sequence: 1,
            prompt_tokens: -1,
            output_nano: -3,
            reason: "counted twice".into(),
            correction_id: "c-1".into(),
            ..Correction::default()
        };
        let previous: Hash = first.hash.as_ref().try_into().expect("32 bytes");
        let second = seal(
            &previous,
            2,
            42,
            1_764_000_000_502,
            Body::Correction(correction),
            Charge::default(),
        );
        assert_eq!(
            hex(&second.id),
            "630f90f3a49d4f0d48027b125073d77e505f96f65ecf6759ddb716bb3e4f570c"
        );
        assert_eq!(
            hex(&second.hash),
            "f0070003740808a4b087c3b6c33bad94baec7b9342528ae76e14a000900883c9"
        );
        let empty = body_id(&Body::Usage(UsageRecord::default()));
        assert_eq!(
            hex(&empty),
            "9f2e253747351b735a9c423b04a21d89b31022cf9ac006a4e6c5322811d732cb"
        );
        let price = Price {
            id: "not part of it".into(),
            model: "demo".into(),
            service_tier: "default".into(),
            currency: "USD".into(),
            input_nano_per_mtok: 20_000_000_000,
            cached_input_nano_per_mtok: 5_000_000_000,
            output_nano_per_mtok: 80_000_000_000,
            effective_from_unix_ms: 1,
            effective_to_unix_ms: 2,
        };
        assert_eq!(price_id(&price), "price-5161111129d6e6f02edb82962f78f1a5df5e0712");
    }

    /// The first bytes of an encoding, written out: what the document says is what happens.
    #[test]
    fn bytes_are_what_the_document_says() {
        let bytes = canonical_body(&Body::Usage(record()));
        let start =
            b"baton.ledger.body\n\x01\x01\x0a\0\0\0chatcmpl-1\x04\0\0\0demo\x01\0\0\0\x0a\0\0\0\x04\0\0\0\x07\0\0\0";
        assert_eq!(&bytes[..start.len()], start);
        assert_eq!(&bytes[bytes.len() - 9..], b"\x05\0\0\0price");
        let empty = canonical_body(&Body::Correction(Correction::default()));
        assert_eq!(empty.len(), "baton.ledger.body\n".len() + 2 + 4 + 7 * 8 + 4 + 4);
    }

    /// Every single field, changed alone, gives another id: none was forgotten.
    #[test]
    fn every_field_counts() {
        type Change = fn(&mut UsageRecord);
        let changes: [Change; 34] = [
            |_| {},
            |r| r.request_id.push('x'),
            |r| r.model.push('x'),
            |r| r.status += 1,
            |r| r.prompt_tokens += 1,
            |r| r.cached_tokens += 1,
            |r| r.completion_tokens += 1,
            |r| r.prefill_worker_id.push('x'),
            |r| r.decode_worker_id.push('x'),
            |r| r.started_unix_ms += 1,
            |r| r.settled_unix_ms += 1,
            |r| r.attempts += 1,
            |r| r.sampled_tokens += 1,
            |r| r.reasoning_tokens += 1,
            |r| r.accepted_prediction_tokens += 1,
            |r| r.rejected_prediction_tokens += 1,
            |r| r.organization_id.push('x'),
            |r| r.project_id.push('x'),
            |r| r.key_id.push('x'),
            |r| r.user.push('x'),
            |r| r.revision.push('x'),
            |r| r.endpoint.push('x'),
            |r| r.service_tier.push('x'),
            |r| r.attempt_list.push(Attempt::default()),
            |r| r.attempt_list[0].prefill_worker_id.push('x'),
            |r| r.attempt_list[0].decode_worker_id.push('x'),
            |r| r.attempt_list[0].decode_epoch += 1,
            |r| r.attempt_list[0].tokens += 1,
            |r| r.postings[0].budget_id.push('x'),
            |r| r.postings[0].slice_id.push('x'),
            |r| r.postings[0].reserved_nano += 1,
            |r| r.idempotency_key_sha256 = vec![3; 32].into(),
            |r| r.request_sha256 = vec![3; 32].into(),
            |r| r.price_id.push('x'),
        ];
        let ids: HashSet<Hash> = changes
            .iter()
            .map(|change| {
                let mut record = record();
                change(&mut record);
                body_id(&Body::Usage(record))
            })
            .collect();
        assert_eq!(ids.len(), changes.len());

        type Edit = fn(&mut LedgerRow);
        let edits: [Edit; 11] = [
            |_| {},
            |r| r.sequence += 1,
            |r| r.raft_index += 1,
            |r| r.at_unix_ms += 1,
            |r| r.id = vec![0; 32].into(),
            |r| r.previous_hash = vec![1; 32].into(),
            |r| r.charge.as_mut().expect("set").input_nano += 1,
            |r| r.charge.as_mut().expect("set").cached_input_nano += 1,
            |r| r.charge.as_mut().expect("set").output_nano += 1,
            |r| r.charge.as_mut().expect("set").currency.push('x'),
            |r| r.charge.as_mut().expect("set").price_id.push('x'),
        ];
        let hashes: HashSet<Hash> = edits
            .iter()
            .map(|edit| {
                let mut row = seal(&GENESIS, 1, 1, 1, Body::Usage(record()), charge());
                edit(&mut row);
                row_hash(&row)
            })
            .collect();
        assert_eq!(hashes.len(), edits.len());
    }

    /// Text moved from one field to the next is not the same content.
    #[test]
    fn fields_do_not_run_together() {
        let id = |request_id: &str, model: &str| {
            let record = UsageRecord {
                request_id: request_id.into(),
                model: model.into(),
                ..UsageRecord::default()
            };
            body_id(&Body::Usage(record))
        };
        assert_ne!(id("ab", "c"), id("a", "bc"));
        assert_ne!(
            body_id(&Body::Usage(UsageRecord::default())),
            body_id(&Body::Correction(Correction::default()))
        );
    }
}
