//! From what a person types as a model to a local path: an existing directory or GGUF file as it is, a hub id by downloading
//! it (config, tokenizer, chat template, safetensors) into the usual Hugging Face cache.
//!
//! Never loads a model, never downloads anything that is not needed to serve one, and refuses a model that cannot be
//! served before it downloads its weights.

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::is_plain_name;
use crate::gguf::gguf_file;
use crate::json::read_bounded;
use crate::progress::{Progress, Stage};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// A hub that sends nothing for this long is given up: the client library itself would wait for ever.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes between two progress reports of a file.
const REPORT_BYTES: usize = 1 << 20;
/// Events the download thread may be ahead of the thread that reports them.
const EVENTS_MAX: usize = 64;
/// Longest id or revision looked up.
const SPEC_CHARS_MAX: usize = 256;
/// The index of the largest published models is some hundred kilobytes.
const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Downloaded if the hub has them.
const OPTIONAL_FILES: [&str; 5] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];
const INDEX: &str = "model.safetensors.index.json";

/// Turns a directory, a GGUF file or a hub id (`org/name` or `org/name@revision`) into the path of the model's files.
///
/// The hub honours `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE`. Without a connection a complete earlier
/// download is used.
///
/// # Errors
/// [`ModelError::NotFound`], [`ModelError::UnsupportedFormat`] for single files, [`ModelError::Hub`] if the download
/// fails, and what [`ModelConfig::from_dir`] refuses.
pub fn resolve(spec: &str, progress: &dyn Progress) -> Result<PathBuf, ModelError> {
    match local(spec)? {
        Some(dir) => Ok(dir),
        None => Hub::from_env()?.resolve(spec, progress),
    }
}

/// A local directory or GGUF file, or `None` if `spec` can only be a hub id.
fn local(spec: &str) -> Result<Option<PathBuf>, ModelError> {
    let path = Path::new(spec);
    let refuse = |reason: &str| {
        Err(ModelError::UnsupportedFormat {
            path: path.to_owned(),
            reason: reason.to_owned(),
        })
    };
    if path.is_dir() {
        return Ok(Some(path.to_owned()));
    }
    if let Some(file) = gguf_file(path)? {
        return Ok(Some(file));
    }
    match path.extension().and_then(|e| e.to_str()) {
        Some("gguf") => return refuse("does not exist"),
        Some("safetensors") if path.is_file() => {
            return refuse(
                "is one file of a model; give the directory that also holds its config.json and tokenizer.json",
            );
        }
        _ if path.is_file() => {
            return refuse("is a file; a model is a directory with config.json and safetensors, or a .gguf file");
        }
        _ => {}
    }
    if parse_id(spec).is_none() {
        return Err(ModelError::NotFound {
            spec: spec.chars().take(SPEC_CHARS_MAX).collect(),
        });
    }
    Ok(None)
}

/// Splits `org/name[@revision]`.
fn parse_id(spec: &str) -> Option<(&str, &str)> {
    let (id, revision) = spec.split_once('@').unwrap_or((spec, "main"));
    let plain = |s: &str| {
        s.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && s.chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !s.contains("..")
    };
    let (org, name) = id.split_once('/')?;
    let revision_fits = revision.split('/').all(plain);
    (spec.len() <= SPEC_CHARS_MAX && plain(org) && plain(name) && revision_fits).then_some((id, revision))
}

/// A model hub and the cache for what comes from it.
#[derive(Debug, Clone)]
pub struct Hub {
    endpoint: String,
    cache: PathBuf,
    token: Option<String>,
    offline: bool,
}

impl Hub {
    /// A hub at `endpoint` (such as `https://huggingface.co`), cached in `cache` in the usual layout.
    pub fn new(endpoint: impl Into<String>, cache: impl Into<PathBuf>) -> Self {
        let endpoint = endpoint.into().trim_end_matches('/').to_owned();
        Hub {
            endpoint,
            cache: cache.into(),
            token: None,
            offline: false,
        }
    }

    /// The hub that the environment names: `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// [`ModelError::Hub`] if there is no place for the cache.
    pub fn from_env() -> Result<Self, ModelError> {
        let var = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let home = var("HF_HOME").map(PathBuf::from);
        let home = home.or_else(|| Some(std::env::home_dir()?.join(".cache").join("huggingface")));
        let cache = home.ok_or_else(|| ModelError::Hub {
            repo: "any model".into(),
            what: "files".into(),
            reason: "there is no home directory to keep them in; set HF_HOME".into(),
        })?;
        let cache = cache.join("hub");
        Ok(Hub {
            endpoint: var("HF_ENDPOINT")
                .unwrap_or_else(|| "https://huggingface.co".into())
                .trim_end_matches('/')
                .into(),
            token: var("HF_TOKEN").or_else(|| Cache::new(cache.clone()).token()),
            cache,
            offline: var("HF_HUB_OFFLINE").is_some_and(|v| v != "0"),
        })
    }

