//! Query parameters as OpenAI's clients send them: lists as `name=a&name=b` or `name[]=a&name[]=b`. One that a route does
//! not know is refused by name, because a filter that is ignored answers another question.

use std::collections::BTreeMap;
use std::str::FromStr;

use crate::api_error::ApiError;

/// Values of one list; more would be a query by other means.
const VALUES_MAX: usize = 100;

/// A query string, taken apart.
#[derive(Debug)]
pub(crate) struct Params(BTreeMap<String, Vec<String>>);

impl Params {
    pub fn new(pairs: Vec<(String, String)>) -> Result<Self, ApiError> {
        let mut map: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, value) in pairs {
            let name = name.strip_suffix("[]").unwrap_or(&name).to_owned();
            let values = map.entry(name.clone()).or_default();
            if values.len() >= VALUES_MAX {
                return Err(ApiError::field(name, format!("At most {VALUES_MAX} values are taken.")));
            }
            values.push(value);
        }
        Ok(Self(map))
    }

    /// A list; empty if it is not there.
    pub fn list(&mut self, name: &str) -> Vec<String> {
        self.0.remove(name).unwrap_or_default()
    }

    /// One value.
    pub fn one<T: FromStr>(&mut self, name: &str, what: &str) -> Result<Option<T>, ApiError> {
        let values = self.list(name);
        let wrong = || ApiError::field(name, format!("`{name}` must be {what}, once."));
        match values.as_slice() {
            [] => Ok(None),
            [value] => value.parse().map(Some).map_err(|_| wrong()),
            _ => Err(wrong()),
        }
    }

    /// A number within bounds, or its default.
    pub fn limit(&mut self, default: usize, max: usize) -> Result<usize, ApiError> {
        let limit = self.one::<usize>("limit", "a whole number")?.unwrap_or(default);
        if (1..=max).contains(&limit) {
            return Ok(limit);
        }
        Err(ApiError::field("limit", format!("`limit` must be from 1 to {max}.")))
    }

    /// To be called last.
    pub fn end(self) -> Result<(), ApiError> {
        match self.0.into_keys().next() {
            None => Ok(()),
            Some(name) => {
                let shown: String = name.chars().take(64).collect();
                Err(ApiError::unsupported(
                    &shown,
                    format!("Unknown query parameter `{shown}`."),
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(pairs: &[(&str, &str)]) -> Params {
        let pairs = pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Params::new(pairs.collect()).unwrap()
    }

    #[test]
    fn lists_come_both_ways_and_strangers_are_named() {
        let mut both = params(&[("a", "1"), ("a[]", "2"), ("limit", "7"), ("odd", "x")]);
        assert_eq!(both.list("a"), ["1", "2"]);
        assert_eq!(both.limit(3, 10).unwrap(), 7);
        assert_eq!(both.end().unwrap_err().param.as_deref(), Some("odd"));
        assert!(params(&[("limit", "11")]).limit(3, 10).is_err());
        assert!(params(&[("limit", "0")]).limit(3, 10).is_err());
        assert!(params(&[("n", "1"), ("n", "2")]).one::<u64>("n", "a number").is_err());
        assert!(params(&[("n", "x")]).one::<u64>("n", "a number").is_err());
    }
}
