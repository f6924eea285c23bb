//! Which bug is planted on this thread, and what members applied on it since it was last asked for.

use crate::membership::Members;
use raft::eraftpb::{Entry, EntryType};
use std::cell::{Cell, RefCell};

macro_rules! bugs {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// A bug that can be planted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Bug {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Bug {
            pub(crate) const ALL: &[(Self, &str)] = &[$((Self::$name, concat!($($doc),+)),)+];
        }
    };
}

bugs! {
    /// Log entries are appended without an fsync.
    AppendsWithoutFsync,
    /// A follower says that it has entries before its fsync.
    AnswersBeforeFsync,
    /// The vote is not in the hard state that is saved.
    VoteNotSaved,
    /// A command is answered when the leader has logged it.
    RepliesBeforeCommit,
    /// The applied index is not saved with what was applied.
    AppliedNotSaved,
    /// The membership is not saved with the entry that changed it.
    MembershipNotSaved,
    /// A leader tells that a change of the members is committed before it has it on its disk. This was a real one.
    ChangeToldBeforeSaved,
    /// A snapshot's state has one entry more than it says.
    AppliesTwiceAfterSnapshot,
    /// Raft is not told that a snapshot is applied. This was a real one.
    SnapshotNotToldApplied,
    /// Number, order and hash of snapshot chunks are not looked at.
    ChunksUnchecked,
    /// A snapshot stream begins on what an earlier one left.
    StagingNotEmptied,
    /// A backup is read on in whatever is the newest version.
    BackupOfTwoVersions,
    /// A conflicting append leaves the old tail of the log.
    KeepsOldTail,
    /// The log is deleted beyond what is applied.
    CompactsBeyondApplied,
    /// The log is deleted before the state's file has what is in it.
    CompactsUnflushed,
    /// Where two layers know a key, the older one wins.
    OlderLayerWins,
    /// A flush leaves deleted keys in the file.
    DeletionsNotFlushed,
    /// Layers of the old state stay over a snapshot.
    LayersOutliveSnapshot,
    /// A leader answers reads without asking anybody.
    OldLeaderAnswersReads,
    /// A read lease lasts four times as long.
    LeaseTooLong,
    /// A read is answered before its index is applied.
    ReadsBeforeApplied,
    /// A proposal of an earlier life answers one of this.
    AnswersOtherLives,
    /// A request id that was settled is not recognised.
    RequestsNotDeduplicated,
    /// An idempotency key that was used is not recognised.
    IdempotencyKeysForgotten,
    /// A correction that was made is not recognised.
    CorrectionsNotDeduplicated,
    /// A correction also edits the row it corrects.
    CorrectionEditsRow,
    /// The next epoch follows the highest of the registered workers.
    EpochReusedAfterRemoval,
    /// A removal does not look at the epoch.
    RemovalNotFenced,
    /// An expired slice gives its money back without grace.
    SliceEndsWithoutGrace,
    /// Settling does not take the charge out of the slice.
    SliceNotCharged,
    /// A slice that is returned stays, and gives its money back again.
    SliceSurvivesReturn,
    /// Which period a slice is of is told by the proposer's clock instead of replicated time.
    PeriodOfLocalTime,
    /// What a request costs is told by the newest price instead of the one it pinned.
    PriceNotPinned,
    /// Delivered tokens are not held against sampled ones.
    WitnessesNotCompared,
    /// A vote on an earlier life of a worker counts for its present one.
    VotesOfOtherEpochs,
    /// A revoked key can be put in force again.
    RevokedKeyComesBack,
    /// A budget's limit is not looked at when a slice is leased.
    LimitIgnored,
    /// Closing a period leaves its rows in the next one's tree.
    PeriodNotCut,
    /// What is applied depends on who applies it.
    StateOfOwnId,
}

/// One entry that a member applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Witnessed {
    pub(crate) member: u64,
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) command: bool,
    /// It may change the membership.
    pub(crate) change: bool,
    pub(crate) data: Vec<u8>,
    /// Of a command.
    pub(crate) outcome: Option<baton_state::Outcome>,
    /// The membership after it, if it changed it.
    pub(crate) members: Option<Members>,
}

thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    static WITNESSED: RefCell<Vec<Witnessed>> = const { RefCell::new(Vec::new()) };
}

/// Plants a bug, or none, on this thread.
pub(crate) fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
    WITNESSED.take();
}

pub(crate) fn is(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Notes that `member` applies `entry`.
pub(crate) fn witness(member: u64, entry: &Entry) {
    let command = entry.get_entry_type() == EntryType::EntryNormal && !entry.data.is_empty();
    WITNESSED.with_borrow_mut(|witnessed| {
        // Tests that do not look must not gather much.
        if witnessed.len() > 1 << 16 {
            witnessed.clear();
        }
        witnessed.push(Witnessed {
            member,
            index: entry.index,
            term: entry.term,
            command,
            change: entry.get_entry_type() != EntryType::EntryNormal,
            data: entry.data.to_vec(),
            outcome: None,
            members: None,
        });
    });
}

/// Who applies at the moment.
pub(super) fn applying() -> u64 {
    WITNESSED.with_borrow(|witnessed| witnessed.last().map_or(0, |last| last.member))
}

pub(super) fn note(outcome: &baton_state::Outcome) {
    WITNESSED.with_borrow_mut(|witnessed| {
        if let Some(last) = witnessed.last_mut() {
            last.outcome = Some(outcome.clone());
        }
    });
}

/// Notes the membership after the entry that was witnessed last.
pub(crate) fn note_members(members: &Members) {
    WITNESSED.with_borrow_mut(|witnessed| {
        if let Some(last) = witnessed.last_mut() {
            last.members = Some(members.clone());
        }
    });
}

pub(crate) fn take_witnessed() -> Vec<Witnessed> {
    WITNESSED.take()
}
