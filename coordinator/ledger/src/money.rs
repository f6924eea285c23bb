//! Decimals to integers and back, and the one way a fraction is rounded. No floats anywhere: `0.1` is read digit by digit.
//!
//! Amounts are nano-units of a currency (10⁻⁹), prices nano-units per million tokens. The smallest price is thus 10⁻¹⁵ of a
//! currency unit per token, and the largest about 18 billion units per million tokens.
//!
//! **Rounding**: to the nearest integer; exactly half-way to the even one (banker's rounding, IEEE 754's
//! roundTiesToEven). It is symmetric, so that the sum of many charges drifts neither way.

use std::fmt;

/// Nano-units in a unit of a currency.
pub const NANO: u64 = 1_000_000_000;
/// Decimal places of a nano-unit.
const NANO_PLACES: i32 = 9;
/// Decimal places between "per token" and "per million tokens".
const MTOK_PLACES: i32 = 6;
/// Longest decimal read. Real prices have a dozen digits, a double printed in full under 30.
const LONGEST: usize = 64;
/// Largest exponent of ten read, either way: far beyond any price, far below what could overflow the arithmetic.
const LARGEST_EXPONENT: i32 = 99;

/// Why an amount is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MoneyError {
    /// Not a decimal number.
    #[error("{0:?} is not a decimal such as 20, 0.15 or 1.5e-07")]
    NotDecimal(String),
    /// Below zero.
    #[error("{0:?} is negative; prices and limits are not")]
    Negative(String),
    /// More digits after the point than are kept.
    #[error(
        "{0:?} is finer than a nano-unit (10^-9 of the amount, or of the price per million tokens); round it first"
    )]
    TooFine(String),
    /// Beyond 64 bits of nano-units.
    #[error("{0:?} is more than 18 billion units")]
    TooLarge(String),
}

/// A decimal as written: `mantissa` × 10^`exponent`, exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Decimal {
    mantissa: u128,
    exponent: i32,
}

/// Reads `digits[.digits][e±digits]`, with an optional plus and currency sign before.
fn decimal(text: &str) -> Result<Decimal, MoneyError> {
    let refuse = || MoneyError::NotDecimal(text.chars().take(LONGEST).collect());
    if text.len() > LONGEST {
        return Err(refuse());
    }
    let number = text.trim();
    let number = number.strip_prefix('+').unwrap_or(number);
    let number = number.strip_prefix(['$', '€', '£']).unwrap_or(number);
    if number.starts_with('-') {
        return Err(MoneyError::Negative(text.to_owned()));
    }
    let (number, exponent) = match number.split_once(['e', 'E']) {
        None => (number, 0),
        Some((number, exponent)) => (number, exponent.parse::<i32>().map_err(|_| refuse())?),
    };
    if exponent.abs() > LARGEST_EXPONENT {
        return Err(refuse());
    }
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = || whole.bytes().chain(fraction.bytes());
    if digits().next().is_none() || !digits().all(|byte| byte.is_ascii_digit()) {
        return Err(refuse());
    }
    let mut value = Decimal { mantissa: 0, exponent };
    // Zeros are only counted until another digit follows, so that trailing ones never overflow.
    let mut zeros = 0;
    for (position, byte) in digits().enumerate() {
        if position >= whole.len() {
            value.exponent -= 1;
        }
        if byte == b'0' {
            zeros += i32::from(value.mantissa != 0);
            continue;
        }
        let shifted = u32::try_from(zeros + 1)
            .ok()
            .and_then(|places| 10u128.checked_pow(places));
        let shifted = shifted.and_then(|factor| value.mantissa.checked_mul(factor));
        let added = shifted.and_then(|shifted| shifted.checked_add(u128::from(byte - b'0')));
        value.mantissa = added.ok_or_else(refuse)?;
        zeros = 0;
    }
    value.exponent += zeros;
    Ok(value)
}

