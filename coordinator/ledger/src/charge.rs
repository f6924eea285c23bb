//! What a request costs. The rule, in full:
//!
//! 1. **What was delivered is billed.** The prompt is billed once, as prefill measured it: cached tokens at the price of
//!    cached input, the others at that of input. Completion tokens are those delivered to the client, reasoning included.
//!    Tokens that were sampled and not delivered, recomputation after a worker's death and further attempts cost nothing.
//! 2. **A request that ended early**, cancelled or failed, pays for what it got: the prompt and what was delivered. If
//!    nothing was delivered it pays nothing, the prompt included.
//! 3. **A request that came after its reservation had expired** pays nothing; its tokens are recorded.
//! 4. **Without a price** for the model at the start of the request, nothing is charged.
//! 5. Each class is `tokens × price per million / 1,000,000` in 128 bits, rounded once, half to even
//!    ([`money::divide`](crate::money::divide)). Amounts are never added before they are rounded, so that a class can be checked alone.

use crate::money::divide;
use baton_proto::state::{Charge, Price, UsageRecord, UsageStatus};

/// Tokens that a price is for.
const MTOK: u128 = 1_000_000;

/// Why a record cannot be charged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChargeError {
    /// More of the prompt cached than it has.
    #[error("{cached} cached tokens of a prompt of {prompt}")]
    CachedBeyondPrompt {
        /// Cached tokens of the record.
        cached: u32,
        /// Prompt tokens of the record.
        prompt: u32,
    },
    /// The record was made for another price.
    #[error("the record is priced by {record:?}, not by {given:?}")]
    OtherPrice {
        /// Price id in the record.
        record: String,
        /// Id of the price given.
        given: String,
    },
    /// An amount beyond 64 bits.
    #[error("{tokens} tokens at {nano_per_mtok} nano-units per million are more than 18 billion units")]
    Overflow {
        /// Tokens of the class.
        tokens: u32,
        /// Its price.
        nano_per_mtok: u64,
    },
}

/// The price of `tokens` in nano-units, rounded half to even.
///
/// # Errors
/// [`ChargeError::Overflow`] beyond 64 bits.
pub fn amount(tokens: u32, nano_per_mtok: u64) -> Result<u64, ChargeError> {
    let nano = divide(u128::from(tokens) * u128::from(nano_per_mtok), MTOK);
    u64::try_from(nano).map_err(|_| ChargeError::Overflow { tokens, nano_per_mtok })
}

/// The charge of a record under the price its `price_id` names; `None` where it names none.
///
/// # Errors
/// [`ChargeError`]; such a record must not enter the ledger.
pub fn of_record(record: &UsageRecord, price: Option<&Price>) -> Result<Charge, ChargeError> {
    let given = price.map_or("", |price| price.id.as_str());
    if record.price_id != given {
        return Err(ChargeError::OtherPrice {
            record: record.price_id.clone(),
            given: given.to_owned(),
        });
    }
    let Some(uncached) = record.prompt_tokens.checked_sub(record.cached_tokens) else {
        return Err(ChargeError::CachedBeyondPrompt {
            cached: record.cached_tokens,
            prompt: record.prompt_tokens,
        });
    };
    let Some(price) = price else {
        return Ok(Charge::default());
    };
    let mut charge = Charge {
        price_id: price.id.clone(),
        currency: price.currency.clone(),
        ..Charge::default()
    };
    if is_free(record) {
        return Ok(charge);
    }
    charge.input_nano = amount(uncached, price.input_nano_per_mtok)?;
    charge.cached_input_nano = amount(record.cached_tokens, price.cached_input_nano_per_mtok)?;
    charge.output_nano = amount(record.completion_tokens, price.output_nano_per_mtok)?;
    Ok(charge)
}

/// Whether rules 2 or 3 make a record cost nothing, whatever its price.
pub fn is_free(record: &UsageRecord) -> bool {
    match record.status() {
        UsageStatus::Expired => true,
        UsageStatus::Cancelled | UsageStatus::Failed => record.completion_tokens == 0,
        UsageStatus::Completed | UsageStatus::Length | UsageStatus::Unspecified => false,
    }
}

