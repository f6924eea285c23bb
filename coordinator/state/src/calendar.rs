//! Replicated time and the periods of the UTC calendar. Milliseconds of Unix time throughout.

use baton_proto::state::Period;

pub(crate) const MINUTE_MS: u64 = 60_000;
pub(crate) const HOUR_MS: u64 = 3_600_000;
pub(crate) const DAY_MS: u64 = 86_400_000;
/// The last millisecond of the year 9999. Later times are refused: one wrong clock would stop time for good.
pub const TIME_MAX_UNIX_MS: u64 = 253_402_300_799_999;

/// The start of the period that `at` is in; 0 for all time.
pub fn period_start(period: Period, at_unix_ms: u64) -> u64 {
    match period {
        Period::Unspecified | Period::Total => 0,
        Period::Day => at_unix_ms - at_unix_ms % DAY_MS,
        Period::Month => {
            let day = at_unix_ms / DAY_MS;
            (day - (day_of_month(day) - 1)) * DAY_MS
        }
    }
}

/// Day of the month, from 1, of a day counted from 1970-01-01. Howard Hinnant's `civil_from_days`, which counts years from
/// March on, so that a leap day is a year's last.
fn day_of_month(day: u64) -> u64 {
    let day_of_era = (day + 719_468) % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    day_of_year - (153 * month + 2) / 5 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_start_where_they_do() {
        // Days before each month of 2024 (a leap year), 2100 (none) and 2000 (one).
        for (year_start, leap) in [(19_723u64, true), (47_482, false), (10_957, true)] {
            let mut start = year_start;
            for (month, days) in [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31].into_iter().enumerate() {
                let days = days + u64::from(leap && month == 1);
                for day in start..start + days {
                    let at = day * DAY_MS + 12_345;
                    assert_eq!(period_start(Period::Month, at), start * DAY_MS, "day {day}");
                    assert_eq!(period_start(Period::Day, at), day * DAY_MS);
                    assert_eq!(period_start(Period::Total, at), 0);
                }
                start += days;
            }
        }
        assert_eq!(period_start(Period::Month, 0), 0);
        let last = period_start(Period::Month, TIME_MAX_UNIX_MS);
        assert_eq!(TIME_MAX_UNIX_MS + 1 - last, 31 * DAY_MS);
    }
}
