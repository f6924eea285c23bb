//! Why a receiver turns a push away: typed on both ends, 17 bytes on the wire (a code and two numbers).

/// A receiver's reason for refusing a push. Travels to the sender as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such window: never opened, closed already, or opened by an earlier life of the process.
    #[error("the window is not open at the receiver: it was closed, or belongs to an earlier life of the process")]
    UnknownWindow,
    /// A window takes one push.
    #[error("the window has taken a push already; open a new window for a new push")]
    WindowTaken,
    /// The receiver closed the window while the push ran.
    #[error("the receiver closed the window")]
    WindowClosed,
    /// Bytes outside of the window.
    #[error("{len} bytes at offset {offset} are not inside the window's ranges")]
    OutOfRange {
        /// Byte offset in the receiver's region.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// An offset or length that is not a multiple of [`ALIGN`](crate::ALIGN).
    #[error("{len} bytes at offset {offset}: offsets and lengths must be multiples of 8")]
    Misaligned {
        /// Byte offset in the receiver's region.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A write of zero bytes.
    #[error("a write of no bytes at offset {offset}")]
    EmptyWrite {
        /// Byte offset in the receiver's region.
        offset: u64,
    },
    /// A frame longer than [`FRAME_BYTES_MAX`](crate::limits::FRAME_BYTES_MAX).
    #[error("a write frame of {len} bytes; the most is {max}")]
    FrameTooLong {
        /// Bytes.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// More bytes than the window's total bound.
    #[error("more than the {max} bytes that the window takes")]
    TooManyBytes {
        /// The limit.
        max: u64,
    },
    /// The sender's total is not what landed.
    #[error("the sender counts {claimed} bytes, {landed} landed")]
    WrongTotal {
        /// What FINISH says.
        claimed: u64,
        /// What arrived.
        landed: u64,
    },
    /// A finishing payload longer than [`PAYLOAD_BYTES_MAX`](crate::limits::PAYLOAD_BYTES_MAX).
    #[error("a finishing payload of {len} bytes; the most is {max}")]
    PayloadTooLong {
        /// Bytes.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// Not a frame, or not at this place.
    #[error("unexpected frame tag {tag} on a push stream")]
    Malformed {
        /// The first byte of the frame.
        tag: u8,
    },
    /// The stream ended before FINISH.
    #[error("the push ended without finishing")]
    Unfinished,
    /// The push named no window in time, or did not read its replies.
    #[error("the push made no progress within {limit_ms} ms")]
    TooSlow {
        /// The limit in milliseconds.
        limit_ms: u64,
    },
    /// A frame's checksum is wrong; the lane ends, and what it carried is sent again on another one.
    #[error("a frame arrived damaged")]
    Corrupt,
    /// A newer lane has taken this one's place.
    #[error("the lane was replaced by a newer one")]
    Superseded,
    /// More lanes, or more openings of lanes, than a push may have.
    #[error("a push may use {max} lanes")]
    TooManyLanes {
        /// The limit.
        max: u64,
    },
    /// What has landed falls into too many pieces.
    #[error("what has landed falls into more than {max} pieces; write larger or adjacent ranges")]
    TooScattered {
        /// The limit.
        max: u64,
    },
    /// The receiver could not write its memory: an I/O error of a file.
    #[error("the receiver cannot write its memory (see its log)")]
    MemoryFailed,
    /// No such export: never granted, ended already, or granted by an earlier life of the process.
    #[error("the export is not there: its lease has ended, or it belongs to an earlier life of the process")]
    UnknownExport,
    /// A read of bytes that the export does not cover.
    #[error("{len} bytes at offset {offset} are not inside the export")]
    OutsideExport {
        /// Byte offset in the owner's memory.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The receiver's queue is full: of notifications nobody takes, or of reads being served.
    #[error("the receiver's queue of {max} is full; try again later")]
    Busy {
        /// The limit.
        max: u64,
    },
    /// The receiver's agent was closed, and its windows with it.
    #[error("the receiver's agent was closed")]
    AgentClosed,
    /// A control message of an unknown kind, or one that does not decode.
    #[error("a control message that this version does not understand")]
    BadControl,
    /// The receiver could not read the sender's memory over the fabric; the push goes on over another lane.
    #[error("the receiver could not read the sender's memory in time")]
    Unreadable,
    /// A code this version does not know.
    #[error("refused with unknown code {code}")]
    Unknown {
        /// The code.
        code: u8,
    },
}

impl Refusal {
    /// Whether only the lane ends and the push may go on over another.
    pub(crate) fn lane_only(self) -> bool {
        matches!(self, Self::Corrupt | Self::Superseded | Self::Unreadable)
    }

    /// Code and operands on the wire.
    pub(crate) fn to_wire(self) -> (u8, u64, u64) {
        match self {
            Self::Unknown { code } => (code, 0, 0),
            Self::UnknownWindow => (1, 0, 0),
            Self::WindowTaken => (2, 0, 0),
            Self::WindowClosed => (3, 0, 0),
            Self::OutOfRange { offset, len } => (4, offset, len),
            Self::Misaligned { offset, len } => (5, offset, len),
            Self::EmptyWrite { offset } => (6, offset, 0),
            Self::FrameTooLong { len, max } => (7, len, max),
            Self::TooManyBytes { max } => (8, max, 0),
            Self::WrongTotal { claimed, landed } => (9, claimed, landed),
            Self::PayloadTooLong { len, max } => (10, len, max),
            Self::Malformed { tag } => (11, u64::from(tag), 0),
            Self::Unfinished => (12, 0, 0),
            Self::TooSlow { limit_ms } => (13, limit_ms, 0),
            Self::Corrupt => (14, 0, 0),
            Self::Superseded => (15, 0, 0),
            Self::TooManyLanes { max } => (16, max, 0),
            Self::TooScattered { max } => (17, max, 0),
            Self::MemoryFailed => (18, 0, 0),
            Self::UnknownExport => (19, 0, 0),
            Self::OutsideExport { offset, len } => (20, offset, len),
            Self::Busy { max } => (21, max, 0),
            Self::BadControl => (22, 0, 0),
            Self::AgentClosed => (23, 0, 0),
            Self::Unreadable => (24, 0, 0),
        }
    }

    /// The refusal of a code and its operands; any code is some refusal.
    pub(crate) fn from_wire(code: u8, a: u64, b: u64) -> Self {
        match code {
            1 => Self::UnknownWindow,
            2 => Self::WindowTaken,
            3 => Self::WindowClosed,
            4 => Self::OutOfRange { offset: a, len: b },
            5 => Self::Misaligned { offset: a, len: b },
            6 => Self::EmptyWrite { offset: a },
            7 => Self::FrameTooLong { len: a, max: b },
            8 => Self::TooManyBytes { max: a },
            9 => Self::WrongTotal { claimed: a, landed: b },
            10 => Self::PayloadTooLong { len: a, max: b },
            11 => Self::Malformed {
                tag: a.to_le_bytes()[0],
            },
            12 => Self::Unfinished,
            13 => Self::TooSlow { limit_ms: a },
            14 => Self::Corrupt,
            15 => Self::Superseded,
            16 => Self::TooManyLanes { max: a },
            17 => Self::TooScattered { max: a },
            18 => Self::MemoryFailed,
            19 => Self::UnknownExport,
            20 => Self::OutsideExport { offset: a, len: b },
            21 => Self::Busy { max: a },
            22 => Self::BadControl,
            23 => Self::AgentClosed,
            24 => Self::Unreadable,
            _ => Self::Unknown { code },
        }
    }
}
