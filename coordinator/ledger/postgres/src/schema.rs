//! Tables and statements. Rows have the columns of [`baton_ledger::export::columns`]; money is `numeric(38,9)`, exact. Values of
//! single inserts go as text and are cast by the server, so that no number passes through a smaller type.

use baton_ledger::export::columns::{COLUMNS, Kind};
use baton_ledger::money::Nano;
use baton_ledger::{checkpoint, hex};
use baton_proto::state::{Checkpoint, Price};

/// Version of the tables.
pub const FORMAT: i32 = 1;

/// Reads the cursor.
pub const CURSOR: &str = "SELECT last_sequence, last_hash, checkpoints_after FROM baton_ledger_cursor";

/// Moves it.
pub const MOVE_CURSOR: &str = "UPDATE baton_ledger_cursor \
     SET last_sequence = $1::text::bigint, last_hash = $2::text, checkpoints_after = $3::text::bigint, moved_at = now()";

/// A price that is there already is the same: its id says what it is.
pub const INSERT_PRICE: &str = "INSERT INTO baton_ledger_prices VALUES ($1::text, $2::text, $3::text, $4::text, \
     $5::text::numeric, $6::text::numeric, $7::text::numeric, to_timestamp($8::text::numeric / 1000), \
     to_timestamp(nullif($9::text::numeric, 0) / 1000)) ON CONFLICT (id) DO NOTHING";

/// A period is sealed once.
pub const INSERT_CHECKPOINT: &str = "INSERT INTO baton_ledger_checkpoints VALUES ($1::text::bigint, $2::text::bigint, $3::text, \
     $4::text, to_timestamp($5::text::numeric / 1000), $6::text, $7::text, $8::text, $9::text)";

/// Makes all tables that are not there, in one transaction.
pub fn create() -> String {
    let columns = COLUMNS.map(|(name, kind)| {
        let kind = match kind {
            Kind::Text => "text NOT NULL",
            Kind::Integer => "bigint NOT NULL",
            Kind::OptionalInteger => "bigint",
            Kind::Money => "numeric(38,9) NOT NULL",
            Kind::Time => "timestamptz NOT NULL",
            Kind::OptionalTime => "timestamptz",
        };
        format!("{name} {kind}")
    });
    let none = hex(&baton_ledger::GENESIS);
    // The advisory lock keeps two exporters from making the same table at once, which PostgreSQL does not.
    format!(
        "BEGIN;
         SELECT pg_advisory_xact_lock(hashtext('baton_ledger'));
         CREATE TABLE IF NOT EXISTS baton_ledger_rows ({}, PRIMARY KEY (sequence));
         CREATE UNIQUE INDEX IF NOT EXISTS baton_ledger_one_row_per_request ON baton_ledger_rows (request_id) WHERE kind = 'usage';
         CREATE INDEX IF NOT EXISTS baton_ledger_rows_by_project ON baton_ledger_rows (project_id, at);
         CREATE TABLE IF NOT EXISTS baton_ledger_prices (id text PRIMARY KEY, model text NOT NULL, service_tier text NOT NULL,
             currency text NOT NULL, input_per_mtok numeric(38,9) NOT NULL, cached_input_per_mtok numeric(38,9) NOT NULL,
             output_per_mtok numeric(38,9) NOT NULL, effective_from timestamptz NOT NULL, effective_to timestamptz);
         CREATE TABLE IF NOT EXISTS baton_ledger_checkpoints (first_sequence bigint NOT NULL, last_sequence bigint PRIMARY KEY,
             merkle_root text NOT NULL, last_hash text NOT NULL, at timestamptz NOT NULL, public_key text NOT NULL,
             signature text NOT NULL, previous_hash text NOT NULL, hash text NOT NULL);
         CREATE TABLE IF NOT EXISTS baton_ledger_cursor (one boolean PRIMARY KEY DEFAULT true CHECK (one), format int NOT NULL,
             last_sequence bigint NOT NULL, last_hash text NOT NULL, checkpoints_after bigint NOT NULL,
             moved_at timestamptz NOT NULL DEFAULT now());
         INSERT INTO baton_ledger_cursor VALUES (true, {FORMAT}, 0, '{none}', 0) ON CONFLICT DO NOTHING;
         COMMIT;",
        columns.join(", ")
    )
}

/// Takes rows as CSV. An empty field of a text column is the empty text, of others nothing.
pub fn copy() -> String {
    let names = COLUMNS.map(|(name, _)| name).join(", ");
    let texts = COLUMNS
        .iter()
        .filter(|(_, kind)| *kind == Kind::Text)
        .map(|(name, _)| *name);
    let texts = texts.collect::<Vec<_>>().join(", ");
    format!("COPY baton_ledger_rows ({names}) FROM STDIN (FORMAT csv, FORCE_NOT_NULL ({texts}))")
}

/// Values of [`INSERT_PRICE`].
pub fn price(price: &Price) -> [String; 9] {
    let amount = |nano: u64| Nano::from(nano).to_string();
    [
        price.id.clone(),
        price.model.clone(),
        price.service_tier.clone(),
        price.currency.clone(),
        amount(price.input_nano_per_mtok),
        amount(price.cached_input_nano_per_mtok),
        amount(price.output_nano_per_mtok),
        price.effective_from_unix_ms.to_string(),
        price.effective_to_unix_ms.to_string(),
    ]
}

/// Values of [`INSERT_CHECKPOINT`].
pub fn checkpoint(checkpoint: &Checkpoint) -> [String; 9] {
    [
        checkpoint.first_sequence.to_string(),
        checkpoint.last_sequence.to_string(),
        hex(&checkpoint.merkle_root),
        hex(&checkpoint.last_hash),
        checkpoint.at_unix_ms.to_string(),
        hex(&checkpoint.public_key),
        hex(&checkpoint.signature),
        hex(&checkpoint.previous_hash),
        hex(&checkpoint::hash(checkpoint)),
    ]
}
