//! The lines of a batch's input file: what they must be, and what is wrong with those that are not. A file is valid as a
//! whole or not at all; what a line asks of its endpoint is checked when it is run.

use std::collections::HashSet;

use baton_proto::state::BatchError;
use baton_state::bounds::{BATCH_ERRORS_MAX, BATCH_LINES_MAX};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::files::Line;

/// Bytes of a line's name.
const CUSTOM_ID_BYTES_MAX: usize = 512;
/// Beyond the body: names, method, endpoint.
pub(super) const LINE_EXTRA_BYTES_MAX: usize = 16 << 10;

/// A line, taken apart.
#[derive(Debug, Deserialize)]
pub(super) struct Request<'a> {
    pub custom_id: Option<String>,
    pub method: Option<String>,
    pub url: Option<String>,
    #[serde(borrow)]
    pub body: Option<&'a RawValue>,
}

/// What is looked at in a body before it runs.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Peek {
    model: Option<serde_json::Value>,
    stream: Option<serde_json::Value>,
}

impl Peek {
    pub fn streams(&self) -> bool {
        self.stream == Some(serde_json::Value::Bool(true))
    }
}

/// Takes a line apart that was valid.
pub(super) fn request(line: &[u8]) -> Option<Request<'_>> {
    serde_json::from_slice(line).ok()
}

/// A file that is checked line by line.
pub(super) struct Check {
    endpoint: String,
    /// Half of the hash of each name: 50,000 of them take a few MB, however long they are.
    names: HashSet<[u8; 16]>,
    lines: u32,
    /// Of all lines so far; `None` where they differ.
    model: Option<String>,
    errors: Vec<BatchError>,
}

impl Check {
    pub fn new(endpoint: String) -> Self {
        Self {
            endpoint,
            names: HashSet::new(),
            lines: 0,
            model: None,
            errors: Vec::new(),
        }
    }

    /// Checks the next line. Says whether more need to be looked at.
    pub fn line(&mut self, line: &Line) -> bool {
        self.lines += 1;
        if self.lines > BATCH_LINES_MAX {
            let message = format!("The file has more than {BATCH_LINES_MAX} requests.");
            self.errors = vec![error("too_many_requests", message, "", 0)];
            return false;
        }
        if let Err(error) = self.check(line.text.as_ref(), line.number) {
            self.errors.push(error);
        }
        self.errors.len() < BATCH_ERRORS_MAX
    }

    fn check(&mut self, text: Option<&Bytes>, number: u32) -> Result<(), BatchError> {
        let wrong = |code, message: String, param| Err(error(code, message, param, number));
        let Some(text) = text else {
            return wrong("line_too_long", "This line is longer than a request may be.".into(), "");
        };
        let Some(request) = request(text) else {
            let message = "This line is not parseable as valid JSON.".into();
            return wrong("invalid_json_line", message, "");
        };
        let missing = |param| {
            wrong(
                "missing_required_parameter",
                format!("Missing required parameter: {param}."),
                param,
            )
        };
        let Some(custom_id) = &request.custom_id else {
            return missing("custom_id");
        };
        if custom_id.is_empty() || custom_id.len() > CUSTOM_ID_BYTES_MAX {
            let message = format!("A custom_id has 1 to {CUSTOM_ID_BYTES_MAX} bytes.");
            return wrong("invalid_custom_id", message, "custom_id");
        }
        let mut name = [0; 16];
        name.copy_from_slice(&blake3::hash(custom_id.as_bytes()).as_bytes()[..16]);
        if !self.names.insert(name) {
            let shown: String = custom_id.chars().take(64).collect();
            let message = format!("The custom_id {shown} is that of another line; each must have its own.");
            return wrong("duplicate_custom_id", message, "custom_id");
        }
        match request.method.as_deref() {
            Some("POST") => {}
            Some(_) => return wrong("invalid_method", "The method must be POST.".into(), "method"),
            None => return missing("method"),
        }
        match request.url.as_deref() {
            Some(url) if url == self.endpoint => {}
            Some(_) => {
                let message = format!("The url must be the batch's endpoint, {}.", self.endpoint);
                return wrong("mismatched_url", message, "url");
            }
            None => return missing("url"),
        }
        let Some(body) = request.body else {
            return missing("body");
        };
        let Ok(peek) = serde_json::from_str::<Peek>(body.get()) else {
            return wrong("invalid_body", "The body must be a JSON object.".into(), "body");
        };
        if !body.get().trim_start().starts_with('{') {
            return wrong("invalid_body", "The body must be a JSON object.".into(), "body");
        }
        if peek.streams() {
            return wrong(
                "invalid_body",
                "A batch's requests cannot be streamed.".into(),
                "body.stream",
            );
        }
        let model = peek.model.and_then(|model| model.as_str().map(str::to_owned));
        if self.lines == 1 {
            self.model = model;
        } else if self.model != model {
            self.model = None;
        }
        Ok(())
    }