/// The charge that stands in the row of a correction: nothing, in the currency of the row it amends. What changes stands in
/// the correction, because it may be negative.
pub fn of_correction(amended: &Charge) -> Charge {
    Charge {
        currency: amended.currency.clone(),
        ..Charge::default()
    }
}

/// All classes of a charge together, in nano-units.
pub fn total(charge: &Charge) -> u128 {
    [charge.input_nano, charge.cached_input_nano, charge.output_nano]
        .into_iter()
        .map(u128::from)
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn price() -> Price {
        Price {
            id: "p".into(),
            currency: "USD".into(),
            input_nano_per_mtok: 20_000_000_000,
            cached_input_nano_per_mtok: 2_000_000_000,
            output_nano_per_mtok: 80_000_000_000,
            ..Price::default()
        }
    }

    fn record(status: UsageStatus, completion_tokens: u32) -> UsageRecord {
        UsageRecord {
            status: status.into(),
            prompt_tokens: 1_000,
            cached_tokens: 256,
            completion_tokens,
            // Another witness and more attempts than tokens: none of it is billed.
            sampled_tokens: completion_tokens + 17,
            attempts: 3,
            reasoning_tokens: completion_tokens / 2,
            price_id: "p".into(),
            ..UsageRecord::default()
        }
    }

    #[test]
    fn each_class_has_its_price() {
        let charge = of_record(&record(UsageStatus::Completed, 10), Some(&price())).expect("in range");
        assert_eq!(
            (charge.input_nano, charge.cached_input_nano, charge.output_nano),
            (14_880_000, 512_000, 800_000)
        );
        assert_eq!((charge.price_id.as_str(), charge.currency.as_str()), ("p", "USD"));
        assert_eq!(total(&charge), 16_192_000);
    }

    #[test]
    fn what_ended_early_pays_for_what_it_got() {
        let full = of_record(&record(UsageStatus::Completed, 7), Some(&price())).expect("in range");
        for status in [UsageStatus::Cancelled, UsageStatus::Failed] {
            assert_eq!(of_record(&record(status, 7), Some(&price())).expect("in range"), full);
            let nothing = of_record(&record(status, 0), Some(&price())).expect("in range");
            assert_eq!(total(&nothing), 0);
            assert_eq!(nothing.price_id, "p");
        }
        let late = of_record(&record(UsageStatus::Expired, 7), Some(&price())).expect("in range");
        assert_eq!(total(&late), 0);
    }

    #[test]
    fn half_a_nano_unit_goes_to_the_even_side() {
        assert_eq!(amount(1, 500_000), Ok(0));
        assert_eq!(amount(3, 500_000), Ok(2));
        assert_eq!(amount(5, 500_000), Ok(2));
        assert_eq!(amount(1, 500_001), Ok(1));
        assert_eq!(amount(1, 499_999), Ok(0));
        assert_eq!(amount(u32::MAX, 0), Ok(0));
    }

    #[test]
    fn what_cannot_be_charged_is_said() {
        let mut wrong = record(UsageStatus::Completed, 1);
        wrong.cached_tokens = 1_001;
        assert!(matches!(
            of_record(&wrong, Some(&price())),
            Err(ChargeError::CachedBeyondPrompt { .. })
        ));
        wrong.price_id.clear();
        assert!(matches!(
            of_record(&wrong, Some(&price())),
            Err(ChargeError::OtherPrice { .. })
        ));
        assert!(matches!(
            of_record(&wrong, None),
            Err(ChargeError::CachedBeyondPrompt { .. })
        ));
        assert!(matches!(amount(u32::MAX, u64::MAX), Err(ChargeError::Overflow { .. })));
        wrong.cached_tokens = 0;
        assert_eq!(of_record(&wrong, None), Ok(Charge::default()));
    }
}
