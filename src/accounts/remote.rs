//! Calls to a coordinator's API, and tables.

use crate::cli::Remote;
use anyhow::{Context, anyhow};
use baton_loadtest::{Client, Failure, FailureKind, Target};
use serde_json::Value;
use std::process::ExitCode;
use std::time::Duration;

/// Longest wait for an answer: a change waits for an election at most.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// A coordinator's API.
pub struct Api {
    url: String,
    client: Client,
}

impl Api {
    fn new(remote: &Remote) -> anyhow::Result<Self> {
        Ok(Self {
            url: remote.url.clone(),
            client: Client::new(Target::parse(&remote.url)?, remote.api_key.clone(), ANSWER_MAX),
        })
    }

    /// `GET`.
    pub async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.read(self.client.get(path).await)
    }

    /// `POST`.
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.read(self.client.post(path, body.to_string()).await)
    }

    /// `DELETE`.
    pub async fn delete(&self, path: &str) -> anyhow::Result<Value> {
        self.read(self.client.delete(path).await)
    }

    /// All pages of a list.
    pub async fn list(&self, path: &str) -> anyhow::Result<Vec<Value>> {
        let mut all = Vec::new();
        let mut next = path.to_owned();
        loop {
            let page = self.get(&next).await?;
            all.extend(page["data"].as_array().cloned().unwrap_or_default());
            let last = page["last_id"].as_str().filter(|_| page["has_more"] == true);
            let Some(last) = last else { return Ok(all) };
            let and = if path.contains('?') { '&' } else { '?' };
            next = format!("{path}{and}after={}", escape(last));
        }
    }

    fn read(&self, answer: Result<impl AsRef<[u8]>, Failure>) -> anyhow::Result<Value> {
        let url = &self.url;
        let body = answer.map_err(|failure| match failure.kind {
            FailureKind::Connect | FailureKind::Timeout => {
                anyhow!("nothing answers at {url}; name the cluster's address with --url or BATON_URL")
            }
            FailureKind::Status(401) => {
                anyhow!(
                    "{url} wants a key: {}; give it with --api-key or BATON_API_KEY",
                    failure.message
                )
            }
            _ => anyhow!("{}", failure.message),
        })?;
        serde_json::from_slice(body.as_ref())
            .map_err(|_| anyhow!("{url} answers, but not as a baton coordinator does; name its address with --url"))
    }
}

/// Runs something that asks the API.
pub fn run(remote: &Remote, ask: impl AsyncFnOnce(&Api) -> anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let api = Api::new(remote)?;
    runtime.block_on(ask(&api))?;
    Ok(ExitCode::SUCCESS)
}

/// A value for a query or a path: everything but letters, digits and `-_.~` as `%XX`.
pub fn escape(value: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
    let each = value.bytes().map(|byte| match plain(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    });
    each.collect()
}

/// Columns under a header.
pub fn table<const N: usize>(header: [&str; N], rows: Vec<[String; N]>) -> String {
    let mut lines = vec![header.map(str::to_owned)];
    lines.extend(rows);
    let widths: Vec<usize> = (0..N)
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    let shown = lines.iter().map(|line| {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    });
    shown.collect()
}

/// A field for a table.
pub fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Array(all) if all.is_empty() => "all".into(),
        Value::Array(all) => all.iter().map(cell).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tables_align_and_values_are_escaped() {
        let text = table(
            ["A", "LONG"],
            vec![["long".into(), "b".into()], ["x".into(), cell(&json!(["p", 1]))]],
        );
        assert_eq!(text, "A     LONG\nlong  b\nx     p,1\n");
        assert_eq!(escape("a b/ü~"), "a%20b%2F%C3%BC~");
        assert_eq!((cell(&Value::Null), cell(&json!([]))), ("-".into(), "all".into()));
    }
}
