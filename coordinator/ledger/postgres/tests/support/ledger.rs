//! A ledger of any length, the same in every process.

use baton_ledger::checkpoint::SigningKey;
use baton_ledger::feed::{Page, Query, page};
use baton_ledger::merkle::Frontier;
use baton_ledger::{GENESIS, charge, checkpoint, prices, row};
use baton_proto::state::{Checkpoint, Correction, LedgerRow, Price, UsageRecord, UsageStatus, ledger_row::Body};

/// Rows of a period.
const PERIOD: u64 = 40;

pub struct Ledger {
    pub rows: Vec<LedgerRow>,
    pub prices: Vec<Price>,
    pub checkpoints: Vec<Checkpoint>,
}

impl Ledger {
    /// Of `count` rows; every tenth corrects the one before. Amounts are odd, so that each counts to the nano-unit.
    pub fn new(count: u64) -> Self {
        let price = prices::finish(Price {
            model: "*".into(),
            service_tier: "default".into(),
            currency: "USD".into(),
            input_nano_per_mtok: 20_000_000_007,
            cached_input_nano_per_mtok: 5_000_000_003,
            output_nano_per_mtok: 80_000_000_001,
            ..Price::default()
        })
        .expect("valid");
        let key = SigningKey::from_seed(&[3; 32]);
        let mut ledger = Self {
            rows: Vec::new(),
            prices: vec![price],
            checkpoints: Vec::new(),
        };
        let (mut previous, mut frontier) = (GENESIS, Frontier::new());
        for n in 1..=count {
            let (body, charge) = if n % 10 == 0 {
                ledger.correction()
            } else {
                ledger.usage(n)
            };
            let row = row::seal(&previous, n, 7 + n / 3, 1_764_000_000_000 + n, body, charge);
            previous = row.hash.as_ref().try_into().expect("32 bytes");
            frontier.push(&previous);
            ledger.rows.push(row);
            if n % PERIOD == 0 {
                let mut next = Checkpoint {
                    first_sequence: n + 1 - PERIOD,
                    last_sequence: n,
                    merkle_root: frontier.root().to_vec().into(),
                    last_hash: previous.to_vec().into(),
                    at_unix_ms: 1_764_000_000_000 + n,
                    previous_hash: ledger
                        .checkpoints
                        .last()
                        .map_or(GENESIS, checkpoint::hash)
                        .to_vec()
                        .into(),
                    ..Checkpoint::default()
                };
                key.sign(&mut next);
                ledger.checkpoints.push(next);
                frontier = Frontier::new();
            }
        }
        ledger
    }

    fn usage(&self, n: u64) -> (Body, baton_proto::state::Charge) {
        let price = &self.prices[0];
        let tokens = |salt: u64| u32::try_from(n * salt % 977 + 1).expect("small");
        let record = UsageRecord {
            request_id: format!("chatcmpl-{n}"),
            model: "demo".into(),
            status: UsageStatus::Completed.into(),
            prompt_tokens: 1_000 + tokens(31),
            cached_tokens: tokens(17),
            completion_tokens: tokens(13),
            sampled_tokens: tokens(13),
            attempts: 1,
            started_unix_ms: 1_764_000_000_000,
            project_id: format!("project-{}", n % 3),
            // What a careless text format breaks on.
            user: ["", "Ann \"A\", Bob", "two\nlines", "\\N", "žluťoučký"][usize::try_from(n % 5).expect("small")]
                .into(),
            price_id: price.id.clone(),
            ..UsageRecord::default()
        };
        let charge = charge::of_record(&record, Some(price)).expect("in range");
        (Body::Usage(record), charge)
    }

    fn correction(&self) -> (Body, baton_proto::state::Charge) {
        let amended = self.rows.last().expect("not the first");
        let Some(Body::Usage(record)) = &amended.body else {
            panic!("usage")
        };
        let correction = Correction {
            request_id: record.request_id.clone(),
            sequence: amended.sequence,
            completion_tokens: -1,
            output_nano: -80_001,
            reason: "counted twice".into(),
            correction_id: format!("correction-{}", amended.sequence),
            ..Correction::default()
        };
        (
            Body::Correction(correction),
            charge::of_correction(amended.charge.as_ref().expect("set")),
        )
    }

    /// What a coordinator answers.
    pub fn page(&self, after: u64, checkpoints_after: u64, limit: u32) -> Page {
        let query = Query {
            after,
            checkpoints_after: Some(checkpoints_after),
            limit: Some(limit),
        };
        let rows = self.rows.iter().filter(|row| row.sequence > after).cloned();
        let price = |id: &str| self.prices.iter().find(|price| price.id == id).cloned();
        page(&query, rows, price, self.checkpoints.clone(), self.rows.len() as u64)
    }
}
