//! Reads recorded traces: Mooncake's JSON lines (milliseconds, token counts, ids of 512-token blocks whose equality
//! means a shared prefix) and Azure's CSV (wall-clock arrivals, token counts). Text in, numbers out: prompts are made
//! elsewhere, since traces hold none.

use crate::BenchError;
use serde::Deserialize;
use std::path::Path;
use std::time::Duration;

/// Tokens per block of Mooncake's `hash_ids`.
pub const HASH_BLOCK_TOKENS: u32 = 512;
/// Largest trace file in bytes; the published ones are a few megabytes.
const TRACE_BYTES_MAX: u64 = 1 << 30;

/// Which published format a trace has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceFormat {
    /// JSON lines with `timestamp` (ms), `input_length`, `output_length`, `hash_ids`.
    Mooncake,
    /// CSV with `TIMESTAMP,ContextTokens,GeneratedTokens`.
    Azure,
}

/// One recorded request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceRequest {
    /// Arrival, from the start of the trace.
    pub at: Duration,
    /// Prompt length.
    pub input_tokens: u32,
    /// Answer length.
    pub output_tokens: u32,
    /// Names of the prompt's blocks of 512 tokens; empty where the trace has none.
    pub hash_ids: Vec<u64>,
}

/// A whole trace in order of arrival.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    /// The requests.
    pub requests: std::sync::Arc<[TraceRequest]>,
}

impl Trace {
    /// Reads a trace file; the format is told by the first line.
    pub fn load(path: &Path) -> Result<Self, BenchError> {
        let file_error = |source| BenchError::TraceFile {
            path: path.into(),
            source,
        };
        let bytes = std::fs::metadata(path).map_err(file_error)?.len();
        if bytes > TRACE_BYTES_MAX {
            return Err(file_error(std::io::Error::other("it is larger than 1 GiB")));
        }
        parse_trace(&std::fs::read_to_string(path).map_err(file_error)?)
    }
}

/// Parses a trace of either format.
pub fn parse_trace(text: &str) -> Result<Trace, BenchError> {
    let mut requests = Vec::new();
    match format_of(text) {
        Some(TraceFormat::Mooncake) => {
            for (line, text) in numbered(text) {
                requests.push(mooncake(text).map_err(|reason| BenchError::TraceLine { line, reason })?);
            }
        }
        Some(TraceFormat::Azure) => {
            for (line, text) in numbered(text).skip(1) {
                requests.push(azure(text).map_err(|reason| BenchError::TraceLine { line, reason })?);
            }
        }
        None => {
            return Err(BenchError::TraceLine {
                line: 1,
                reason: "neither JSON lines with timestamp, input_length and output_length nor CSV with the header \
                         TIMESTAMP,ContextTokens,GeneratedTokens"
                    .into(),
            });
        }
    }
    requests.sort_by_key(|r| r.at);
    let first = requests.first().map(|r| r.at).unwrap_or_default();
    for request in &mut requests {
        request.at -= first;
    }
    Ok(Trace {
        requests: requests.into(),
    })
}

fn format_of(text: &str) -> Option<TraceFormat> {
    let first = text.lines().next()?.trim_start_matches('\u{feff}').trim();
    match first {
        _ if first.starts_with('{') => Some(TraceFormat::Mooncake),
        _ if first.eq_ignore_ascii_case("TIMESTAMP,ContextTokens,GeneratedTokens") => Some(TraceFormat::Azure),
        _ => None,
    }
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty())
}

fn mooncake(line: &str) -> Result<TraceRequest, String> {
    #[derive(Deserialize)]
    struct Line {
        timestamp: f64,
        input_length: u32,
        output_length: u32,
        #[serde(default)]
        hash_ids: Vec<u64>,
    }
    let line: Line = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let at =
        Duration::try_from_secs_f64(line.timestamp / 1000.0).map_err(|_| "timestamp is out of range".to_owned())?;
    Ok(TraceRequest {
        at,
        input_tokens: line.input_length,
        output_tokens: line.output_length,
        hash_ids: line.hash_ids,
    })
}