/// `text` × 10^`places` as an integer.
fn scaled(text: &str, places: i32, round: bool) -> Result<u64, MoneyError> {
    let value = decimal(text)?;
    if value.mantissa == 0 {
        return Ok(0);
    }
    let too_large = || MoneyError::TooLarge(text.to_owned());
    let exponent = value.exponent + places;
    let power = |places: u32| 10u128.checked_pow(places);
    let integer = if exponent >= 0 {
        let factor = power(exponent.unsigned_abs()).ok_or_else(too_large)?;
        value.mantissa.checked_mul(factor).ok_or_else(too_large)?
    } else {
        // Beyond 10^38 nothing of a u128 is left, not even a half.
        let rest = power(exponent.unsigned_abs()).map(|divisor| (divisor, value.mantissa % divisor));
        match rest {
            Some((divisor, 0)) => value.mantissa / divisor,
            Some((divisor, _)) if round => divide(value.mantissa, divisor),
            None if round => 0,
            _ => return Err(MoneyError::TooFine(text.to_owned())),
        }
    };
    u64::try_from(integer).map_err(|_| too_large())
}

/// `numerator / denominator`, rounded half to even. The denominator is not 0.
pub fn divide(numerator: u128, denominator: u128) -> u128 {
    let (quotient, rest) = (numerator / denominator, numerator % denominator);
    // Compares rest with denominator − rest: twice the rest could overflow.
    let up = match rest.cmp(&(denominator - rest)) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Equal => quotient % 2 == 1,
        std::cmp::Ordering::Greater => true,
    };
    quotient + u128::from(up)
}

/// Nano-units of a decimal amount: `"1.25"` → 1,250,000,000.
///
/// # Errors
/// Whatever [`MoneyError`] says; nothing is rounded.
pub fn parse_nano(text: &str) -> Result<u64, MoneyError> {
    scaled(text, NANO_PLACES, false)
}

/// Nano-units per million tokens of a price per million tokens: `"$80.00"` → 80,000,000,000.
///
/// # Errors
/// As [`parse_nano`].
pub fn parse_price_per_mtok(text: &str) -> Result<u64, MoneyError> {
    parse_nano(text)
}

/// Nano-units per million tokens of a price per token: `"1.5e-07"` → 150,000,000.
///
/// # Errors
/// As [`parse_nano`].
pub fn parse_price_per_token(text: &str) -> Result<u64, MoneyError> {
    scaled(text, NANO_PLACES + MTOK_PLACES, false)
}

/// [`parse_price_per_token`], but what is finer than a nano-unit per million tokens is rounded half to even: a price list
/// made with floats has such tails.
///
/// # Errors
/// As [`parse_nano`], except [`MoneyError::TooFine`].
pub fn round_price_per_token(text: &str) -> Result<u64, MoneyError> {
    scaled(text, NANO_PLACES + MTOK_PLACES, true)
}

/// Prints nano-units as the shortest decimal of whole units, exactly: 150,000,000 → `0.15`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nano(pub i128);

impl fmt::Display for Nano {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, amount) = (if self.0 < 0 { "-" } else { "" }, self.0.unsigned_abs());
        let (whole, fraction) = (amount / u128::from(NANO), amount % u128::from(NANO));
        if fraction == 0 {
            return write!(f, "{sign}{whole}");
        }
        write!(f, "{sign}{whole}.{}", format!("{fraction:09}").trim_end_matches('0'))
    }
}

