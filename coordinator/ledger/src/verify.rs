//! Verification of an export, row by row, without trusting who wrote it. Needs the export and public keys, nothing else.
//!
//! What holds after [`Verifier::finish`]:
//!
//! 1. Rows are numbered without gaps, each follows the one before by its hash, and each id and hash is that of what the
//!    row says. Log positions and times never go back.
//! 2. Each charge is what the rule of [`charge`] gives for the record and the price it names; the price has
//!    the id its content gives, is one for that model, and was in effect when the request started.
//! 3. No request is there twice, no correction either, and a correction amends an earlier row.
//! 4. Each checkpoint is signed by one of the keys given, follows the one before, and has the Merkle root and the last hash
//!    that the rows give.
//! 5. The sums at the end are those of the rows.
//!
//! What it cannot show: that rows after the last checkpoint were not made up (they are counted as unsigned), and that the
//! export was not cut off at a checkpoint (compare [`Report::last`] with what the ledger, or an earlier export, says).
//!
//! Memory: the prices, 32 bytes for each row since the last checkpoint, and about 20 for each request. Stops at the first
//! row that is wrong: nothing after it can be believed.

mod problem;

pub use problem::{Problem, VerifyError};

use crate::checkpoint::{self, CheckpointError};
use crate::export::jsonl::{End, Header, Line};
use crate::merkle::Frontier;
use crate::totals::{Amounts, Totals};
use crate::{GENESIS, Hash, charge, hex, prices, row};
use baton_proto::state::{Charge, Checkpoint, LedgerRow, Price, UsageRecord, ledger_row::Body};
use std::collections::{HashMap, HashSet};
use std::io::{BufRead, Read};

/// Longest line read. A row with every attempt it may have is under 100 KiB.
pub const LINE_BYTES_MAX: u64 = 1 << 20;

/// What was verified.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// First row; 0 if there is none.
    pub first: u64,
    /// Last row; 0 if there is none.
    pub last: u64,
    /// Its hash.
    pub last_hash: Hash,
    /// Checkpoints, all signed by keys given.
    pub checkpoints: u64,
    /// Last row that a checkpoint covers; 0 if none does.
    pub signed_through: u64,
    /// Whether the first checkpoint's period begins before the export, so that its Merkle root could not be compared; its
    /// last hash was, which covers the same rows.
    pub starts_inside_period: bool,
    /// Whether the export says that it is at its end. Otherwise it was cut off, or is still being written.
    pub complete: bool,
    /// Sums over all rows.
    pub totals: Totals,
}

/// Takes an export line by line.
#[derive(Debug)]
pub struct Verifier {
    keys: Vec<Hash>,
    header: Option<Header>,
    prices: HashMap<String, Price>,
    /// Hashes of the rows since the last checkpoint, the first of which has number `pending_from`.
    pending: Vec<Hash>,
    pending_from: u64,
    before: Option<(u64, u64)>,
    checkpoint: Option<Checkpoint>,
    /// The first 128 bits of the BLAKE3 of what must be unique.
    seen: HashSet<u128>,
    report: Report,
}

impl Verifier {
    /// Checkpoints must be signed by one of `keys` (Ed25519, 32 bytes each).
    pub fn new(keys: Vec<[u8; checkpoint::PUBLIC_KEY_BYTES]>) -> Self {
        Self {
            keys,
            header: None,
            prices: HashMap::new(),
            pending: Vec::new(),
            pending_from: 1,
            before: None,
            checkpoint: None,
            seen: HashSet::new(),
            report: Report::default(),
        }
    }

    /// Takes the next line.
    ///
    /// # Errors
    /// The first [`Problem`] found in it. The verifier is of no use afterwards.
    pub fn line(&mut self, line: Line) -> Result<(), Problem> {
        if self.report.complete {
            return Err(Problem::AfterEnd);
        }
        match (line, &self.header) {
            (Line::Header(header), None) => self.take_header(header),
            (_, None) => Err(Problem::Header("the first line is not the header of a ledger export")),
            (Line::Header(_), Some(_)) => Err(Problem::Header("a second header")),
            (Line::Price(price), _) => self.take_price(price.0),
            (Line::Row(row), _) => self.take_row(&LedgerRow::from(*row)),
            (Line::Checkpoint(checkpoint), _) => self.take_checkpoint(checkpoint.0),
            (Line::End(end), _) => self.take_end(&end),
        }
    }

    /// What was verified.
    ///
    /// # Errors
    /// If there was not even a header.
    pub fn finish(self) -> Result<Report, Problem> {
        match self.header {
            Some(_) => Ok(self.report),
            None => Err(Problem::Header("the file is empty")),
        }
    }

