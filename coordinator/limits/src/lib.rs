//! What a caller may still use: requests and tokens per minute ([`Rates`]), and money ([`Purse`]). State machines
//! without IO, clocks or threads; each coordinator has one of each and drives it.
//!
//! Both decide without a round trip. A purse spends what the group has set aside for this coordinator, so a hard budget
//! holds whatever the others do. Rates are exact for what this coordinator serves, and count what others served when
//! its record is applied here.
//!
//! Deliberately not here: what a token costs (`baton-ledger`), what a budget has left (`baton-state`), who is let in when
//! there is more to do than can be done (`baton-admission`).
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod purse;
mod rates;

pub use purse::{Lease, LeaseAsk, Purse, PurseConfig, Reservation, ReserveError};
pub use rates::{Allowance, Charge, Limited, Party, Rate, Rates, Unit};
