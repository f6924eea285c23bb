//! The verifiable export: JSON lines that hold everything a verifier needs, so that the file stands for itself.
//!
//! ```text
//! {"header":{"format":"baton-ledger","version":1,"first_sequence":1,"previous_hash":"00…"}}
//! {"price":{…}}            before the first row that is charged by it
//! {"row":{…}}              gap-free
//! {"checkpoint":{…}}       after the last row of its period
//! {"end":{"rows":2,"last_hash":"…","totals":{…}}}
//! ```

use super::{Export, ExportError};
use crate::json::{CheckpointJson, PriceJson, RowJson};
use crate::totals::Totals;
use crate::{GENESIS, Hash};
use baton_proto::state::{Checkpoint, LedgerRow, Price, ledger_row::Body};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::Write;

/// One line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Line {
    /// The first.
    Header(Header),
    /// A price that later rows are charged by.
    Price(PriceJson),
    /// A row.
    Row(Box<RowJson>),
    /// A signed period.
    Checkpoint(CheckpointJson),
    /// The last.
    End(End),
}

impl Line {
    /// Number of the row, if it is one.
    pub fn sequence(&self) -> Option<u64> {
        match self {
            Self::Row(row) => Some(row.sequence()),
            _ => None,
        }
    }
}

/// Where the rows begin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// [`Self::FORMAT`].
    pub format: String,
    /// [`Self::VERSION`].
    pub version: u32,
    /// Number of the first row.
    pub first_sequence: u64,
    /// Hash of the row before it; zeros before row 1.
    #[serde(with = "crate::json::hash_hex")]
    pub previous_hash: Hash,
}

impl Header {
    /// What every header names.
    pub const FORMAT: &str = "baton-ledger";
    /// Of the lines' shapes.
    pub const VERSION: u32 = 1;
}

/// What the rows add up to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// Number of rows.
    pub rows: u64,
    /// Hash of the last one.
    #[serde(with = "crate::json::hash_hex")]
    pub last_hash: Hash,
    /// Their sums.
    pub totals: Totals,
}

/// Writes it.
#[derive(Debug)]
pub struct Jsonl<W> {
    out: W,
    last_hash: Option<Hash>,
    /// Prices that no row has used yet.
    unwritten: HashMap<String, Price>,
    totals: Totals,
}

impl<W: Write> Jsonl<W> {
    /// Starts with the first row that comes.
    pub fn new(out: W) -> Self {
        Self {
            out,
            last_hash: None,
            unwritten: HashMap::new(),
            totals: Totals::default(),
        }
    }

    fn line(&mut self, line: &Line) -> Result<(), ExportError> {
        serde_json::to_writer(&mut self.out, line).map_err(std::io::Error::from)?;
        self.out.write_all(b"\n")?;
        Ok(())
    }

    /// The header, unless it is there.
    fn begin(&mut self, first_sequence: u64, previous_hash: Hash) -> Result<(), ExportError> {
        if self.last_hash.is_some() {
            return Ok(());
        }
        self.last_hash = Some(previous_hash);
        let format = Header::FORMAT.to_owned();
        self.line(&Line::Header(Header {
            format,
            version: Header::VERSION,
            first_sequence,
            previous_hash,
        }))
    }
}

impl<W: Write> Export for Jsonl<W> {
    fn price(&mut self, price: &Price) -> Result<(), ExportError> {
        self.unwritten.insert(price.id.clone(), price.clone());
        Ok(())
    }

    fn row(&mut self, row: &LedgerRow) -> Result<(), ExportError> {
        let hash =
            |bytes: &[u8]| Hash::try_from(bytes).map_err(|_| ExportError::Row(row.sequence, "a hash is not 32 bytes"));
        let last_hash = hash(&row.hash)?;
        self.begin(row.sequence, hash(&row.previous_hash)?)?;
        if let Some(Body::Usage(record)) = &row.body
            && let Some(price) = self.unwritten.remove(&record.price_id)
        {
            self.line(&Line::Price(PriceJson(price)))?;
        }
        self.totals.add(row);
        self.last_hash = Some(last_hash);
        self.line(&Line::Row(Box::new(row.clone().into())))
    }

    fn checkpoint(&mut self, checkpoint: &Checkpoint) -> Result<(), ExportError> {
        // One that covers nothing written here would only puzzle a verifier.
        if self.last_hash.is_none() {
            Ok(())
        } else {
            self.line(&Line::Checkpoint(CheckpointJson(checkpoint.clone())))
        }
    }

    fn flush(&mut self) -> Result<(), ExportError> {
        Ok(self.out.flush()?)
    }

    fn finish(mut self: Box<Self>) -> Result<(), ExportError> {
        self.begin(1, GENESIS)?;
        let rows = self.totals.requests + self.totals.corrections;
        let last_hash = self.last_hash.unwrap_or(GENESIS);
        let totals = std::mem::take(&mut self.totals);
        self.line(&Line::End(End {
            rows,
            last_hash,
            totals,
        }))?;
        self.flush()
    }
}
