//! What can be wrong with an export, in words that say what to look for.

use super::LINE_BYTES_MAX;
use crate::charge;
use crate::checkpoint::CheckpointError;

/// What is wrong, and where.
#[derive(Debug, thiserror::Error)]
#[error("line {line}{}: {problem}", self.sequence.map(|n| format!(", row {n}")).unwrap_or_default())]
pub struct VerifyError {
    /// Line of the file, from 1.
    pub line: u64,
    /// The row it is about, if any.
    pub sequence: Option<u64>,
    /// What is wrong there.
    pub problem: Problem,
}

/// What can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The file cannot be read.
    #[error("the file cannot be read: {0}")]
    Io(#[from] std::io::Error),
    /// A line that is none of ours.
    #[error("not a line of a ledger export: {0}")]
    Syntax(#[from] serde_json::Error),
    /// Beyond [`LINE_BYTES_MAX`].
    #[error("the line is longer than {LINE_BYTES_MAX} bytes")]
    LongLine,
    /// The last line has no end: the file was cut off in it.
    #[error("the line does not end; the file was cut off")]
    CutOff,
    /// The header is missing, doubled, or of another format.
    #[error("{0}")]
    Header(&'static str),
    /// Something after the end line.
    #[error("something follows the end line")]
    AfterEnd,
    /// A row is missing, doubled or out of order.
    #[error("the row before has number {before}; a row was removed, added or moved")]
    Gap {
        /// Number of the row before.
        before: u64,
    },
    /// The row does not follow the one before.
    #[error("its previous_hash is {found}, but the row before has hash {expected}; one of the two was changed")]
    Chain {
        /// Hash of the row before.
        expected: String,
        /// What the row says.
        found: String,
    },
    /// No body, or two.
    #[error("it has no body, or two")]
    Body,
    /// The content was changed.
    #[error("its content gives the id {expected}, but its id is {found}; the content was changed")]
    Id {
        /// Id of the content.
        expected: String,
        /// What the row says.
        found: String,
    },
    /// Something else of the row was changed.
    #[error("its hash should be {expected}, but is {found}; number, log position, charge or time was changed")]
    Hash {
        /// Hash of the row's fields.
        expected: String,
        /// What the row says.
        found: String,
    },
    /// Log position or time goes back.
    #[error("its log position or time is before that of the row before")]
    Backwards,
    /// A price that is not in the export before the row.
    #[error("its price {0:?} is not in the export")]
    NoPrice(String),
    /// The price was changed.
    #[error("the price {found:?} has content that gives the id {expected:?}; it was changed")]
    PriceId {
        /// Id of the content.
        expected: String,
        /// What the price says.
        found: String,
    },
    /// The price is one for something else.
    #[error("its price {0:?} is for another model or time")]
    OtherPrice(String),
    /// The record cannot be charged at all.
    #[error("it cannot be charged: {0}")]
    Uncharged(#[from] charge::ChargeError),
    /// The charge is not what the rule gives.
    #[error("it should be charged {expected}, but is charged {found}")]
    Charge {
        /// By the rule.
        expected: String,
        /// What the row says.
        found: String,
    },
    /// A correction of an amount without a currency.
    #[error("it corrects an amount, but its charge does not say in which currency")]
    NoCurrency,
    /// A request that has a row already.
    #[error("the request {0:?} has a row before this one; a request has one")]
    Twice(String),
    /// A correction of nothing that came before.
    #[error("it amends row {0} of request {1:?}, which is not among the rows before it")]
    Amends(u64, String),
    /// A checkpoint that is wrong in itself or does not follow the one before.
    #[error("{0}")]
    Checkpoint(#[from] CheckpointError),
    /// Signed by somebody else.
    #[error("the checkpoint is signed by {0}, which is none of the keys given")]
    UnknownKey(String),
    /// A checkpoint about rows that are not there (yet).
    #[error("the checkpoint is about rows up to {last}, but the rows before it are {from}..={to}")]
    Uncovered {
        /// Its last row.
        last: u64,
        /// First row since the checkpoint before.
        from: u64,
        /// Last row.
        to: u64,
    },
    /// The rows are not those that were signed.
    #[error(
        "the rows {first}..={last} give the {what} {expected}, but {found} was signed; rows were changed after they were signed"
    )]
    NotSigned {
        /// First row of the period.
        first: u64,
        /// Its last row.
        last: u64,
        /// "Merkle root" or "last hash".
        what: &'static str,
        /// What the rows give.
        expected: String,
        /// What the checkpoint says.
        found: String,
    },
    /// The end does not match the rows.
    #[error("the end line says {found}, but the rows give {expected}")]
    End {
        /// Of the rows.
        expected: String,
        /// Of the line.
        found: String,
    },
}
