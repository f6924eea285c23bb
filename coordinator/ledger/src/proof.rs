//! An inclusion proof: that one request stands in the ledger, with this content and this charge. A small JSON file that
//! verifies offline with nothing but the public key, and shows nothing of other requests but hashes.
//!
//! It holds the row, the price it was charged by, the checkpoint of its period, and the audit path from the row to the
//! checkpoint's Merkle root.

use crate::checkpoint::{self, CheckpointError, PUBLIC_KEY_BYTES};
use crate::export::jsonl::Line;
use crate::json::{CheckpointJson, PriceJson, RowJson};
use crate::merkle::{Prover, root_of_path};
use crate::verify::{Lines, Problem, VerifyError, check_charge, check_hashes};
use crate::{Hash, charge, hash_from_hex, hex, row};
use baton_proto::state::{Checkpoint, LedgerRow, Price, UsageRecord, ledger_row::Body};
use serde::{Deserialize, Serialize};
use std::io::BufRead;

/// The file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    /// `baton-ledger-proof`.
    pub format: String,
    /// Of this file's shape.
    pub version: u32,
    /// The row.
    pub row: RowJson,
    /// What it was charged by, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<PriceJson>,
    /// The signed period it is in.
    pub checkpoint: CheckpointJson,
    /// Hashes beside the way from the row up to the root, as hexadecimal digits.
    pub path: Vec<String>,
}

/// What every proof names.
const FORMAT: &str = "baton-ledger-proof";
/// Version of the file.
const VERSION: u32 = 1;

/// Why there is no proof, or why it does not hold.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// The export cannot be read.
    #[error(transparent)]
    Export(#[from] VerifyError),
    /// No row of that request.
    #[error("the export has no row of the request {0:?}")]
    NoRequest(String),
    /// No checkpoint covers it.
    #[error("row {0} is in no checkpoint of the export; export again once its period is sealed")]
    NotSealed(u64),
    /// The export begins inside the period.
    #[error("the period {first}..={last} is not whole in the export; export from row {first}")]
    PartPeriod {
        /// First row of the period.
        first: u64,
        /// Its last row.
        last: u64,
    },
    /// Another kind of file.
    #[error("this is not version 1 of a baton inclusion proof")]
    Format,
    /// The row is not what its hashes say.
    #[error("row {0}: {1}")]
    Row(u64, Problem),
    /// The checkpoint is not what its signature says.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Signed by somebody else.
    #[error("the checkpoint is signed by {0}, which is none of the keys given")]
    UnknownKey(String),
    /// The path does not lead to the root.
    #[error(
        "row {0} does not lead to the signed Merkle root: it is not in this checkpoint's period, or the proof was changed"
    )]
    NotIncluded(u64),
}

/// Makes the proof for a request from an export (JSON lines), in two passes; `open` opens the export. Only the rows of the
/// request's period are looked at closely, so verify the export before.
///
/// # Errors
/// [`ProofError`]; a proof that is returned holds.
pub fn prove<R: BufRead>(open: impl Fn() -> std::io::Result<R>, request_id: &str) -> Result<Proof, ProofError> {
    let found = find(&open, request_id)?;
    let Found { row, price, checkpoint } = found;
    let (first, last) = (checkpoint.first_sequence, checkpoint.last_sequence);
    let unprovable = || ProofError::PartPeriod { first, last };
    let mut prover = row
        .sequence
        .checked_sub(first)
        .and_then(|index| Prover::new(index, last.checked_sub(first)?.checked_add(1)?))
        .ok_or_else(unprovable)?;
    for_each_line(&open, |line| {
        if let Line::Row(row) = line
            && (first..=last).contains(&row.sequence())
        {
            let row = LedgerRow::from(*row);
            prover.push(&check_hashes(&row)?);
        }
        Ok(true)
    })?;
    let path = prover.finish().ok_or_else(unprovable)?;
    let proof = Proof {
        format: FORMAT.to_owned(),
        version: VERSION,
        row: row.into(),
        price: price.map(PriceJson),
        path: path.iter().map(|hash| hex(hash)).collect(),
        checkpoint: CheckpointJson(checkpoint),
    };
    let signer = proof.checkpoint.0.public_key.as_ref().try_into();
    check(
        &proof,
        &[signer.map_err(|_| CheckpointError::BadLength("the public key"))?],
    )?;
    Ok(proof)
}