    fn take_header(&mut self, header: Header) -> Result<(), Problem> {
        if header.format != Header::FORMAT || header.version != Header::VERSION {
            return Err(Problem::Header("this is not version 1 of a baton ledger export"));
        }
        if header.first_sequence == 0 || (header.first_sequence == 1 && header.previous_hash != GENESIS) {
            return Err(Problem::Header("rows start at 1, and nothing stands before the first"));
        }
        self.pending_from = header.first_sequence;
        self.report.last_hash = header.previous_hash;
        self.header = Some(header);
        Ok(())
    }

    fn take_price(&mut self, price: Price) -> Result<(), Problem> {
        let expected = row::price_id(&price);
        if price.id != expected {
            return Err(Problem::PriceId {
                expected,
                found: price.id,
            });
        }
        self.prices.insert(price.id.clone(), price);
        Ok(())
    }

    fn take_row(&mut self, row: &LedgerRow) -> Result<(), Problem> {
        let next = self.pending_from + self.pending.len() as u64;
        if row.sequence != next {
            return Err(Problem::Gap { before: next - 1 });
        }
        let previous = self.report.last_hash;
        if row.previous_hash.as_ref() != previous {
            return Err(Problem::Chain {
                expected: hex(&previous),
                found: hex(&row.previous_hash),
            });
        }
        let hash = check_hashes(row)?;
        if self
            .before
            .is_some_and(|(index, at)| row.raft_index < index || row.at_unix_ms < at)
        {
            return Err(Problem::Backwards);
        }
        let stated = row.charge.clone().unwrap_or_default();
        match &row.body {
            Some(Body::Usage(record)) => {
                self.only_once('r', &record.request_id)?;
                check_charge(record, &stated, self.prices.get(&record.price_id))?;
            }
            Some(Body::Correction(correction)) => {
                self.only_once('c', &correction.correction_id)?;
                let whole = self.header.as_ref().is_some_and(|header| header.first_sequence == 1);
                let known = !whole || self.seen.contains(&fingerprint('r', &correction.request_id));
                if correction.sequence >= row.sequence || !known {
                    return Err(Problem::Amends(correction.sequence, correction.request_id.clone()));
                }
                let expected = charge::of_correction(&stated);
                if stated != expected {
                    return Err(Problem::Charge {
                        expected: describe(&expected),
                        found: describe(&stated),
                    });
                }
                if stated.currency.is_empty() && Amounts::of(row) != Amounts::default() {
                    return Err(Problem::NoCurrency);
                }
            }
            None => return Err(Problem::Body),
        }
        self.report.totals.add(row);
        self.before = Some((row.raft_index, row.at_unix_ms));
        self.pending.push(hash);
        self.report.last = row.sequence;
        self.report.last_hash = hash;
        if self.report.first == 0 {
            self.report.first = row.sequence;
        }
        Ok(())
    }

    fn only_once(&mut self, kind: char, id: &str) -> Result<(), Problem> {
        if self.seen.insert(fingerprint(kind, id)) {
            Ok(())
        } else {
            Err(Problem::Twice(id.to_owned()))
        }
    }

    fn take_checkpoint(&mut self, checkpoint: Checkpoint) -> Result<(), Problem> {
        let (first, last) = (checkpoint.first_sequence, checkpoint.last_sequence);
        // Only the first checkpoint of an export from the middle follows one that is not there.
        let inside = self.checkpoint.is_none() && self.pending_from > 1;
        if inside {
            checkpoint::verify_signature(&checkpoint)?;
            if first == 0 || last < first || first > self.pending_from {
                return Err(CheckpointError::NotContiguous {
                    first,
                    last,
                    before: self.pending_from - 1,
                }
                .into());
            }
        } else {
            checkpoint::verify_after(&checkpoint, self.checkpoint.as_ref())?;
        }
        if !self.keys.iter().any(|key| checkpoint.public_key.as_ref() == key) {
            return Err(Problem::UnknownKey(hex(&checkpoint.public_key)));
        }
        let (from, to) = (self.pending_from, self.pending_from + self.pending.len() as u64 - 1);
        if last < from || last > to {
            return Err(Problem::Uncovered { last, from, to });
        }
        let covered = usize::try_from(last - from + 1).unwrap_or(usize::MAX);
        let period: Vec<Hash> = self.pending.drain(..covered).collect();
        let differs = |what, expected: &Hash, found: &[u8]| Problem::NotSigned {
            first,
            last,
            what,
            expected: hex(expected),
            found: hex(found),
        };
        if let Some(hash) = period
            .last()
            .filter(|hash| checkpoint.last_hash.as_ref() != hash.as_slice())
        {
            return Err(differs("last hash", hash, &checkpoint.last_hash));
        }
        if first == from {
            let mut frontier = Frontier::new();
            period.iter().for_each(|hash| frontier.push(hash));
            if checkpoint.merkle_root.as_ref() != frontier.root() {
                return Err(differs("Merkle root", &frontier.root(), &checkpoint.merkle_root));
            }
        } else {
            self.report.starts_inside_period = true;
        }
        self.pending_from = last + 1;
        self.report.checkpoints += 1;
        self.report.signed_through = last;
        self.checkpoint = Some(checkpoint);
        Ok(())
    }