    /// After the last line: how many there are and which model they name, or what is wrong.
    pub fn end(mut self) -> Result<(u32, String), Vec<BatchError>> {
        if self.lines == 0 {
            let message = "The file has no requests.".to_owned();
            self.errors = vec![error("empty_file", message, "", 0)];
        }
        if !self.errors.is_empty() {
            return Err(self.errors);
        }
        let model = self.model.unwrap_or_default();
        let shown = model.len() <= baton_state::bounds::TEXT_BYTES_MAX;
        Ok((self.lines, if shown { model } else { String::new() }))
    }
}

fn error(code: &str, message: String, param: &str, line: u32) -> BatchError {
    BatchError {
        code: code.to_owned(),
        message,
        param: param.to_owned(),
        line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(lines: &[&[u8]]) -> Result<(u32, String), Vec<(String, u32)>> {
        let mut check = Check::new("/v1/chat/completions".into());
        for (at, text) in lines.iter().enumerate() {
            let text = (!text.is_empty()).then(|| Bytes::copy_from_slice(text));
            let number = at as u32 + 1;
            if !check.line(&Line { number, text }) {
                break;
            }
        }
        let told = |errors: Vec<BatchError>| errors.into_iter().map(|error| (error.code, error.line)).collect();
        check.end().map_err(told)
    }

    fn line(id: &str, model: &str) -> Vec<u8> {
        format!(r#"{{"custom_id":"{id}","method":"POST","url":"/v1/chat/completions","body":{{"model":"{model}"}}}}"#)
            .into_bytes()
    }

    #[test]
    fn every_line_is_checked() {
        assert_eq!(check(&[&line("a", "m"), &line("b", "m")]), Ok((2, "m".into())));
        assert_eq!(
            check(&[&line("a", "m"), &line("b", "n"), &line("c", "m")]),
            Ok((3, String::new()))
        );
        assert_eq!(check(&[]), Err(vec![("empty_file".into(), 0)]));
        let url = r#""method":"POST","url":"/v1/chat/completions""#;
        for (wrong, code) in [
            (b"{".to_vec(), "invalid_json_line"),
            (b"\xff\xfe".to_vec(), "invalid_json_line"),
            (b"[]".to_vec(), "invalid_json_line"),
            (Vec::new(), "line_too_long"),
            (line("a", "m"), "duplicate_custom_id"),
            (b"{}".to_vec(), "missing_required_parameter"),
            (br#"{"custom_id":""}"#.to_vec(), "invalid_custom_id"),
            (br#"{"custom_id":"x"}"#.to_vec(), "missing_required_parameter"),
            (br#"{"custom_id":"x","method":"GET"}"#.to_vec(), "invalid_method"),
            (
                br#"{"custom_id":"x","method":"POST"}"#.to_vec(),
                "missing_required_parameter",
            ),
            (
                br#"{"custom_id":"x","method":"POST","url":"/v1/x"}"#.to_vec(),
                "mismatched_url",
            ),
            (
                format!(r#"{{"custom_id":"x",{url}}}"#).into_bytes(),
                "missing_required_parameter",
            ),
            (
                format!(r#"{{"custom_id":"x",{url},"body":7}}"#).into_bytes(),
                "invalid_body",
            ),
            (
                format!(r#"{{"custom_id":"x",{url},"body":[]}}"#).into_bytes(),
                "invalid_body",
            ),
            (
                format!(r#"{{"custom_id":"x",{url},"body":{{"stream":true}}}}"#).into_bytes(),
                "invalid_body",
            ),
        ] {
            assert_eq!(
                check(&[&line("a", "m"), &wrong]),
                Err(vec![(code.into(), 2)]),
                "{}",
                String::from_utf8_lossy(&wrong)
            );
        }
    }

    #[test]
    fn bounds() {
        let many: Vec<Vec<u8>> = (0..=BATCH_LINES_MAX).map(|id| line(&id.to_string(), "m")).collect();
        let many: Vec<&[u8]> = many.iter().map(Vec::as_slice).collect();
        assert_eq!(check(&many[1..]), Ok((BATCH_LINES_MAX, "m".into())));
        assert_eq!(check(&many), Err(vec![("too_many_requests".into(), 0)]));
        let wrong = vec![b"{".as_slice(); 1000];
        assert_eq!(check(&wrong).unwrap_err().len(), BATCH_ERRORS_MAX);
    }
}
