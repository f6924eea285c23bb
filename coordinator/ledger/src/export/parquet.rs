//! Parquet, the columns of [`super::columns`] typed: text as UTF-8, numbers as INT64, times as TIMESTAMP, money as DECIMAL(38, 9). Compressed
//! with Snappy, which every reader has.
//!
//! Rows become visible a group at a time; the file is readable once it is finished, not before.

use super::columns::{COLUMNS, Kind, Value, values};
use super::{Export, ExportError};
use baton_proto::state::LedgerRow;
use parquet::basic::{Compression, LogicalType, Repetition, TimeUnit, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, FixedLenByteArray, FixedLenByteArrayType, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use std::io::Write;
use std::sync::Arc;

/// Rows of a group, which is buffered before it is written: about 16 MiB.
const GROUP_ROWS: usize = 16_384;
/// Digits of a decimal in 16 bytes, and how many of them stand after the point.
const PRECISION: i32 = 38;
const SCALE: i32 = 9;

/// Writes it.
pub struct Parquet<W: Write + Send> {
    writer: SerializedFileWriter<W>,
    rows: Vec<Vec<Value>>,
}

fn schema() -> Result<Type, ParquetError> {
    let fields = COLUMNS.map(|(name, kind)| {
        let (physical, logical) = match kind {
            Kind::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
            Kind::Integer | Kind::OptionalInteger => (Physical::INT64, None),
            Kind::Time | Kind::OptionalTime => (Physical::INT64, Some(LogicalType::timestamp(true, TimeUnit::MILLIS))),
            Kind::Money => (
                Physical::FIXED_LEN_BYTE_ARRAY,
                Some(LogicalType::decimal(SCALE, PRECISION)),
            ),
        };
        let repetition = if kind.is_optional() {
            Repetition::OPTIONAL
        } else {
            Repetition::REQUIRED
        };
        let field = Type::primitive_type_builder(name, physical)
            .with_repetition(repetition)
            .with_logical_type(logical);
        let field = match kind {
            Kind::Money => field.with_length(16).with_precision(PRECISION).with_scale(SCALE),
            _ => field,
        };
        field.build().map(Arc::new)
    });
    let fields = fields.into_iter().collect::<Result<Vec<_>, _>>()?;
    Type::group_type_builder("ledger").with_fields(fields).build()
}

impl<W: Write + Send> Parquet<W> {
    /// Starts a file.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub fn new(out: W) -> Result<Self, ExportError> {
        let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
        let writer = SerializedFileWriter::new(out, Arc::new(schema()?), Arc::new(properties))?;
        Ok(Self {
            writer,
            rows: Vec::new(),
        })
    }

    fn write_group(&mut self) -> Result<(), ExportError> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let rows = std::mem::take(&mut self.rows);
        let mut group = self.writer.next_row_group()?;
        let mut index = 0;
        while let Some(mut column) = group.next_column()? {
            let values = rows.iter().filter_map(|row| row.get(index));
            match COLUMNS.get(index).map(|(_, kind)| *kind) {
                Some(Kind::Text) => {
                    let values: Vec<ByteArray> = values
                        .filter_map(|value| match value {
                            Value::Text(text) => Some(ByteArray::from(text.as_str())),
                            _ => None,
                        })
                        .collect();
                    column.typed::<ByteArrayType>().write_batch(&values, None, None)?;
                }
                Some(Kind::Money) => {
                    let values: Vec<FixedLenByteArray> = values
                        .filter_map(|value| match value {
                            Value::Money(amount) => Some(amount.0.to_be_bytes().to_vec().into()),
                            _ => None,
                        })
                        .collect();
                    column
                        .typed::<FixedLenByteArrayType>()
                        .write_batch(&values, None, None)?;
                }
                _ => {
                    let there: Vec<i16> = values.clone().map(|value| i16::from(*value != Value::None)).collect();
                    let values: Vec<i64> = values
                        .filter_map(|value| match value {
                            Value::Integer(number) | Value::Time(number) => Some(*number),
                            _ => None,
                        })
                        .collect();
                    column.typed::<Int64Type>().write_batch(&values, Some(&there), None)?;
                }
            }
            column.close()?;
            index += 1;
        }
        group.close()?;
        Ok(())
    }
}

impl<W: Write + Send> Export for Parquet<W> {
    fn row(&mut self, row: &LedgerRow) -> Result<(), ExportError> {
        self.rows.push(values(row)?);
        if self.rows.len() >= GROUP_ROWS {
            self.write_group()
        } else {
            Ok(())
        }
    }

    fn flush(&mut self) -> Result<(), ExportError> {
        self.writer.flush()?;
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<(), ExportError> {
        self.write_group()?;
        self.writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Format, tests::exported};
    use super::*;
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::Field;

    #[test]
    fn the_file_says_what_the_rows_say() {
        let bytes = bytes::Bytes::from(exported(Format::Parquet, 9));
        let reader = SerializedFileReader::new(bytes).expect("a Parquet file");
        let names: Vec<_> = reader
            .metadata()
            .file_metadata()
            .schema()
            .get_fields()
            .iter()
            .map(|f| f.name().to_owned())
            .collect();
        assert_eq!(names, COLUMNS.map(|(name, _)| name));
        let rows: Vec<_> = reader
            .get_row_iter(None)
            .expect("rows")
            .map(|row| row.expect("readable"))
            .collect();
        assert_eq!(rows.len(), 9);
        for (read, row) in rows.iter().zip(crate::tests::ledger(9).rows) {
            let expected = values(&row).expect("exportable");
            for ((name, found), expected) in read.get_column_iter().zip(&expected) {
                let found = match found {
                    Field::Str(text) => Value::Text(text.clone()),
                    Field::Long(number) => Value::Integer(*number),
                    Field::TimestampMillis(unix_ms) => Value::Time(*unix_ms),
                    Field::Null => Value::None,
                    Field::Decimal(decimal) => {
                        assert_eq!((decimal.scale(), decimal.precision()), (SCALE, PRECISION));
                        let bytes = decimal.data().try_into().expect("16 bytes");
                        Value::Money(crate::money::Nano(i128::from_be_bytes(bytes)))
                    }
                    other => panic!("{name}: {other:?}"),
                };
                assert_eq!(found, *expected, "{name}");
            }
        }
    }

    #[test]
    fn groups_are_written_as_they_fill() {
        let row = crate::tests::ledger(1).rows.remove(0);
        let mut out = Vec::new();
        let mut writer: Box<dyn Export> = Box::new(Parquet::new(&mut out).expect("memory is writable"));
        for _ in 0..GROUP_ROWS + 1 {
            writer.row(&row).expect("memory is writable");
        }
        writer.finish().expect("memory is writable");
        let reader = SerializedFileReader::new(bytes::Bytes::from(out)).expect("a Parquet file");
        assert_eq!(reader.num_row_groups(), 2);
        assert_eq!(reader.metadata().file_metadata().num_rows(), GROUP_ROWS as i64 + 1);
    }
}
