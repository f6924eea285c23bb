//! Drives [`baton_limits::Rates`]: the parties of a caller, the clock, and OpenAI's headers.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use baton_limits::{Allowance, Charge, Limited, Party, Rate, Rates, Unit};
use baton_proto::state::{ApiKey, Limits, Project, UsageRecord};
use baton_state::{Tables, TablesError, view};

use super::keys::Account;

/// The rates of all keys and projects, as this member knows them.
pub(crate) struct RateDesk {
    rates: Mutex<Rates>,
    started: Instant,
}

impl Default for RateDesk {
    fn default() -> Self {
        Self {
            rates: Mutex::default(),
            started: Instant::now(),
        }
    }
}

impl RateDesk {
    /// Lets a request in. `max_tokens` is what the client asked for, or else `room`, which is more than most answers take:
    /// then it is charged no more than would ever fit, and the rest, should it be used, is owed.
    pub fn admit(
        &self,
        account: &Account,
        prompt_tokens: u32,
        max_tokens: u32,
        asked: bool,
    ) -> Result<Option<Charge>, Limited> {
        let parties = parties(&account.key, &account.project);
        if parties.is_empty() {
            return Ok(None);
        }
        let mut tokens = u64::from(prompt_tokens) + u64::from(max_tokens);
        if !asked {
            let limits = parties.iter().map(|party| party.rate.tokens_per_min);
            let fits = limits.filter(|limit| *limit > 0).min().unwrap_or(tokens);
            tokens = tokens.min(fits.max(u64::from(prompt_tokens) + 1));
        }
        self.lock().admit(&parties, tokens, self.now()).map(Some)
    }

    /// A request has ended.
    pub fn settle(&self, charge: Charge, tokens: u64) {
        self.lock().settle(charge, tokens, self.now());
    }

    /// A record of another member was applied.
    pub fn elsewhere(&self, tables: &dyn Tables, record: &UsageRecord) -> Result<(), TablesError> {
        if record.key_id.is_empty() {
            return Ok(());
        }
        let Some(key) = view::key(tables, &record.key_id)? else {
            return Ok(());
        };
        let Some(project) = view::project(tables, &key.project_id)? else {
            return Ok(());
        };
        let parties = parties(&key, &project);
        let tokens = u64::from(record.prompt_tokens) + u64::from(record.completion_tokens);
        self.lock().elsewhere(&parties, 1, tokens, self.now());
        Ok(())
    }

    /// Sets `x-ratelimit-*`, for the tightest of the caller's limits; nothing where there are none.
    pub fn headers(&self, account: &Account, headers: &mut HeaderMap) {
        let parties = parties(&account.key, &account.project);
        if parties.is_empty() {
            return;
        }
        let (rates, now) = (self.lock(), self.now());
        for (unit, names) in [
            (
                Unit::Requests,
                [
                    "x-ratelimit-limit-requests",
                    "x-ratelimit-remaining-requests",
                    "x-ratelimit-reset-requests",
                ],
            ),
            (
                Unit::Tokens,
                [
                    "x-ratelimit-limit-tokens",
                    "x-ratelimit-remaining-tokens",
                    "x-ratelimit-reset-tokens",
                ],
            ),
        ] {
            let Some(Allowance {
                limit,
                remaining,
                reset,
            }) = rates.allowance(unit, &parties, now)
            else {
                continue;
            };
            let values = [limit.to_string(), remaining.to_string(), shown(reset)];
            for (name, value) in names.into_iter().zip(values) {
                if let Ok(value) = HeaderValue::from_str(&value) {
                    headers.insert(HeaderName::from_static(name), value);
                }
            }
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those of key and project that have limits.
fn parties(key: &ApiKey, project: &Project) -> Vec<Party> {
    let rate = |limits: Limits| Rate {
        requests_per_min: limits.requests_per_min,
        tokens_per_min: limits.tokens_per_min,
    };
    // An id of one kind is never that of the other.
    [("key ", &key.id, key.limits), ("project ", &project.id, project.limits)]
        .into_iter()
        .filter_map(|(kind, id, limits)| {
            let rate = rate(limits.filter(|limits| *limits != Limits::default())?);
            let id = format!("{kind}{id}").into();
            Some(Party { id, rate })
        })
        .collect()
}

/// As OpenAI writes times: `120ms`, `6.5s`, `1m30s`.
fn shown(time: Duration) -> String {
    let ms = time.as_millis();
    if ms < 1000 {
        return format!("{ms}ms");
    }
    let (minutes, rest) = (ms / 60_000, ms % 60_000);
    let seconds = match rest % 1000 {
        0 => format!("{}s", rest / 1000),
        part => format!("{}.{part:03}s", rest / 1000)
            .replace("00s", "s")
            .replace("0s", "s"),
    };
    if minutes == 0 {
        return seconds;
    }
    format!("{minutes}m{seconds}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_as_openai_shows_them() {
        for (ms, text) in [
            (0, "0ms"),
            (999, "999ms"),
            (1000, "1s"),
            (10_000, "10s"),
            (6500, "6.5s"),
            (1010, "1.01s"),
            (1001, "1.001s"),
            (60_000, "1m0s"),
            (90_250, "1m30.25s"),
        ] {
            assert_eq!(shown(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn a_request_without_a_wish_is_charged_no_more_than_fits() {
        let desk = RateDesk::default();
        let limits = |tokens_per_min| {
            Some(Limits {
                requests_per_min: 0,
                tokens_per_min,
            })
        };
        let account = Account {
            key: ApiKey {
                id: "k".into(),
                limits: limits(100),
                ..ApiKey::default()
            },
            project: Project::default(),
            budgets: Vec::new(),
        };
        assert!(matches!(
            desk.admit(&account, 10, 1000, true),
            Err(Limited::TooLarge {
                limit: 100,
                asked: 1010,
                ..
            })
        ));
        let charge = desk.admit(&account, 10, 1000, false).unwrap().unwrap();
        let mut headers = HeaderMap::new();
        desk.headers(&account, &mut headers);
        assert_eq!(headers["x-ratelimit-limit-tokens"], "100");
        let remaining = |headers: &HeaderMap| {
            headers["x-ratelimit-remaining-tokens"]
                .to_str()
                .unwrap()
                .parse::<u64>()
                .unwrap()
        };
        assert!(remaining(&headers) < 10);
        assert!(!headers.contains_key("x-ratelimit-limit-requests"));
        assert!(matches!(
            desk.admit(&account, 90, 1, true),
            Err(Limited::Wait { unit: Unit::Tokens, .. })
        ));
        desk.settle(charge, 15);
        desk.headers(&account, &mut headers);
        assert!(remaining(&headers) >= 85);
    }
}