    fn take_end(&mut self, end: &End) -> Result<(), Problem> {
        let expected = End {
            rows: self.report.totals.requests + self.report.totals.corrections,
            last_hash: self.report.last_hash,
            totals: self.report.totals.clone(),
        };
        if *end != expected {
            let text = |end: &End| serde_json::to_string(end).unwrap_or_default();
            return Err(Problem::End {
                expected: text(&expected),
                found: text(end),
            });
        }
        self.report.complete = true;
        Ok(())
    }
}

/// Checks that a row's id is that of its content and its hash that of its fields, and returns the hash.
///
/// # Errors
/// [`Problem::Body`], [`Problem::Id`] or [`Problem::Hash`].
pub fn check_hashes(row: &LedgerRow) -> Result<Hash, Problem> {
    let id = row::body_id(row.body.as_ref().ok_or(Problem::Body)?);
    if row.id.as_ref() != id {
        return Err(Problem::Id {
            expected: hex(&id),
            found: hex(&row.id),
        });
    }
    let hash = row::row_hash(row);
    if row.hash.as_ref() != hash {
        return Err(Problem::Hash {
            expected: hex(&hash),
            found: hex(&row.hash),
        });
    }
    Ok(hash)
}

/// Checks that a record's charge is what the rule gives under `price`, whose id is that of its content, and that this is a
/// price for the record.
///
/// # Errors
/// [`Problem::NoPrice`], [`Problem::OtherPrice`], [`Problem::Uncharged`] or [`Problem::Charge`].
pub fn check_charge(record: &UsageRecord, stated: &Charge, price: Option<&Price>) -> Result<(), Problem> {
    let price = match price {
        _ if record.price_id.is_empty() => None,
        None => return Err(Problem::NoPrice(record.price_id.clone())),
        Some(price) if !prices::applies(price, &record.model, record.started_unix_ms) => {
            return Err(Problem::OtherPrice(price.id.clone()));
        }
        found => found,
    };
    let expected = charge::of_record(record, price)?;
    if *stated == expected {
        return Ok(());
    }
    Err(Problem::Charge {
        expected: describe(&expected),
        found: describe(stated),
    })
}

fn describe(charge: &Charge) -> String {
    let Charge {
        price_id,
        currency,
        input_nano,
        cached_input_nano,
        output_nano,
    } = charge;
    format!(
        "{input_nano} + {cached_input_nano} + {output_nano} nano-{currency} (input, cached, output; price {price_id:?})"
    )
}

fn fingerprint(kind: char, id: &str) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[kind as u8]).update(id.as_bytes());
    let mut bytes = [0; 16];
    hasher.finalize_xof().fill(&mut bytes);
    u128::from_le_bytes(bytes)
}

/// Reads lines of an export with a bound on their length. Yields what [`Line`] each is, and its number.
pub(crate) struct Lines<R> {
    reader: R,
    buffer: Vec<u8>,
    pub number: u64,
}

impl<R: BufRead> Lines<R> {
    pub fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: Vec::new(),
            number: 0,
        }
    }

    /// The next line, or nothing at the end of the file.
    pub fn next(&mut self) -> Result<Option<Line>, Problem> {
        self.buffer.clear();
        self.number += 1;
        let read = self
            .reader
            .by_ref()
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut self.buffer)?;
        if read == 0 {
            return Ok(None);
        }
        if self.buffer.last() != Some(&b'\n') {
            let longest = read as u64 == LINE_BYTES_MAX;
            return Err(if longest { Problem::LongLine } else { Problem::CutOff });
        }
        Ok(Some(serde_json::from_slice(&self.buffer)?))
    }
}

/// Verifies a whole export. Streams: what it keeps is said at the top of this module.
///
/// # Errors
/// The first thing that is wrong, with its line and row.
pub fn verify(reader: impl BufRead, keys: Vec<[u8; checkpoint::PUBLIC_KEY_BYTES]>) -> Result<Report, VerifyError> {
    let (mut lines, mut verifier) = (Lines::new(reader), Verifier::new(keys));
    loop {
        let line = lines.next().map_err(|problem| VerifyError {
            line: lines.number,
            sequence: None,
            problem,
        })?;
        let Some(line) = line else { break };
        let sequence = line.sequence();
        verifier.line(line).map_err(|problem| VerifyError {
            line: lines.number,
            sequence,
            problem,
        })?;
    }
    verifier.finish().map_err(|problem| VerifyError {
        line: lines.number,
        sequence: None,
        problem,
    })
}

#[cfg(test)]
mod tests;
