//! What a serving cluster says of itself: a few lines for people, and `ready.json` for scripts and tests.

use super::data_dir::write_private;
use serde::Serialize;
use std::path::Path;

/// Content of `<data-dir>/ready.json`: there while the cluster serves, rewritten when a process is replaced.
#[derive(Debug, Clone, Serialize)]
pub struct Ready {
    /// Base URL of the API, without `/v1`.
    pub url: String,
    /// Name of the model served.
    pub model: String,
    /// Process id of `baton up` itself.
    pub pid: u32,
    /// The coordinators.
    pub coordinators: Vec<ReadyProcess>,
    /// The workers.
    pub workers: Vec<ReadyProcess>,
}

/// One process of the cluster.
#[derive(Debug, Clone, Serialize)]
pub struct ReadyProcess {
    /// Its name.
    pub name: String,
    /// `coordinator`, `prefill` or `decode`.
    pub role: &'static str,
    /// Its process id; 0 while it is being restarted.
    pub pid: u32,
    /// Base URL of the API it serves: every coordinator's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
}

impl Ready {
    /// Writes the file.
    pub fn write(&self, path: &Path) -> anyhow::Result<()> {
        write_private(path, &(serde_json::to_string_pretty(self)? + "\n"))
    }

    /// What is printed when the cluster serves.
    pub fn welcome(&self, logs: &Path, needs_key: bool) -> String {
        let authorization = if needs_key {
            " -H \"Authorization: Bearer $BATON_API_KEY\""
        } else {
            ""
        };
        let body = serde_json::json!({
            "model": self.model,
            "messages": [{"role": "user", "content": "Hello! What is baton?"}],
            "stream": true,
        });
        // A quote in a model's name would end the shell's string.
        let body = body.to_string().replace('\'', "'\\''");
        let url_flag = match self.url.as_str() {
            "http://127.0.0.1:8080" => String::new(),
            url => format!(" --url {url}"),
        };
        let others: Vec<&str> = self
            .coordinators
            .iter()
            .skip(1)
            .filter_map(|c| c.url.as_deref())
            .collect();
        let others = match others.is_empty() {
            true => String::new(),
            false => format!("any coordinator serves the same: {}\n", others.join(" ")),
        };
        format!(
            "\nbaton serves {model} at {url}/v1\n{others}\n  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{authorization} \\\n    -d '{body}'\n\n\
             workers  baton status{url_flag}\nlogs     {logs}\nstop     Ctrl-C\n",
            model = self.model,
            url = self.url,
            logs = logs.display(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curl_line_can_be_pasted() {
        let ready = Ready {
            url: "http://127.0.0.1:9".into(),
            model: "it's".into(),
            pid: 1,
            coordinators: vec![],
            workers: vec![],
        };
        let text = ready.welcome(Path::new("/logs"), false);
        assert!(text.contains("\"model\":\"it'\\''s\""), "{text}");
        assert!(text.contains("baton status --url http://127.0.0.1:9\n"));
        assert!(ready.welcome(Path::new("/logs"), true).contains("$BATON_API_KEY"));
        assert!(!text.contains("any coordinator"));
    }

    #[test]
    fn every_coordinators_address_is_told() {
        let coordinator = |index: u16| ReadyProcess {
            name: format!("coordinator-{index}"),
            role: "coordinator",
            pid: 7,
            url: Some(format!("http://127.0.0.1:{}", 8080 + index)),
        };
        let ready = Ready {
            url: "http://127.0.0.1:8080".into(),
            model: "m".into(),
            pid: 1,
            coordinators: (0..3).map(coordinator).collect(),
            workers: vec![],
        };
        let text = ready.welcome(Path::new("/logs"), false);
        assert!(
            text.contains("the same: http://127.0.0.1:8081 http://127.0.0.1:8082\n"),
            "{text}"
        );
    }
}