    /// Downloads what is missing of `org/name[@revision]` and returns its directory.
    ///
    /// # Errors
    /// As [`resolve`].
    pub fn resolve(&self, spec: &str, progress: &dyn Progress) -> Result<PathBuf, ModelError> {
        let Some((id, revision)) = parse_id(spec) else {
            return Err(ModelError::NotFound {
                spec: spec.chars().take(SPEC_CHARS_MAX).collect(),
            });
        };
        let (events, inbox) = mpsc::sync_channel(EVENTS_MAX);
        let job = Download {
            hub: self.clone(),
            id: id.to_owned(),
            revision: revision.to_owned(),
            events,
        };
        // On a thread of its own, so that a hub that stalls can be given up. The thread then ends with its connection.
        let spawned = std::thread::Builder::new().name("hub".into()).spawn(move || job.run());
        spawned.map_err(|e| self.error(spec, "files", format!("the system refused a thread ({e})")))?;
        loop {
            match inbox.recv_timeout(STALL_TIMEOUT) {
                Ok(Event::Progress { file, done, total }) => progress.update(Stage::Download(&file), done, total),
                Ok(Event::End(result)) => return *result,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let reason = format!("nothing arrived for {} seconds; try again", STALL_TIMEOUT.as_secs());
                    return Err(self.error(spec, "files", reason));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(self.error(
                        spec,
                        "files",
                        "the hub sent an answer that could not be understood".into(),
                    ));
                }
            }
        }
    }

    fn error(&self, repo: &str, what: &str, reason: String) -> ModelError {
        ModelError::Hub {
            repo: repo.into(),
            what: what.into(),
            reason,
        }
    }

    fn api(&self) -> Result<Api, ApiError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(false)
            .with_retries(3)
            .build()
    }
}

enum Event {
    Progress { file: String, done: u64, total: u64 },
    End(Box<Result<PathBuf, ModelError>>),
}

/// A commit of a model on the hub, with its files.
struct Commit<'a> {
    api: &'a Api,
    repo: Repo,
    listed: &'a BTreeSet<&'a str>,
}

/// One download, on its own thread.
struct Download {
    hub: Hub,
    id: String,
    revision: String,
    events: mpsc::SyncSender<Event>,
}

impl Download {
    fn run(self) {
        let result = match self.download() {
            Err(error @ ModelError::Hub { .. }) => match self.cached() {
                Some(dir) => {
                    tracing::warn!(model = %self.id, %error, "using the copy downloaded earlier");
                    Ok(dir)
                }
                None => Err(error),
            },
            other => other,
        };
        // Nobody listens any more if the download was given up.
        let _ = self.events.send(Event::End(Box::new(result)));
    }

    fn error(&self, what: &str, reason: String) -> ModelError {
        self.hub.error(&format!("{}@{}", self.id, self.revision), what, reason)
    }

    /// The earlier download of this revision, if it is complete.
    fn cached(&self) -> Option<PathBuf> {
        let repo = Repo::with_revision(self.id.clone(), RepoType::Model, self.revision.clone());
        let dir = Cache::new(self.hub.cache.clone())
            .repo(repo)
            .get("config.json")?
            .parent()?
            .to_owned();
        let weights = match dir.join(INDEX).is_file() {
            true => shards(&dir.join(INDEX)).ok()?,
            false => BTreeSet::from(["model.safetensors".to_owned()]),
        };
        let complete = dir.join("tokenizer.json").is_file() && weights.iter().all(|f| dir.join(f).is_file());
        complete.then_some(dir)
    }