struct Found {
    row: LedgerRow,
    price: Option<Price>,
    checkpoint: Checkpoint,
}

fn find<R: BufRead>(open: &impl Fn() -> std::io::Result<R>, request_id: &str) -> Result<Found, ProofError> {
    let (mut prices, mut row, mut checkpoint) = (Vec::new(), None::<LedgerRow>, None);
    for_each_line(open, |line| {
        match (line, &row) {
            (Line::Price(PriceJson(price)), None) => prices.push(price),
            (Line::Row(found), None) => {
                let found = LedgerRow::from(*found);
                if usage(&found).is_some_and(|record| record.request_id == request_id) {
                    row = Some(found);
                }
            }
            (Line::Checkpoint(CheckpointJson(next)), Some(row)) if next.last_sequence >= row.sequence => {
                checkpoint = Some(next);
                return Ok(false);
            }
            _ => {}
        }
        Ok(true)
    })?;
    let row = row.ok_or_else(|| ProofError::NoRequest(request_id.to_owned()))?;
    let checkpoint = checkpoint.ok_or(ProofError::NotSealed(row.sequence))?;
    let price = usage(&row).and_then(|record| prices.into_iter().find(|price| price.id == record.price_id));
    Ok(Found { row, price, checkpoint })
}

fn usage(row: &LedgerRow) -> Option<&UsageRecord> {
    match &row.body {
        Some(Body::Usage(record)) => Some(record),
        _ => None,
    }
}

/// Calls `each` with every line until it says that it has seen enough.
fn for_each_line<R: BufRead>(
    open: &impl Fn() -> std::io::Result<R>,
    mut each: impl FnMut(Line) -> Result<bool, Problem>,
) -> Result<(), VerifyError> {
    let reader = open().map_err(|error| VerifyError {
        line: 0,
        sequence: None,
        problem: error.into(),
    })?;
    let mut lines = Lines::new(reader);
    loop {
        let line = lines.next().map_err(|problem| VerifyError {
            line: lines.number,
            sequence: None,
            problem,
        })?;
        let Some(line) = line else { return Ok(()) };
        let sequence = line.sequence();
        match each(line) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(problem) => {
                return Err(VerifyError {
                    line: lines.number,
                    sequence,
                    problem,
                });
            }
        }
    }
}

/// Checks a proof against public keys, one of which must have signed it: that the row is what its hashes say, that its
/// charge is what the rule gives under the price, and that the row is in the signed period. Returns the row, which can be
/// believed then.
///
/// # Errors
/// [`ProofError`], the first thing that does not hold.
pub fn check(proof: &Proof, keys: &[[u8; PUBLIC_KEY_BYTES]]) -> Result<LedgerRow, ProofError> {
    if proof.format != FORMAT || proof.version != VERSION {
        return Err(ProofError::Format);
    }
    let row = LedgerRow::from(proof.row.clone());
    let sequence = row.sequence;
    let wrong = |problem| ProofError::Row(sequence, problem);
    let hash = check_hashes(&row).map_err(wrong)?;
    let record = usage(&row).ok_or(wrong(Problem::Body))?;
    let price = proof.price.as_ref().map(|PriceJson(price)| price);
    if let Some(price) = price {
        let expected = row::price_id(price);
        if price.id != expected {
            return Err(wrong(Problem::PriceId {
                expected,
                found: price.id.clone(),
            }));
        }
    }
    let price = price.filter(|price| price.id == record.price_id);
    check_charge(record, &row.charge.clone().unwrap_or_default(), price).map_err(wrong)?;
    let CheckpointJson(checkpoint) = &proof.checkpoint;
    checkpoint::verify_signature(checkpoint)?;
    if !keys.iter().any(|key| checkpoint.public_key.as_ref() == key) {
        return Err(ProofError::UnknownKey(hex(&checkpoint.public_key)));
    }
    let path: Option<Vec<Hash>> = proof.path.iter().map(|text| hash_from_hex(text)).collect();
    let root = path.and_then(|path| {
        let index = sequence.checked_sub(checkpoint.first_sequence)?;
        let leaves = checkpoint
            .last_sequence
            .checked_sub(checkpoint.first_sequence)?
            .checked_add(1)?;
        root_of_path(&hash, index, leaves, &path)
    });
    if root.is_none_or(|root| checkpoint.merkle_root.as_ref() != root) {
        return Err(ProofError::NotIncluded(sequence));
    }
    Ok(row)
}

