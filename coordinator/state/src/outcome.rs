//! What a command is answered with.

use crate::fault::Fault;

/// The answer to a command that was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// The worker is registered under this epoch. Epochs come from one counter of the group, so they grow for each
    /// worker id, and a later registration of anything has a higher one.
    Registered {
        /// The new epoch.
        epoch: u64,
    },
    /// The worker, member or deployment is gone, or was not there (a worker: under that epoch).
    Removed {
        /// False if nothing changed.
        removed: bool,
    },
    /// The record is settled, now or before with the same contents.
    Settled {
        /// Number of its row: rows count 1, 2, 3, ... without gaps.
        sequence: u64,
    },
    /// An admin change is in force.
    Stands {
        /// False if it was before.
        changed: bool,
    },
    /// The price is there.
    Priced {
        /// Its content-derived id.
        id: String,
    },
    /// The slice may be spent from.
    Leased {
        /// What it has left in all, in nano-units. May be less than was wanted.
        open_nano: u64,
        /// All that was ever set aside in it, in nano-units: the same in whatever order answers and settlements arrive.
        granted_nano: u64,
        /// When it expires.
        expires_unix_ms: u64,
        /// Start of the budget's period that it is of. When the period is over, lease another slice.
        period_start_unix_ms: u64,
    },
    /// The slice is over.
    Returned {
        /// What went back to the budget, in nano-units; 0 if there was no such slice.
        nano: u64,
    },
    /// The correction stands, now or before with the same contents.
    Corrected {
        /// Number of its row.
        sequence: u64,
    },
    /// The period is closed and can be signed.
    Closed {
        /// Its last row.
        last_sequence: u64,
    },
    /// The period is signed.
    Sealed {
        /// Its last row.
        last_sequence: u64,
    },
    /// Time went on.
    Ticked {
        /// Replicated time.
        now_unix_ms: u64,
    },
}

/// Why a command was refused. Nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It makes no sense.
    #[error("the command is invalid: {0}")]
    Invalid(String),
    /// Another record was settled under the same request id.
    #[error("request {request_id} is already settled, with other contents, as record {sequence}")]
    UsageConflict {
        /// The request id.
        request_id: String,
        /// Number of the record that stands.
        sequence: u64,
    },
    /// The counts of a record contradict each other.
    #[error("the usage of request {request_id} cannot be: {fault}")]
    Impossible {
        /// The request id.
        request_id: String,
        /// What contradicts what.
        fault: Fault,
    },
    /// It names something that is not there.
    #[error("there is no {what} {id:?}; make it first")]
    Unknown {
        /// Which kind of thing.
        what: &'static str,
        /// Its id as given.
        id: String,
    },
    /// It changes what must stay.
    #[error("{field} of {what} {id:?} cannot be changed; make a new one")]
    Fixed {
        /// Which kind of thing.
        what: &'static str,
        /// Its id.
        id: String,
        /// What must stay.
        field: &'static str,
    },
    /// The key was revoked, for good.
    #[error("key {id:?} is revoked; make a new one")]
    KeyRevoked {
        /// Its id.
        id: String,
    },
    /// Two keys would have one hash.
    #[error("key {id:?} has the same hash; make a new secret")]
    KeyHashTaken {
        /// The key that has it.
        id: String,
    },
    /// There are as many as there may be.
    #[error("there are {max} {what} already, which is the most")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many may be.
        max: u64,
    },
    /// The pinned price is not one of this model at that time.
    #[error("price {price_id:?} is not one of {model:?} at the start of request {request_id}")]
    WrongPrice {
        /// The request id.
        request_id: String,
        /// Price id as given.
        price_id: String,
        /// Model of the record.
        model: String,
    },
    /// Another body was sent with the same idempotency key.
    #[error("the idempotency key was used with another body, by request {request_id}")]
    IdempotencyConflict {
        /// The request that has the key.
        request_id: String,
    },
    /// A hard budget has nothing left.
    #[error("budget {budget_id:?} is spent or set aside to the last nano-unit until its next period")]
    BudgetExhausted {
        /// Its id.
        budget_id: String,
    },
    /// The new limit of a hard budget would be below what is spent and set aside.
    #[error("budget {budget_id:?} has {least_nano} nano-units spent or set aside; a hard limit cannot be below")]
    LimitBelowSpent {
        /// Its id.
        budget_id: String,
        /// The least limit that is taken.
        least_nano: u128,
    },
    /// The slice belongs to another member.
    #[error("slice {slice_id:?} is of member {member_id}; choose another id")]
    SliceOfOther {
        /// Its id.
        slice_id: String,
        /// Who has it.
        member_id: u64,
    },
    /// The slice is of a period that is over.
    #[error("slice {slice_id:?} is of a period that is over; lease a new one")]
    PeriodOver {
        /// Its id.
        slice_id: String,
    },
    /// A record would post more to a hard budget than was reserved.
    #[error(
        "request {request_id} costs {charge_nano} nano-units, of which budget {budget_id:?} has {reserved_nano} reserved"
    )]
    BeyondReservation {
        /// The request id.
        request_id: String,
        /// The budget.
        budget_id: String,
        /// What it costs.
        charge_nano: u64,
        /// What was reserved, or what the slice has left if that is less.
        reserved_nano: u64,
    },
    /// Another correction has the same id.
    #[error("correction {correction_id:?} is already made, with other contents, as row {sequence}")]
    CorrectionConflict {
        /// Its id.
        correction_id: String,
        /// Number of the row that stands.
        sequence: u64,
    },
    /// A correction takes away more than there is.
    #[error(
        "with this correction request {request_id} would have {what} below zero, or more cached than it has prompt"
    )]
    BelowZero {
        /// The request id.
        request_id: String,
        /// Which count or amount.
        what: &'static str,
    },
    /// No row is outside of a closed period.
    #[error("there are no rows since the last period")]
    NothingToClose,
    /// The period is not the one that is next.
    #[error("that period cannot be {act}: the last one ends with row {last_sequence}")]
    NotNext {
        /// "closed" or "sealed".
        act: &'static str,
        /// Last row of the last period, closed or sealed; 0 if there is none.
        last_sequence: u64,
    },
    /// Another member runs the batch.
    #[error("batch {batch_id:?} is run under another claim")]
    ClaimedByOther {
        /// Its id.
        batch_id: String,
    },
    /// The batch is not in a status for that.
    #[error("batch {batch_id:?} is {status}")]
    BatchStatus {
        /// Its id.
        batch_id: String,
        /// What it is, as the API says.
        status: &'static str,
    },
    /// Something that is not over needs it.
    #[error("file {id:?} is the input of batch {batch_id:?}, which is not over; cancel the batch first")]
    FileInUse {
        /// The file.
        id: String,
        /// The batch.
        batch_id: String,
    },
    /// The signature is wrong, or not by a member's key.
    #[error("the signature is refused: {0}")]
    BadSignature(String),
}

