//! The feed: rows over HTTP in pages, `GET /v1/ledger/rows?after=SEQ&checkpoints_after=SEQ&limit=N`. [`page`] makes what the
//! server answers; [`Reader`] is the client's side, which believes nothing: it checks numbering, ids and the hash chain
//! as pages come, and puts prices, rows and checkpoints into the order that exports want. No sockets here.
//!
//! The cursor is the number of the last row read. Rows are numbered without gaps, so a page that does not start at the next
//! number is refused, and nothing can be missed. Checkpoints have a cursor of their own, because a period is sealed after its
//! rows were read by who follows closely.

use crate::json::{CheckpointJson, PriceJson, RowJson};
use crate::verify::{Problem, check_hashes};
use crate::{GENESIS, Hash, hex, row};
use baton_proto::state::{Checkpoint, LedgerRow, Price, ledger_row::Body};
use prost::Message;
use serde::{Deserialize, Serialize};
use std::collections::{HashSet, VecDeque};

/// Where a coordinator serves it.
pub const PATH: &str = "/v1/ledger/rows";
/// Rows of a page if the client does not say.
pub const LIMIT_DEFAULT: u32 = 500;
/// Most rows of a page: about a megabyte, so that a page is neither slow to make nor large to hold.
pub const LIMIT_MAX: u32 = 1_000;
/// A page ends before its rows are larger than this, as protobuf; as JSON they are two to four times that. Rows with very long
/// names then come in smaller pages.
const ROWS_BYTES_MAX: usize = 2 << 20;

/// The query of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Query {
    /// Rows after this number; 0 (the default): from the first.
    #[serde(default)]
    pub after: u64,
    /// Checkpoints after the one that ends at this row; by default those whose last row comes after `after`.
    #[serde(default)]
    pub checkpoints_after: Option<u64>,
    /// At most so many rows, up to [`LIMIT_MAX`].
    #[serde(default)]
    pub limit: Option<u32>,
}

impl Query {
    /// Rows to answer with at most.
    pub fn limit(&self) -> u32 {
        self.limit.unwrap_or(LIMIT_DEFAULT).clamp(1, LIMIT_MAX)
    }

    /// Checkpoints to answer with are those that end after this row (and not after the last row of the page).
    pub fn checkpoints_after(&self) -> u64 {
        self.checkpoints_after.unwrap_or(self.after)
    }
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Page {
    /// `ledger.rows`.
    pub object: String,
    /// The prices that rows of this page are charged by.
    pub prices: Vec<PriceJson>,
    /// Rows after the cursor, in order.
    pub rows: Vec<RowJson>,
    /// Checkpoints after their cursor that end at or before the last row of this page (or the cursor).
    pub checkpoints: Vec<CheckpointJson>,
    /// The ledger's last row.
    pub last_sequence: u64,
    /// Whether there are rows after this page.
    pub has_more: bool,
}

/// What every page says of itself.
const OBJECT: &str = "ledger.rows";

/// Makes a page of the rows after `query.after`, of which at most `query.limit()` are taken. `price` looks an id up;
/// `checkpoints` may hold more than belongs here; `last_sequence` is the ledger's last row.
pub fn page(
    query: &Query,
    rows: impl IntoIterator<Item = LedgerRow>,
    price: impl Fn(&str) -> Option<Price>,
    checkpoints: impl IntoIterator<Item = Checkpoint>,
    last_sequence: u64,
) -> Page {
    let limit = usize::try_from(query.limit()).unwrap_or(usize::MAX);
    let mut size = 0;
    let fits = |row: &LedgerRow| {
        let first = size == 0;
        size += row.encoded_len();
        first || size <= ROWS_BYTES_MAX
    };
    let rows: Vec<LedgerRow> = rows.into_iter().take(limit).take_while(fits).collect();
    let end = rows.last().map_or(query.after, |row| row.sequence);
    let mut known = HashSet::new();
    let prices = rows.iter().filter_map(|row| match &row.body {
        Some(Body::Usage(record)) if !record.price_id.is_empty() => Some(record.price_id.as_str()),
        _ => None,
    });
    let prices = prices
        .filter(|id| known.insert(*id))
        .filter_map(price)
        .map(PriceJson)
        .collect();
    let here = query.checkpoints_after() + 1..=end;
    let checkpoints = checkpoints
        .into_iter()
        .filter(|checkpoint| here.contains(&checkpoint.last_sequence));
    Page {
        object: OBJECT.to_owned(),
        prices,
        checkpoints: checkpoints.map(CheckpointJson).collect(),
        has_more: end < last_sequence,
        rows: rows.into_iter().map(RowJson::from).collect(),
        last_sequence,
    }
}

/// Why a page is not taken.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// Another kind of answer.
    #[error("the answer is no page of a ledger; is the address a baton coordinator's?")]
    NotAPage,
    /// A row is wrong.
    #[error("row {sequence} of the feed: {problem}")]
    Row {
        /// The row.
        sequence: u64,
        /// What is wrong with it.
        problem: Problem,
    },
    /// A checkpoint comes twice or out of order.
    #[error("the checkpoint that ends at row {0} is out of order")]
    Checkpoint(u64),
    /// The ledger has fewer rows than were read before.
    #[error(
        "the ledger ends at row {last}, but row {after} was read before; this is another ledger, or one restored from an older backup"
    )]
    Shorter {
        /// The ledger's last row.
        last: u64,
        /// The cursor.
        after: u64,
    },
}