/// The row in words, for people who check a proof.
pub fn describe(row: &LedgerRow) -> String {
    let charge = row.charge.clone().unwrap_or_default();
    let total = crate::money::Nano(i128::try_from(charge::total(&charge)).unwrap_or(i128::MAX));
    let Some(record) = usage(row) else {
        return format!("row {}", row.sequence);
    };
    format!(
        "row {}: request {} of {} at {}: {} prompt tokens ({} cached), {} completion tokens, {}: {total} {}",
        row.sequence,
        record.request_id,
        record.model,
        crate::export::rfc3339(row.at_unix_ms),
        record.prompt_tokens,
        record.cached_tokens,
        record.completion_tokens,
        crate::json::status_name(record.status),
        charge.currency,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::{Format, tests::exported};
    use crate::tests::ledger;

    #[test]
    fn every_request_of_a_sealed_period_is_proved() {
        let (bytes, ledger) = (exported(Format::Jsonl, 8), ledger(8));
        for row in &ledger.rows {
            let Some(record) = usage(row) else { continue };
            let proof = prove(|| Ok(bytes.as_slice()), &record.request_id);
            if row.sequence > 6 {
                assert!(matches!(proof, Err(ProofError::NotSealed(7))));
                continue;
            }
            let text = serde_json::to_string(&proof.expect("sealed")).expect("plain data");
            let proof: Proof = serde_json::from_str(&text).expect("its own");
            assert_eq!(check(&proof, &[[1; 32], ledger.key]).expect("honest"), *row);
            assert!(matches!(check(&proof, &[[1; 32]]), Err(ProofError::UnknownKey(_))));
            assert!(describe(row).contains(&record.request_id));
        }
        assert!(matches!(
            prove(|| Ok(bytes.as_slice()), "chatcmpl-99"),
            Err(ProofError::NoRequest(_))
        ));
    }

    #[test]
    fn a_changed_proof_does_not_hold() {
        let (bytes, key) = (exported(Format::Jsonl, 8), ledger(1).key);
        let proof = prove(|| Ok(bytes.as_slice()), "chatcmpl-5").expect("sealed");
        let refuse = |change: &dyn Fn(&mut Proof)| {
            let mut proof = proof.clone();
            change(&mut proof);
            check(&proof, &[key]).expect_err("changed")
        };
        let edit = |proof: &mut Proof, edit: &dyn Fn(&mut LedgerRow)| {
            let mut row = LedgerRow::from(proof.row.clone());
            edit(&mut row);
            proof.row = row.into();
        };
        let error = refuse(&|proof| {
            edit(proof, &|row| {
                row.charge = Some(ledger(1).rows[0].charge.clone().expect("set"))
            })
        });
        assert!(matches!(error, ProofError::Row(5, Problem::Hash { .. })));
        // With its hash mended it is no longer in the tree; the charge is caught even before.
        let error = refuse(&|proof| {
            edit(proof, &|row| {
                row.charge.as_mut().expect("set").output_nano += 1;
                row.hash = row::row_hash(row).to_vec().into();
            });
        });
        assert!(matches!(error, ProofError::Row(5, Problem::Charge { .. })));
        let error = refuse(&|proof| {
            edit(proof, &|row| {
                row.at_unix_ms += 1;
                row.hash = row::row_hash(row).to_vec().into();
            });
        });
        assert!(matches!(error, ProofError::NotIncluded(5)));
        assert!(matches!(
            refuse(&|proof| proof.path[0] = "00".repeat(32)),
            ProofError::NotIncluded(5)
        ));
        assert!(matches!(
            refuse(&|proof| proof.path.clear()),
            ProofError::NotIncluded(5)
        ));
        assert!(matches!(
            refuse(&|proof| proof.price = None),
            ProofError::Row(5, Problem::NoPrice(_))
        ));
        assert!(matches!(
            refuse(&|proof| proof.checkpoint.0.last_sequence += 1),
            ProofError::Checkpoint(CheckpointError::BadSignature { .. })
        ));
        assert!(matches!(refuse(&|proof| proof.version = 2), ProofError::Format));
    }
}