impl From<u64> for Nano {
    fn from(amount: u64) -> Self {
        Self(amount.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn decimals_are_read_to_the_digit() {
        for (text, nano) in [
            ("20", 20 * NANO),
            ("0.15", 150_000_000),
            ("$80.00", 80 * NANO),
            (" +1.25 ", 1_250_000_000),
            (".5", 500_000_000),
            ("5.", 5 * NANO),
            ("0", 0),
            ("0e-99", 0),
            ("0.000000001", 1),
            ("1e-9", 1),
            ("10e-10", 1),
            ("18446744073.709551615", u64::MAX),
            ("000000000000000000000000000000000000000000000000000000001", NANO),
            ("1.00000000000000000000000000000000000000000000000000000000", NANO),
        ] {
            assert_eq!(parse_nano(text), Ok(nano), "{text}");
        }
        assert_eq!(parse_price_per_token("1.5e-07"), Ok(150_000_000));
        assert_eq!(parse_price_per_token("0.0000025"), Ok(2_500_000_000));
        assert_eq!(parse_price_per_token("1E-15"), Ok(1));
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        for text in [
            "", ".", "$", "abc", "1,5", "1e", "1e1.5", "1e100", "0x10", "NaN", "inf", "1 2", "1.2.3", "٣",
        ] {
            assert!(matches!(parse_nano(text), Err(MoneyError::NotDecimal(_))), "{text}");
        }
        assert!(matches!(parse_nano(&"1".repeat(65)), Err(MoneyError::NotDecimal(_))));
        assert!(matches!(parse_nano(&"9".repeat(60)), Err(MoneyError::NotDecimal(_))));
        assert!(matches!(parse_nano("-1"), Err(MoneyError::Negative(_))));
        assert!(matches!(parse_nano("0.0000000001"), Err(MoneyError::TooFine(_))));
        assert!(matches!(parse_nano("1e-60"), Err(MoneyError::TooFine(_))));
        assert!(matches!(
            parse_nano("18446744073.709551616"),
            Err(MoneyError::TooLarge(_))
        ));
        assert!(matches!(parse_nano("1e40"), Err(MoneyError::TooLarge(_))));
    }

    #[test]
    fn tails_of_floats_are_rounded_only_when_asked() {
        let text = "3.5000000000000004e-07";
        assert!(matches!(parse_price_per_token(text), Err(MoneyError::TooFine(_))));
        assert_eq!(round_price_per_token(text), Ok(350_000_000));
        assert_eq!(round_price_per_token("2.5e-15"), Ok(2));
        assert_eq!(round_price_per_token("3.5e-15"), Ok(4));
        assert_eq!(round_price_per_token("1e-90"), Ok(0));
    }

    #[test]
    fn halves_go_to_the_even_side() {
        let rounded: Vec<u128> = (0..8).map(|n| divide(n, 2)).collect();
        assert_eq!(rounded, [0, 0, 1, 2, 2, 2, 3, 4]);
        assert_eq!(divide(u128::MAX, u128::MAX), 1);
        assert_eq!(divide(u128::MAX - 1, u128::MAX), 1);
        assert_eq!(divide(u128::MAX / 2, u128::MAX), 0);
    }

    #[test]
    fn amounts_print_short_and_exact() {
        for (nano, text) in [
            (0, "0"),
            (1, "0.000000001"),
            (-1, "-0.000000001"),
            (150_000_000, "0.15"),
            (20 * i128::from(NANO), "20"),
            (-20 * i128::from(NANO), "-20"),
            (-1_500_000_000, "-1.5"),
        ] {
            assert_eq!(Nano(nano).to_string(), text);
        }
    }

    proptest! {
        #[test]
        fn printing_and_reading_agree(nano in any::<u64>()) {
            prop_assert_eq!(parse_nano(&Nano::from(nano).to_string()), Ok(nano));
        }

        #[test]
        fn rounding_is_never_off_by_more_than_half(numerator in any::<u128>(), denominator in 1..=u128::from(u64::MAX)) {
            let quotient = divide(numerator, denominator);
            let distance = match quotient.checked_mul(denominator) {
                Some(product) => product.abs_diff(numerator),
                // One step beyond the range: the rest is what it took.
                None => denominator - numerator % denominator,
            };
            prop_assert!(distance * 2 <= denominator);
            prop_assert!(distance * 2 != denominator || quotient.is_multiple_of(2));
        }

        #[test]
        fn nothing_panics(text in ".{0,40}") {
            let _ = parse_nano(&text);
            let _ = round_price_per_token(&text);
        }
    }
}
