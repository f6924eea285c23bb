//! The ledger into PostgreSQL, exactly once: rows, prices and checkpoints are written in one transaction with the cursor
//! that says how far they go. Killed at any point, the exporter goes on where the last committed transaction ended.
//!
//! Invariants:
//!
//! 1. The cursor's position is that of the last row in the table, after every commit.
//! 2. A batch is written only where the cursor stands: [`Sink::write`] locks it, compares it with where the batch begins, and
//!    refuses to write if somebody else has moved it.
//! 3. A commit whose answer was lost is either there or not; who reconnects reads the cursor and knows.
//!
//! Deliberately not here: where rows come from. A [`Reader`](baton_ledger::feed::Reader) has checked them before.
#![forbid(unsafe_code)]

mod connect;
mod schema;

pub use connect::connect;

use baton_ledger::export::{Export, csv::Csv};
use baton_ledger::feed::{Item, Position};
use baton_ledger::{hash_from_hex, hex};
use futures_util::SinkExt;
use std::pin::pin;
use tokio_postgres::{Client, Transaction};

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The address is none.
    #[error("the PostgreSQL address is wrong: {0}; it looks like postgres://user@host/database")]
    Address(#[source] tokio_postgres::Error),
    /// No certificates to check the server's with.
    #[error("cannot read certificates to check PostgreSQL's with: {0}")]
    Certificates(String),
    /// The server, or the way there.
    #[error("PostgreSQL: {}", describe(.0))]
    Postgres(#[from] tokio_postgres::Error),
    /// A row has no place in the table.
    #[error(transparent)]
    Export(#[from] baton_ledger::export::ExportError),
    /// Another exporter writes to the same tables, or they were changed by hand.
    #[error("the table stands at row {found}, not {expected}: another exporter writes there too; run one")]
    Moved {
        /// Where the batch begins.
        expected: u64,
        /// Where the table ends.
        found: u64,
    },
    /// The tables are not ours, or of another version.
    #[error("the tables of the ledger in PostgreSQL are not what this version writes: {0}")]
    Schema(&'static str),
}

impl SinkError {
    /// Whether it may pass by itself: the connection broke, or the server is starting or stopping.
    pub fn is_passing(&self) -> bool {
        let Self::Postgres(error) = self else { return false };
        match error.code() {
            // Classes 08 (connection), 57P0x (shutdown, crash, start), 53 (resources), 40 (rollback).
            Some(code) => ["08", "57P0", "53", "40"]
                .iter()
                .any(|class| code.code().starts_with(class)),
            None => true,
        }
    }
}

/// The server's own message; the library's says only that there was one.
fn describe(error: &tokio_postgres::Error) -> String {
    let mut text = error.to_string();
    if let Some(cause) = std::error::Error::source(error) {
        text = format!("{text}: {cause}");
    }
    text
}

/// The tables of one ledger.
pub struct Sink {
    client: Client,
    copy: String,
}

impl Sink {
    /// Over a connection to the database; makes the tables unless they are there.
    ///
    /// # Errors
    /// [`SinkError`].
    pub async fn open(client: Client) -> Result<Self, SinkError> {
        client.batch_execute(&schema::create()).await?;
        let row = client.query_one("SELECT format FROM baton_ledger_cursor", &[]).await?;
        if row.try_get::<_, i32>(0)? != schema::FORMAT {
            return Err(SinkError::Schema(
                "another format; export into another database or schema",
            ));
        }
        Ok(Self {
            client,
            copy: schema::copy(),
        })
    }

    /// How far the tables go.
    ///
    /// # Errors
    /// [`SinkError`].
    pub async fn position(&self) -> Result<Position, SinkError> {
        let row = self.client.query_one(schema::CURSOR, &[]).await?;
        read_position(&row)
    }

    /// Writes a batch that begins after `from` and commits it together with the position `to` at its end.
    ///
    /// # Errors
    /// [`SinkError`]. After [`SinkError::Postgres`] the batch may be there or not: connect again and ask for the position.
    pub async fn write(&mut self, from: &Position, to: &Position, items: &[Item]) -> Result<(), SinkError> {
        let transaction = self.client.transaction().await?;
        let lock = format!("{} FOR UPDATE", schema::CURSOR);
        let found = read_position(&transaction.query_one(lock.as_str(), &[]).await?)?;
        if found != *from {
            return Err(SinkError::Moved {
                expected: from.after,
                found: found.after,
            });
        }
        copy_rows(&transaction, &self.copy, items).await?;
        for item in items {
            match item {
                Item::Row(_) => {}
                Item::Price(price) => {
                    let statement = schema::price(price);
                    transaction
                        .execute(schema::INSERT_PRICE, &statement.each_ref().map(|text| text as _))
                        .await?;
                }
                Item::Checkpoint(checkpoint) => {
                    let statement = schema::checkpoint(checkpoint);
                    transaction
                        .execute(schema::INSERT_CHECKPOINT, &statement.each_ref().map(|text| text as _))
                        .await?;
                }
            }
        }
        let position = [
            to.after.to_string(),
            hex(&to.last_hash),
            to.checkpoints_after.to_string(),
        ];
        transaction
            .execute(schema::MOVE_CURSOR, &position.each_ref().map(|text| text as _))
            .await?;
        Ok(transaction.commit().await?)
    }
}

/// Sends the rows as CSV, in the columns the tables have.
async fn copy_rows(transaction: &Transaction<'_>, copy: &str, items: &[Item]) -> Result<(), SinkError> {
    let mut csv = Vec::new();
    let mut writer: Box<dyn Export + Send> = Box::new(Csv::without_header(&mut csv));
    for item in items {
        if let Item::Row(row) = item {
            writer.row(row)?;
        }
    }
    writer.finish()?;
    if csv.is_empty() {
        return Ok(());
    }
    let mut sink = pin!(transaction.copy_in::<_, bytes::Bytes>(copy).await?);
    sink.send(csv.into()).await?;
    sink.finish().await?;
    Ok(())
}

fn read_position(row: &tokio_postgres::Row) -> Result<Position, SinkError> {
    let number = |index| {
        let number = u64::try_from(row.try_get::<_, i64>(index)?);
        number.map_err(|_| SinkError::Schema("a negative cursor"))
    };
    let last_hash = hash_from_hex(row.try_get(1)?).ok_or(SinkError::Schema("the cursor's hash is none"))?;
    Ok(Position {
        after: number(0)?,
        last_hash,
        checkpoints_after: number(2)?,
    })
}
