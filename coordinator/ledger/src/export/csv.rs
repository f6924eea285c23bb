//! CSV (RFC 4180, header line first): one line per row, the columns of [`super::columns`].

use super::columns::{COLUMNS, values};
use super::{Export, ExportError};
use baton_proto::state::LedgerRow;
use std::io::Write;

/// Writes it.
#[derive(Debug)]
pub struct Csv<W: Write>(csv::Writer<W>);

impl<W: Write> Csv<W> {
    /// Writes the header line.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub fn new(out: W) -> Result<Self, ExportError> {
        let mut csv = Self::without_header(out);
        csv.0.write_record(COLUMNS.map(|(name, _)| name))?;
        Ok(csv)
    }

    /// Lines only: what `COPY … FROM STDIN (FORMAT csv)` takes.
    pub fn without_header(out: W) -> Self {
        Self(csv::Writer::from_writer(out))
    }
}

impl<W: Write> Export for Csv<W> {
    fn row(&mut self, row: &LedgerRow) -> Result<(), ExportError> {
        Ok(self.0.write_record(values(row)?.iter().map(ToString::to_string))?)
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
    use super::*;
    use crate::money::parse_nano;
    use crate::totals::Totals;

    #[test]
    fn the_file_says_what_the_rows_say() {
        let bytes = exported(Format::Csv, 9);
        let mut reader = csv::Reader::from_reader(bytes.as_slice());
        let names: Vec<String> = reader.headers().expect("a header").iter().map(str::to_owned).collect();
        assert_eq!(names, COLUMNS.map(|(name, _)| name));
        let column = |name: &str| names.iter().position(|other| other == name).expect("a column");
        let (mut lines, mut total) = (0, 0i128);
        for (record, row) in reader.records().zip(crate::tests::ledger(9).rows) {
            let record = record.expect("well-formed");
            assert_eq!(record.iter().map(str::to_owned).collect::<Vec<_>>(), texts(&row));
            let cost = &record[column("total_cost")];
            let (sign, amount) = cost.strip_prefix('-').map_or((1, cost), |amount| (-1, amount));
            total += sign * i128::from(parse_nano(amount).expect("a decimal"));
            lines += 1;
        }
        assert_eq!(lines, 9);
        let mut totals = Totals::default();
        crate::tests::ledger(9).rows.iter().for_each(|row| totals.add(row));
        assert_eq!(total, totals.currencies["USD"].total().0);
    }

    fn texts(row: &LedgerRow) -> Vec<String> {
        values(row)
            .expect("exportable")
            .iter()
            .map(ToString::to_string)
            .collect()
    }
}