/// What an export takes, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Item {
    /// A price, before the first row charged by it.
    Price(Price),
    /// The next row.
    Row(Box<LedgerRow>),
    /// A checkpoint, after its last row.
    Checkpoint(Checkpoint),
}

/// All that must be kept to go on reading later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The last row read; 0 before the first.
    pub after: u64,
    /// Its hash; [`GENESIS`] before the first.
    pub last_hash: Hash,
    /// Last row of the last checkpoint read.
    pub checkpoints_after: u64,
}

impl Position {
    /// Before the first row.
    pub const START: Self = Self {
        after: 0,
        last_hash: GENESIS,
        checkpoints_after: 0,
    };
}

/// The client's side: where it stands, and what it has seen.
#[derive(Debug, Clone)]
pub struct Reader {
    after: u64,
    checkpoints_after: u64,
    last_hash: Option<Hash>,
    prices: HashSet<String>,
}

impl Reader {
    /// From the row after `after`, whose hash is `last_hash` if it is known; then the first row must follow it.
    pub fn new(after: u64, last_hash: Option<Hash>) -> Self {
        let last_hash = if after == 0 { Some(GENESIS) } else { last_hash };
        Self {
            after,
            checkpoints_after: after,
            last_hash,
            prices: HashSet::new(),
        }
    }

    /// Goes on where another stood, whose [`Self::position`] was kept.
    pub fn resume(position: Position) -> Self {
        let Position {
            after,
            last_hash,
            checkpoints_after,
        } = position;
        Self {
            after,
            checkpoints_after,
            last_hash: Some(last_hash),
            prices: HashSet::new(),
        }
    }

    /// Where it stands; nothing if it has read no row since it was made without a hash.
    pub fn position(&self) -> Option<Position> {
        let Self {
            after,
            checkpoints_after,
            last_hash,
            ..
        } = *self;
        Some(Position {
            after,
            last_hash: last_hash?,
            checkpoints_after,
        })
    }

    /// The last row read.
    pub const fn after(&self) -> u64 {
        self.after
    }

    /// Path and query of the next request.
    pub fn path(&self, limit: u32) -> String {
        format!(
            "{PATH}?after={}&checkpoints_after={}&limit={limit}",
            self.after, self.checkpoints_after
        )
    }

    /// Takes the answer and moves on. After an error, ask for the same page again.
    ///
    /// # Errors
    /// [`FeedError`]; nothing was taken then.
    pub fn take(&mut self, page: Page) -> Result<Vec<Item>, FeedError> {
        if page.object != OBJECT {
            return Err(FeedError::NotAPage);
        }
        if page.last_sequence < self.after {
            return Err(FeedError::Shorter {
                last: page.last_sequence,
                after: self.after,
            });
        }
        let mut next = self.clone();
        let mut items = Vec::with_capacity(page.rows.len() + page.prices.len() + page.checkpoints.len());
        for PriceJson(price) in page.prices {
            let expected = row::price_id(&price);
            if price.id != expected {
                let problem = Problem::PriceId {
                    expected,
                    found: price.id,
                };
                return Err(FeedError::Row {
                    sequence: next.after + 1,
                    problem,
                });
            }
            if next.prices.insert(price.id.clone()) {
                items.push(Item::Price(price));
            }
        }
        let mut checkpoints: VecDeque<Checkpoint> = page.checkpoints.into_iter().map(|c| c.0).collect();
        next.take_checkpoints(&mut checkpoints, &mut items)?;
        for row in page.rows {
            let row = LedgerRow::from(row);
            let hash = next.check(&row).map_err(|problem| FeedError::Row {
                sequence: row.sequence,
                problem,
            })?;
            next.after = row.sequence;
            next.last_hash = Some(hash);
            items.push(Item::Row(Box::new(row)));
            next.take_checkpoints(&mut checkpoints, &mut items)?;
        }
        if let Some(checkpoint) = checkpoints.front() {
            return Err(FeedError::Checkpoint(checkpoint.last_sequence));
        }
        *self = next;
        Ok(items)
    }

    /// Takes the checkpoints that end at or before the last row.
    fn take_checkpoints(&mut self, from: &mut VecDeque<Checkpoint>, to: &mut Vec<Item>) -> Result<(), FeedError> {
        while let Some(checkpoint) = from.pop_front_if(|checkpoint| checkpoint.last_sequence <= self.after) {
            if checkpoint.last_sequence <= self.checkpoints_after {
                return Err(FeedError::Checkpoint(checkpoint.last_sequence));
            }
            self.checkpoints_after = checkpoint.last_sequence;
            to.push(Item::Checkpoint(checkpoint));
        }
        Ok(())
    }

    fn check(&self, row: &LedgerRow) -> Result<Hash, Problem> {
        if Some(row.sequence) != self.after.checked_add(1) {
            return Err(Problem::Gap { before: self.after });
        }
        if let Some(last) = &self.last_hash
            && row.previous_hash.as_ref() != last
        {
            return Err(Problem::Chain {
                expected: hex(last),
                found: hex(&row.previous_hash),
            });
        }
        let hash = check_hashes(row)?;
        match &row.body {
            Some(Body::Usage(record)) if !record.price_id.is_empty() && !self.prices.contains(&record.price_id) => {
                Err(Problem::NoPrice(record.price_id.clone()))
            }
            _ => Ok(hash),
        }
    }
}

#[cfg(test)]
mod tests;