fn azure(line: &str) -> Result<TraceRequest, String> {
    let fields: Vec<&str> = line.split(',').collect();
    let [at, input, output] = fields[..] else {
        return Err(format!("{} fields instead of 3", fields.len()));
    };
    let count = |text: &str| {
        text.trim()
            .parse::<u32>()
            .map_err(|_| format!("{text:?} is not a token count"))
    };
    Ok(TraceRequest {
        at: wall_clock(at).ok_or_else(|| format!("{at:?} is not a time like 2023-11-16 18:15:46.68"))?,
        input_tokens: count(input)?,
        output_tokens: count(output)?,
        hash_ids: Vec::new(),
    })
}

/// `YYYY-MM-DD HH:MM:SS[.fraction]` as time since 1970, without zone (only differences matter).
fn wall_clock(text: &str) -> Option<Duration> {
    let (date, time) = text.trim().split_once(' ')?;
    let mut date = date.splitn(3, '-').map(|part| part.parse::<u32>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.splitn(3, ':');
    let (hours, minutes) = (time.next()?.parse::<u32>().ok()?, time.next()?.parse::<u32>().ok()?);
    let seconds: f64 = time.next()?.parse().ok()?;
    let plausible = (1970..=9999).contains(&year) && (1..=12).contains(&month) && (1..=31).contains(&day);
    if !plausible || hours > 23 || minutes > 59 || !(0.0..61.0).contains(&seconds) {
        return None;
    }
    let whole = days_since_1970(year, month, day) * 86_400 + u64::from(hours) * 3600 + u64::from(minutes) * 60;
    Some(Duration::from_secs(whole) + Duration::from_secs_f64(seconds))
}

/// Days in the Gregorian calendar: the year is counted from March, so that the leap day comes last.
fn days_since_1970(year: u32, month: u32, day: u32) -> u64 {
    let (year, month) = match month {
        3.. => (u64::from(year), u64::from(month) - 3),
        _ => (u64::from(year) - 1, u64::from(month) + 9),
    };
    year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + u64::from(day) - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mooncake_lines() {
        let trace = parse_trace(concat!(
            "{\"timestamp\": 3000, \"input_length\": 700, \"output_length\": 9, \"hash_ids\": [0, 7]}\n\n",
            "{\"timestamp\": 1500, \"input_length\": 10, \"output_length\": 1, \"hash_ids\": [0]}\n",
        ))
        .expect("well formed");
        let at: Vec<_> = trace.requests.iter().map(|r| r.at.as_millis()).collect();
        assert_eq!(at, [0, 1500], "sorted, from the first arrival");
        assert_eq!(trace.requests[1].hash_ids, [0, 7]);
    }

    #[test]
    fn azure_lines_across_midnight_and_leap_day() {
        let trace = parse_trace(
            "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2024-02-28 23:59:59.5,374,44\r\n2024-03-01 00:00:00.0000000,1,2\r\n",
        )
        .expect("well formed");
        assert_eq!(trace.requests[1].at, Duration::from_millis(86_400_500));
        assert_eq!(
            (trace.requests[0].input_tokens, trace.requests[0].output_tokens),
            (374, 44)
        );
    }

    #[test]
    fn days_are_right() {
        assert_eq!(days_since_1970(1970, 1, 1), 0);
        assert_eq!(days_since_1970(2000, 3, 1), 11_017);
        assert_eq!(days_since_1970(2023, 11, 16), 19_677);
    }

    #[test]
    fn bad_lines_are_named() {
        for (text, line) in [
            ("hello", 1),
            ("", 1),
            (
                "{\"timestamp\":0,\"input_length\":1,\"output_length\":1}\n{\"timestamp\":-5,\"input_length\":1,\"output_length\":1}",
                2,
            ),
            ("{\"timestamp\":0,\"input_length\":-1,\"output_length\":1}", 1),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-13-01 00:00:00,1,1", 2),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-12-01 00:00:00,1", 2),
            ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-12-01 00:00:NaN,1,1", 2),
        ] {
            match parse_trace(text) {
                Err(BenchError::TraceLine { line: found, .. }) => assert_eq!(found, line, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}
