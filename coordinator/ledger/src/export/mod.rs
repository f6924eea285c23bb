//! Exports: what billing systems, warehouses and people read. All are streaming writers behind one trait; amounts are whole
//! nano-units or exact decimals, never floats.

pub mod cloudevents;
pub mod columns;
pub mod csv;
pub mod focus;
pub mod jsonl;
pub mod parquet;

use baton_proto::state::{Charge, Checkpoint, Correction, LedgerRow, Price, UsageRecord, ledger_row::Body};
use std::fmt::Write as _;
use std::io::Write;

/// Why an export fails.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The file cannot be written.
    #[error("cannot write: {0}")]
    Io(#[from] std::io::Error),
    /// The Parquet writer refuses.
    #[error("cannot write Parquet: {0}")]
    Parquet(#[from] ::parquet::errors::ParquetError),
    /// The CSV writer refuses.
    #[error("cannot write CSV: {0}")]
    Csv(#[from] ::csv::Error),
    /// A row that cannot be exported.
    #[error("row {0} cannot be exported: {1}; ask for it again, or verify the ledger")]
    Row(u64, &'static str),
}

/// Takes rows in order. Prices come before the first row that is charged by them, checkpoints after their rows; formats
/// that have no place for these ignore them.
pub trait Export {
    /// A price that later rows may be charged by.
    ///
    /// # Errors
    /// As everything here: [`ExportError`].
    fn price(&mut self, _price: &Price) -> Result<(), ExportError> {
        Ok(())
    }

    /// The next row.
    ///
    /// # Errors
    /// [`ExportError`].
    fn row(&mut self, row: &LedgerRow) -> Result<(), ExportError>;

    /// A checkpoint of rows that came.
    ///
    /// # Errors
    /// [`ExportError`].
    fn checkpoint(&mut self, _checkpoint: &Checkpoint) -> Result<(), ExportError> {
        Ok(())
    }

    /// Makes readers see what came so far, where the format can.
    ///
    /// # Errors
    /// [`ExportError`].
    fn flush(&mut self) -> Result<(), ExportError>;

    /// Ends the export.
    ///
    /// # Errors
    /// [`ExportError`].
    fn finish(self: Box<Self>) -> Result<(), ExportError>;
}

/// The formats by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The verifiable one.
    Jsonl,
    /// One line per row, for spreadsheets and everything else.
    Csv,
    /// The same columns, typed, for warehouses.
    Parquet,
    /// One event per row, as OpenMeter takes them.
    CloudEvents,
    /// One line per row and class of tokens, FOCUS 1.2.
    Focus,
}

impl Format {
    /// All of them, with the names people type.
    pub const ALL: [(&str, Self); 5] = [
        ("jsonl", Self::Jsonl),
        ("csv", Self::Csv),
        ("parquet", Self::Parquet),
        ("cloudevents", Self::CloudEvents),
        ("focus", Self::Focus),
    ];

    /// A writer of this format.
    ///
    /// # Errors
    /// If the first bytes cannot be written.
    pub fn writer<'a, W: Write + Send + 'a>(self, out: W) -> Result<Box<dyn Export + 'a>, ExportError> {
        Ok(match self {
            Self::Jsonl => Box::new(jsonl::Jsonl::new(out)),
            Self::Csv => Box::new(csv::Csv::new(out)?),
            Self::Parquet => Box::new(parquet::Parquet::new(out)?),
            Self::CloudEvents => Box::new(cloudevents::CloudEvents::new(out)),
            Self::Focus => Box::new(focus::Focus::new(out)?),
        })
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL
            .iter()
            .find(|(name, _)| *name == text)
            .map(|(_, format)| *format);
        known.ok_or_else(|| {
            format!(
                "no such format; there are {}",
                Self::ALL.map(|(name, _)| name).join(", ")
            )
        })
    }
}

/// A row without its `oneof`, as flat formats want it: of a correction, everything but the request and the differences is
/// empty.
pub(crate) struct Flat<'a> {
    pub row: &'a LedgerRow,
    pub usage: UsageRecord,
    pub correction: Option<&'a Correction>,
    pub charge: Charge,
    pub prompt_tokens: i64,
    pub cached_tokens: i64,
    pub completion_tokens: i64,
}

impl<'a> Flat<'a> {
    pub fn of(row: &'a LedgerRow) -> Result<Self, ExportError> {
        let charge = row.charge.clone().unwrap_or_default();
        match &row.body {
            Some(Body::Usage(record)) => Ok(Self {
                row,
                correction: None,
                charge,
                prompt_tokens: record.prompt_tokens.into(),
                cached_tokens: record.cached_tokens.into(),
                completion_tokens: record.completion_tokens.into(),
                usage: record.clone(),
            }),
            Some(Body::Correction(correction)) => Ok(Self {
                row,
                usage: UsageRecord {
                    request_id: correction.request_id.clone(),
                    ..UsageRecord::default()
                },
                correction: Some(correction),
                charge,
                prompt_tokens: correction.prompt_tokens,
                cached_tokens: correction.cached_tokens,
                completion_tokens: correction.completion_tokens,
            }),
            None => Err(ExportError::Row(row.sequence, "it has no body")),
        }
    }

    /// `usage` or `correction`.
    pub fn kind(&self) -> &'static str {
        if self.correction.is_some() {
            "correction"
        } else {
            "usage"
        }
    }

    /// Name of the status; empty for a correction.
    pub fn status(&self) -> String {
        if self.correction.is_some() {
            String::new()
        } else {
            crate::json::status_name(self.usage.status)
        }
    }
}

/// A time as RFC 3339 in UTC with milliseconds: `2026-11-24T15:00:00.000Z`. Times beyond the year 9999 print as its last
/// millisecond.
pub(crate) fn rfc3339(unix_ms: u64) -> String {
    let time = date_time(unix_ms);
    let mut text = String::with_capacity(24);
    let (date, clock) = (time.date(), time.time());
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
        date.year(),
        u8::from(date.month()),
        date.day(),
        clock.hour(),
        clock.minute(),
        clock.second(),
        clock.millisecond()
    );
    text
}

/// A time in UTC, at most the last millisecond of the year 9999.
pub(crate) fn date_time(unix_ms: u64) -> time::OffsetDateTime {
    /// 9999-12-31T23:59:59.999Z
    const LAST: u64 = 253_402_300_799_999;
    time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms.min(LAST)) * 1_000_000)
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What a format makes of the small ledger of `rows` rows.
    pub fn exported(format: Format, rows: u64) -> Vec<u8> {
        let ledger = crate::tests::ledger(rows);
        let mut out = Vec::new();
        let mut writer = format.writer(&mut out).expect("memory is writable");
        for price in &ledger.prices {
            writer.price(price).expect("memory is writable");
        }
        for row in &ledger.rows {
            writer.row(row).expect("memory is writable");
            for checkpoint in ledger.checkpoints.iter().filter(|c| c.last_sequence == row.sequence) {
                writer.checkpoint(checkpoint).expect("memory is writable");
            }
        }
        writer.finish().expect("memory is writable");
        out
    }

    #[test]
    fn times_print_in_utc() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339(1_764_000_000_501), "2025-11-24T16:00:00.501Z");
        assert_eq!(rfc3339(u64::MAX), "9999-12-31T23:59:59.999Z");
    }

    #[test]
    fn formats_have_names() {
        for (name, format) in Format::ALL {
            assert_eq!(name.parse(), Ok(format));
        }
        assert!("xml".parse::<Format>().is_err_and(|message| message.contains("jsonl")));
    }
}