    fn download(&self) -> Result<PathBuf, ModelError> {
        if self.hub.offline {
            return Err(self.error(
                "files",
                "HF_HUB_OFFLINE is set and no complete earlier download was found".into(),
            ));
        }
        let api = self.hub.api().map_err(|e| self.explain("files", &e))?;
        let named = Repo::with_revision(self.id.clone(), RepoType::Model, self.revision.clone());
        let info = api
            .repo(named.clone())
            .info()
            .map_err(|e| self.explain("the list of files", &e))?;
        if !is_plain_name(&info.sha) {
            return Err(self.error("the list of files", "the hub named no proper commit".into()));
        }
        let listed: BTreeSet<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
        // Everything from the one commit, even if the branch moves meanwhile.
        let repo = Repo::with_revision(self.id.clone(), RepoType::Model, info.sha.clone());
        let at = Commit {
            api: &api,
            repo,
            listed: &listed,
        };
        let config = self.get(&at, "config.json")?;
        let dir = config.parent().map(Path::to_owned).unwrap_or_default();
        for file in OPTIONAL_FILES.iter().filter(|f| listed.contains(**f)) {
            self.get(&at, file)?;
        }
        // Refuses what cannot be served before gigabytes are fetched.
        ModelConfig::from_dir(&dir)?;
        self.get(&at, "tokenizer.json")?;
        for file in self.weight_files(&at)? {
            self.get(&at, &file)?;
        }
        // So that the branch's name finds this commit without a connection.
        let cache = Cache::new(self.hub.cache.clone()).repo(named);
        cache
            .create_ref(&info.sha)
            .map_err(|e| ModelError::io(&self.hub.cache, e))?;
        Ok(dir)
    }

    fn weight_files(&self, at: &Commit<'_>) -> Result<BTreeSet<String>, ModelError> {
        let listed = at.listed;
        if listed.contains(INDEX) {
            return shards(&self.get(at, INDEX)?);
        }
        let single: Vec<&str> = listed
            .iter()
            .copied()
            .filter(|f| is_plain_name(f) && f.ends_with(".safetensors"))
            .collect();
        match single[..] {
            _ if listed.contains("model.safetensors") => Ok(BTreeSet::from(["model.safetensors".to_owned()])),
            [only] => Ok(BTreeSet::from([only.to_owned()])),
            _ => Err(self.error(
                "weights",
                "the hub has no safetensors of this model; choose another version of it".into(),
            )),
        }
    }

    fn get(&self, at: &Commit<'_>, file: &str) -> Result<PathBuf, ModelError> {
        if !at.listed.contains(file) {
            return Err(self.error(&format!("`{file}`"), "the hub does not have it".into()));
        }
        // Complete if there: the library links a file into its commit only after the whole download.
        if let Some(path) = Cache::new(self.hub.cache.clone()).repo(at.repo.clone()).get(file) {
            return Ok(path);
        }
        let progress = FileProgress {
            file: file.to_owned(),
            done: 0,
            reported: 0,
            total: 0,
            events: self.events.clone(),
        };
        at.api
            .repo(at.repo.clone())
            .download_with_progress(file, progress)
            .map_err(|e| self.explain(&format!("`{file}`"), &e))
    }

    /// An error of the client library as a cause and a way out.
    fn explain(&self, what: &str, error: &ApiError) -> ModelError {
        let text = error.to_string();
        let status = text.split("status code ").nth(1).and_then(|t| t.get(..3)).unwrap_or("");
        let reason = match status {
            "401" | "403" => {
                "access was denied; check the id, accept the model's licence on the hub and set HF_TOKEN".into()
            }
            "404" => "the hub has no such model or revision, and there is no such directory here; check the id".into(),
            "429" => "the hub asks to slow down; try again later or set HF_TOKEN".into(),
            _ => format!("{text}; check the connection (or HF_ENDPOINT), or give a directory"),
        };
        self.error(what, reason)
    }
}

/// The shard files that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>, ModelError> {
    let damaged = || ModelError::weights(index, "it is not a valid index of shards");
    let bytes = read_bounded(index, INDEX_BYTES_MAX)?.ok_or_else(damaged)?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|_| damaged())?;
    let map = value
        .get("weight_map")
        .and_then(|m| m.as_object())
        .ok_or_else(damaged)?;
    let plain = |v: &serde_json::Value| v.as_str().filter(|f| is_plain_name(f)).map(str::to_owned);
    map.values().map(|v| plain(v).ok_or_else(damaged)).collect()
}

/// Passes a file's progress on to the thread that asked for the download.
struct FileProgress {
    file: String,
    done: usize,
    reported: usize,
    total: usize,
    events: mpsc::SyncSender<Event>,
}

impl FileProgress {
    fn report(&mut self) {
        self.reported = self.done;
        let (done, total) = (self.done as u64, self.total as u64);
        let _ = self.events.send(Event::Progress {
            file: self.file.clone(),
            done,
            total,
        });
    }
}

impl hf_hub::api::Progress for FileProgress {
    fn init(&mut self, size: usize, _filename: &str) {
        (self.done, self.total) = (0, size);
        self.report();
    }

    fn update(&mut self, size: usize) {
        self.done += size;
        if self.done - self.reported >= REPORT_BYTES {
            self.report();
        }
    }

    fn finish(&mut self) {
        self.done = self.total;
        self.report();
    }
}
