//! A small ledger that the tests of several modules read: usage of several kinds, a correction, prices, checkpoints.

use crate::checkpoint::SigningKey;
use crate::merkle::Frontier;
use crate::{GENESIS, Hash, charge, checkpoint, row};
use baton_proto::state::{
    Attempt, Charge, Checkpoint, Correction, LedgerRow, Posting, Price, UsageRecord, UsageStatus, ledger_row::Body,
};

/// Rows of a period of [`ledger`].
pub const PERIOD: u64 = 3;

pub struct Ledger {
    pub rows: Vec<LedgerRow>,
    pub prices: Vec<Price>,
    /// After rows 3, 6, …
    pub checkpoints: Vec<Checkpoint>,
    pub key: [u8; 32],
}

pub fn price() -> Price {
    let mut price = Price {
        model: "demo".into(),
        service_tier: "default".into(),
        currency: "USD".into(),
        input_nano_per_mtok: 20_000_000_000,
        cached_input_nano_per_mtok: 5_000_000_001,
        output_nano_per_mtok: 80_000_000_000,
        effective_from_unix_ms: 1_763_000_000_000,
        ..Price::default()
    };
    price.id = row::price_id(&price);
    price
}

/// Every field set, each to another value.
pub fn full_record() -> UsageRecord {
    UsageRecord {
        request_id: "chatcmpl-1".into(),
        model: "demo".into(),
        status: 1,
        prompt_tokens: 10,
        cached_tokens: 4,
        completion_tokens: 7,
        prefill_worker_id: "prefill-0".into(),
        decode_worker_id: "decode-0".into(),
        started_unix_ms: 1_764_000_000_000,
        settled_unix_ms: 1_764_000_000_500,
        attempts: 2,
        sampled_tokens: 8,
        reasoning_tokens: 3,
        accepted_prediction_tokens: 5,
        rejected_prediction_tokens: 6,
        organization_id: "org".into(),
        project_id: "proj".into(),
        key_id: "key".into(),
        user: "user".into(),
        revision: "rev".into(),
        endpoint: "/v1/chat/completions".into(),
        service_tier: "default".into(),
        attempt_list: vec![Attempt {
            prefill_worker_id: "prefill-1".into(),
            decode_worker_id: "decode-1".into(),
            decode_epoch: 9,
            tokens: 11,
        }],
        postings: vec![Posting {
            budget_id: "budget".into(),
            slice_id: "slice".into(),
            reserved_nano: 12,
        }],
        idempotency_key_sha256: vec![1; 32].into(),
        request_sha256: vec![2; 32].into(),
        price_id: "price".into(),
    }
}

/// A ledger of `count` rows: every fourth corrects the one before, every fifth failed before its first token, and the
/// second has no price.
pub fn ledger(count: u64) -> Ledger {
    let (price, key) = (price(), SigningKey::from_seed(&[7; 32]));
    let mut ledger = Ledger {
        rows: Vec::new(),
        prices: vec![price.clone()],
        checkpoints: Vec::new(),
        key: key.public_key(),
    };
    let (mut previous, mut frontier) = (GENESIS, Frontier::new());
    for n in 1..=count {
        let (body, charge) = if n % 4 == 0 {
            correction(ledger.rows.last().expect("row 4 is not the first"))
        } else {
            let record = UsageRecord {
                request_id: format!("chatcmpl-{n}"),
                status: if n % 5 == 0 {
                    UsageStatus::Failed
                } else {
                    UsageStatus::Completed
                }
                .into(),
                completion_tokens: if n % 5 == 0 {
                    0
                } else {
                    7 + u32::try_from(n).expect("small")
                },
                price_id: if n == 2 { String::new() } else { price.id.clone() },
                user: "Ann \"A\", Bob\n".into(),
                started_unix_ms: 1_764_000_000_000 + n,
                ..full_record()
            };
            let charge = charge::of_record(&record, (n != 2).then_some(&price)).expect("in range");
            (Body::Usage(record), charge)
        };
        let row = row::seal(&previous, n, 40 + n, 1_764_000_001_000 + n, body, charge);
        previous = row.hash.as_ref().try_into().expect("32 bytes");
        frontier.push(&previous);
        ledger.rows.push(row);
        if n % PERIOD == 0 {
            let before: Hash = ledger.checkpoints.last().map_or(GENESIS, checkpoint::hash);
            let mut next = Checkpoint {
                first_sequence: n + 1 - PERIOD,
                last_sequence: n,
                merkle_root: frontier.root().to_vec().into(),
                last_hash: previous.to_vec().into(),
                at_unix_ms: 1_764_000_002_000 + n,
                previous_hash: before.to_vec().into(),
                ..Checkpoint::default()
            };
            key.sign(&mut next);
            ledger.checkpoints.push(next);
            frontier = Frontier::new();
        }
    }
    ledger
}

fn correction(amended: &LedgerRow) -> (Body, Charge) {
    let charge = amended.charge.clone().unwrap_or_default();
    let Some(Body::Usage(record)) = &amended.body else {
        panic!("only usage is corrected here")
    };
    let correction = Correction {
        request_id: record.request_id.clone(),
        sequence: amended.sequence,
        completion_tokens: -1,
        output_nano: -80_000,
        reason: "one token was counted twice".into(),
        correction_id: format!("correction-{}", amended.sequence),
        ..Correction::default()
    };
    (Body::Correction(correction), charge::of_correction(&charge))
}