impl Refused {
    pub(crate) fn invalid(reason: impl Into<String>) -> Self {
        Self::Invalid(reason.into())
    }

    pub(crate) fn unknown(what: &'static str, id: &str) -> Self {
        let id = id.to_owned();
        Self::Unknown { what, id }
    }

    pub(crate) fn fixed(what: &'static str, id: &str, field: &'static str) -> Self {
        let id = id.to_owned();
        Self::Fixed { what, id, field }
    }
}

/// The answer to a command.
pub type Outcome = Result<Applied, Refused>;

/// The outcome as it enters the hash, so that members that judged a command differently find out. Sentences may change
/// with a release, so they do not count.
pub(crate) fn code(outcome: &Outcome) -> [u8; 9] {
    let (tag, value) = match outcome {
        Ok(Applied::Registered { epoch }) => (1, *epoch),
        Ok(Applied::Removed { removed }) => (2, u64::from(*removed)),
        Ok(Applied::Settled { sequence }) => (3, *sequence),
        Err(Refused::UsageConflict { sequence, .. }) => (4, *sequence),
        Err(Refused::Invalid(_)) => (5, 0),
        Ok(Applied::Stands { changed }) => (6, u64::from(*changed)),
        Ok(Applied::Priced { .. }) => (7, 0),
        Ok(Applied::Leased { open_nano, .. }) => (8, *open_nano),
        Ok(Applied::Returned { nano }) => (9, *nano),
        Ok(Applied::Corrected { sequence }) => (10, *sequence),
        Ok(Applied::Closed { last_sequence }) => (11, *last_sequence),
        Ok(Applied::Sealed { last_sequence }) => (12, *last_sequence),
        Ok(Applied::Ticked { now_unix_ms }) => (13, *now_unix_ms),
        Err(Refused::Impossible { .. }) => (32, 0),
        Err(Refused::Unknown { .. }) => (33, 0),
        Err(Refused::Fixed { .. }) => (34, 0),
        Err(Refused::KeyRevoked { .. }) => (35, 0),
        Err(Refused::KeyHashTaken { .. }) => (36, 0),
        Err(Refused::TooMany { max, .. }) => (37, *max),
        Err(Refused::WrongPrice { .. }) => (38, 0),
        Err(Refused::IdempotencyConflict { .. }) => (39, 0),
        Err(Refused::BudgetExhausted { .. }) => (40, 0),
        Err(Refused::LimitBelowSpent { .. }) => (41, 0),
        Err(Refused::SliceOfOther { member_id, .. }) => (42, *member_id),
        Err(Refused::PeriodOver { .. }) => (43, 0),
        Err(Refused::BeyondReservation { reserved_nano, .. }) => (44, *reserved_nano),
        Err(Refused::CorrectionConflict { sequence, .. }) => (45, *sequence),
        Err(Refused::BelowZero { .. }) => (46, 0),
        Err(Refused::NothingToClose) => (47, 0),
        Err(Refused::NotNext { last_sequence, .. }) => (48, *last_sequence),
        Err(Refused::BadSignature(_)) => (49, 0),
        Err(Refused::ClaimedByOther { .. }) => (64, 0),
        Err(Refused::BatchStatus { .. }) => (65, 0),
        Err(Refused::FileInUse { .. }) => (66, 0),
    };
    let mut code = [0; 9];
    code[0] = tag;
    code[1..].copy_from_slice(&value.to_le_bytes());
    code
}
