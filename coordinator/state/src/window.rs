//! What became of a budget's money in one of its periods.

use crate::codec::{put_unsigned, take_unsigned};
use crate::tables::TablesError;

/// A period of a budget. Amounts are nano-units.
///
/// Invariants: `reserved = posted + voided + expired + open`, and if `hard`, `posted + open <= limit`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Window {
    /// The budget's limit, as it is or as it was when the period ended.
    pub limit_nano: u64,
    /// Whether the limit is enforced.
    pub hard: bool,
    /// Ever set aside.
    pub reserved_nano: u128,
    /// Charged.
    pub posted_nano: u128,
    /// Set aside and given back.
    pub voided_nano: u128,
    /// Set aside, and free again because its slice expired.
    pub expired_nano: u128,
    /// Set aside in open slices.
    pub open_nano: u128,
    /// Open slices.
    pub slices: u128,
}

impl Window {
    /// What is neither charged nor set aside, or nothing if nothing is.
    pub fn free_nano(&self) -> u128 {
        u128::from(self.limit_nano).saturating_sub(self.posted_nano + self.open_nano)
    }

    fn amounts(&self) -> [u128; 6] {
        let Self {
            reserved_nano,
            posted_nano,
            voided_nano,
            expired_nano,
            open_nano,
            slices,
            ..
        } = *self;
        [reserved_nano, posted_nano, voided_nano, expired_nano, open_nano, slices]
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(48);
        put_unsigned(&mut out, u128::from(self.limit_nano));
        put_unsigned(&mut out, u128::from(self.hard));
        for amount in self.amounts() {
            put_unsigned(&mut out, amount);
        }
        out
    }

    pub(crate) fn decode(mut bytes: &[u8]) -> Result<Self, TablesError> {
        let damaged = |_| TablesError::Corrupt("a budget's limit is too large".into());
        let bytes = &mut bytes;
        Ok(Self {
            limit_nano: u64::try_from(take_unsigned(bytes)?).map_err(damaged)?,
            hard: take_unsigned(bytes)? != 0,
            reserved_nano: take_unsigned(bytes)?,
            posted_nano: take_unsigned(bytes)?,
            voided_nano: take_unsigned(bytes)?,
            expired_nano: take_unsigned(bytes)?,
            open_nano: take_unsigned(bytes)?,
            slices: take_unsigned(bytes)?,
        })
    }
}
