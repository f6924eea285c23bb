//! Prices: what one must be, what it is one for, and how lists are read and written. Prices are per million tokens and never
//! change; a new one is a new price with a later start.

pub mod list;
pub mod litellm;

use crate::money::MoneyError;
use crate::row;
use baton_proto::state::Price;

/// The service tier of requests that name none.
pub const DEFAULT_TIER: &str = "default";
/// The tier of batches.
pub const BATCH_TIER: &str = "batch";
/// The model of a price for all that have none of their own.
pub const ANY_MODEL: &str = "*";
/// Longest name of a model or tier in a list.
const NAME_BYTES_MAX: usize = 256;

/// Why a list cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PriceError {
    /// Not TOML of the right shape.
    #[error("not a price list: {0}")]
    Toml(#[from] toml::de::Error),
    /// Not JSON of the right shape.
    #[error("not LiteLLM's price list: {0}")]
    Json(#[from] serde_json::Error),
    /// An amount is none.
    #[error("{model}, {field}: {error}")]
    Amount {
        /// The price's model.
        model: String,
        /// Which of its amounts.
        field: &'static str,
        /// Why.
        error: MoneyError,
    },
    /// Something else about one price.
    #[error("{model}: {problem}")]
    Price {
        /// The price's model.
        model: String,
        /// What is wrong.
        problem: &'static str,
    },
}

/// Gives a price its id and checks what every price must be.
///
/// # Errors
/// [`PriceError::Price`].
pub fn finish(mut price: Price) -> Result<Price, PriceError> {
    let problem = if price.model.is_empty() || price.model.len() > NAME_BYTES_MAX {
        Some("a model has a name of 1 to 256 bytes")
    } else if price.service_tier.is_empty() || price.service_tier.len() > NAME_BYTES_MAX {
        Some("a service tier has a name of 1 to 256 bytes")
    } else if price.currency.len() != 3 || !price.currency.bytes().all(|byte| byte.is_ascii_uppercase()) {
        Some("a currency is three capital letters, such as USD")
    } else if price.effective_to_unix_ms != 0 && price.effective_to_unix_ms <= price.effective_from_unix_ms {
        Some("it ends before it begins")
    } else {
        None
    };
    if let Some(problem) = problem {
        return Err(PriceError::Price {
            model: price.model,
            problem,
        });
    }
    price.id = row::price_id(&price);
    Ok(price)
}

/// Whether `price` is one for this model at this time. Which of several holds, and for which tier, is decided where
/// the record is settled, which pins the price's id.
pub fn applies(price: &Price, model: &str, at_unix_ms: u64) -> bool {
    let open = price.effective_to_unix_ms == 0;
    (price.model == model || price.model == ANY_MODEL)
        && price.effective_from_unix_ms <= at_unix_ms
        && (open || at_unix_ms < price.effective_to_unix_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn price(model: &str, tier: &str, from: u64, to: u64) -> Price {
        finish(Price {
            model: model.into(),
            service_tier: tier.into(),
            currency: "USD".into(),
            effective_from_unix_ms: from,
            effective_to_unix_ms: to,
            ..Price::default()
        })
        .expect("valid")
    }

    #[test]
    fn a_price_holds_for_its_model_and_time() {
        let demo = price("demo", "default", 10, 20);
        for (model, at, holds) in [
            ("demo", 9, false),
            ("demo", 10, true),
            ("demo", 19, true),
            ("demo", 20, false),
            ("other", 15, false),
        ] {
            assert_eq!(applies(&demo, model, at), holds, "{model} at {at}");
        }
        let open = price("*", "default", 10, 0);
        assert!(applies(&open, "demo", u64::MAX) && !applies(&open, "demo", 9));
    }

    #[test]
    fn prices_are_checked() {
        let ok = price("demo", "default", 10, 20);
        for wrong in [
            Price {
                model: String::new(),
                ..ok.clone()
            },
            Price {
                model: "x".repeat(257),
                ..ok.clone()
            },
            Price {
                service_tier: String::new(),
                ..ok.clone()
            },
            Price {
                currency: "usd".into(),
                ..ok.clone()
            },
            Price {
                effective_to_unix_ms: 10,
                ..ok.clone()
            },
        ] {
            assert!(finish(wrong).is_err());
        }
        assert_eq!(finish(ok.clone()).expect("valid").id, ok.id);
    }
}
