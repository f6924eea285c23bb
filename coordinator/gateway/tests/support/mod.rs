//! A scripted cluster, a gateway on a free loopback port, and a small HTTP/1.1 client that shows what is on the wire.
#![allow(dead_code)]

pub mod h2;
pub mod memory_chunks;
pub mod memory_store;
pub mod model_files;
pub mod route_list;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_gateway::{
    AccountStore, Backend, BackendError, ClusterSnapshot, GatewayConfig, Generation, GenerationEvent, Job, ModelInfo,
    Placement, ServedModel, WorkerRole, WorkerState, WorkerStatus,
};
use baton_proto::state::{SettleUsage, UsageRecord, command::Kind};
use baton_proto::worker::{Finish, FinishReason, TokenLogprobs};
use memory_store::MemoryStore;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The configured key.
pub const OPERATOR: &str = "sk-operator-0123456789";

/// No wait of a test is longer.
pub const LONG: Duration = Duration::from_secs(20);

/// What the next generation does.
#[derive(Clone, Debug)]
pub enum Script {
    /// Tokens, one event each, then the finish.
    Say(Vec<u32>, FinishReason),
    /// Tokens in one event, then nothing until cancelled.
    SayThenHang(Vec<u32>),
    /// Tokens, then the stream ends without a finish.
    SayThenVanish(Vec<u32>),
    /// As `Say`, and each token with its log-probability and so many most likely ones.
    SayLikely(Vec<u32>, u32),
    /// Ended by the workers: this field cannot be served.
    Invalid(&'static str, &'static str),
    /// Refused at once.
    Refuse(BackendError),
    /// Never placed: waits in the queue until the client hangs up.
    Queue,
}

/// Byte-level token ids of a text; 257 ends the turn.
pub fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// A turn: the text and its end.
pub fn turn(text: &str) -> Script {
    Script::Say([ids(text), vec![257]].concat(), FinishReason::Stop)
}

#[derive(Default)]
pub struct MockBackend {
    pub scripts: Mutex<VecDeque<Script>>,
    pub jobs: Mutex<Vec<Job>>,
    pub records: Mutex<Vec<UsageRecord>>,
    pub drained: Mutex<Vec<(String, Duration)>>,
    pub cancelled: AtomicUsize,
    pub changed: Notify,
    pub refuse_settle: AtomicBool,
    /// Places in the queue given up.
    pub left: AtomicUsize,
    pub no_worker: AtomicBool,
    /// Of the workers; 256 where it is not set.
    pub context_length: AtomicU32,
    /// The replicated state; none by default, as in a backend without one.
    pub store: std::sync::OnceLock<Arc<MemoryStore>>,
    /// Where files lie.
    pub chunks: Arc<memory_chunks::MemoryChunks>,
}

impl MockBackend {
    pub fn script(&self, script: Script) {
        self.scripts.lock().unwrap().push_back(script);
    }

    pub fn last_job(&self) -> Job {
        self.jobs.lock().unwrap().last().expect("no job was placed").clone()
    }

    pub fn records(&self) -> Vec<UsageRecord> {
        self.records.lock().unwrap().clone()
    }

    /// Waits until `condition` holds; woken by every change.
    pub async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if condition(self) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(LONG, wait)
            .await
            .unwrap_or_else(|_| panic!("in vain: {what}"));
    }
}

/// A place in the queue.
struct Place(Arc<MockBackend>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.left.fetch_add(1, Ordering::SeqCst);
        self.0.changed.notify_waiters();
    }
}

/// Lets the scripted generation know its `Arc`.
pub struct Mock(pub Arc<MockBackend>);

impl Backend for Mock {
    fn models(&self) -> Vec<ModelInfo> {
        let served = !self.0.no_worker.load(Ordering::SeqCst);
        vec![ModelInfo {
            id: "m".into(),
            created_unix_s: 1_700_000_000,
            context_length: match self.0.context_length.load(Ordering::SeqCst) {
                0 => 256,
                length => length,
            },
            served,
        }]
    }

    async fn generate(&self, job: Job) -> Result<Generation, BackendError> {
        let script = self
            .0
            .scripts
            .lock()
            .unwrap()
            .pop_front()
            .unwrap_or_else(|| turn("hello"));
        let prompt_tokens = job.prompt.len() as u32;
        self.0.jobs.lock().unwrap().push(job);
        self.0.changed.notify_waiters();
        let stop = CancellationToken::new();
        let (sender, generation) = {
            let (backend, stop) = (self.0.clone(), stop.clone());
            Generation::channel(move || {
                backend.cancelled.fetch_add(1, Ordering::SeqCst);
                backend.changed.notify_waiters();
                stop.cancel();
            })
        };
        if let Script::Refuse(error) = script {
            std::mem::forget(generation);
            return Err(error);
        }
        if let Script::Queue = script {
            std::mem::forget(generation);
            let _place = Place(self.0.clone());
            return std::future::pending().await;
        }
        sender.placed(
            Placement {
                decode_worker_id: "decode-0".into(),
                prefill_worker_id: "prefill-0".into(),
                attempts: 1,
            },
            1,
        );
        tokio::spawn(async move {
            let finish = |reason: FinishReason, completion: usize| Finish {
                reason: reason.into(),
                prompt_tokens,
                cached_tokens: 16.min(prompt_tokens),
                completion_tokens: completion as u32,
                prefill_worker_id: "prefill-0".into(),
                retryable: true,
                ..Finish::default()
            };
            let (tokens, reason) = match script {
                Script::Say(tokens, reason) => (tokens, Some(reason)),
                Script::SayThenHang(tokens) => {
                    sender.sampled(tokens.len());
                    let _ = sender
                        .send(GenerationEvent {
                            tokens,
                            ..Default::default()
                        })
                        .await;
                    stop.cancelled().await;
                    let finish = Some(finish(FinishReason::Cancelled, 0));
                    let _ = sender
                        .send(GenerationEvent {
                            finish,
                            ..Default::default()
                        })
                        .await;
                    return;
                }
                Script::SayThenVanish(tokens) => (tokens, None),
                Script::SayLikely(tokens, top) => {
                    let likely = |token: &u32| TokenLogprobs {
                        logprob: -0.5,
                        top_ids: (0..top).map(|at| token + at).collect(),
                        top_logprobs: (0..top).map(|at| -0.5 - at as f32).collect(),
                    };
                    sender.sampled(tokens.len());
                    let finish = Some(finish(FinishReason::Stop, tokens.len()));
                    let logprobs = tokens.iter().map(likely).collect();
                    let event = GenerationEvent {
                        tokens,
                        logprobs,
                        finish,
                    };
                    let _ = sender.send(event).await;
                    return;
                }
                Script::Invalid(field, error) => {
                    let finish = Finish {
                        reason: FinishReason::Error.into(),
                        invalid_field: field.into(),
                        error: error.into(),
                        ..Finish::default()
                    };
                    let event = GenerationEvent {
                        finish: Some(finish),
                        ..Default::default()
                    };
                    let _ = sender.send(event).await;
                    return;
                }
                Script::Refuse(_) | Script::Queue => return,
            };
            let count = tokens.len();
            for (at, token) in tokens.into_iter().enumerate() {
                sender.sampled(1);
                let finish = reason.filter(|_| at + 1 == count).map(|reason| finish(reason, count));
                if sender
                    .send(GenerationEvent {
                        tokens: vec![token],
                        finish,
                        ..Default::default()
                    })
                    .await
                    .is_err()
                {
                    return;
                }
                tokio::task::yield_now().await;
            }
        });
        Ok(generation)
    }

    async fn settle(&self, record: UsageRecord) -> Result<(), BackendError> {
        // A commit takes a moment: a final chunk that did not wait for it would be seen to.
        tokio::time::sleep(Duration::from_millis(20)).await;
        if self.0.refuse_settle.load(Ordering::SeqCst) {
            return Err(BackendError::Unavailable {
                reason: "no leader".into(),
            });
        }
        if let Some(store) = self.0.store.get() {
            let record = Some(record.clone());
            let command = baton_gateway::command("", Kind::SettleUsage(SettleUsage { record }));
            let settled = store.propose(command).await;
            settled.map_err(|error| BackendError::Unavailable {
                reason: error.to_string(),
            })?;
        }
        self.0.records.lock().unwrap().push(record);
        self.0.changed.notify_waiters();
        Ok(())
    }

    fn revision(&self, _: &str) -> Option<String> {
        Some("r1".into())
    }

    fn accounts(&self) -> Option<Arc<dyn AccountStore>> {
        let store = self.0.store.get()?;
        Some(store.clone())
    }

    fn chunks(&self) -> Option<Arc<dyn baton_gateway::ChunkStore>> {
        Some(self.0.chunks.clone())
    }

    fn drain(&self, worker_id: &str, deadline: Duration) -> Result<WorkerStatus, BackendError> {
        let worker = self
            .snapshot()
            .workers
            .into_iter()
            .find(|worker| worker.id == worker_id);
        let worker = worker.ok_or_else(|| BackendError::UnknownWorker {
            worker_id: worker_id.into(),
        })?;
        self.0.drained.lock().unwrap().push((worker_id.into(), deadline));
        Ok(WorkerStatus {
            state: WorkerState::Draining,
            ..worker
        })
    }

    fn snapshot(&self) -> ClusterSnapshot {
        ClusterSnapshot {
            workers: vec![
                worker("decode-0", WorkerRole::Decode),
                worker("prefill-0", WorkerRole::Prefill),
            ],
        }
    }
}

fn worker(id: &str, role: WorkerRole) -> WorkerStatus {
    WorkerStatus {
        id: id.into(),
        epoch: 1,
        role,
        state: WorkerState::Ready,
        pid: 7,
        model: "m".into(),
        device: "cpu".into(),
        addr: "127.0.0.1:1".into(),
        transfer_addr: "127.0.0.1:2".into(),
        context_length: 256,
        block_size: 16,
        kv_bytes_per_block: 1024,
        total_blocks: 100,
        free_blocks: 75,
        held_blocks: 25,
        cached_blocks: 0,
        running: 2,
        waiting: 1,
        transferring: 0,
        prompt_tokens_total: 0,
        cached_tokens_total: 0,
        generation_tokens_total: 0,
        preemptions_total: 0,
        transferred_bytes_total: 0,
        push_overlap: 0.0,
        heartbeat_age_ms: 12,
        kv_tiers: Default::default(),
    }
}

/// A gateway that serves the model `m` over a scripted cluster.
pub struct TestGateway {
    pub addr: SocketAddr,
    pub backend: Arc<MockBackend>,
    pub shutdown: CancellationToken,
    pub task: tokio::task::JoinHandle<()>,
}

impl TestGateway {
    pub async fn start() -> Self {
        Self::with(GatewayConfig::default()).await
    }

    pub async fn with(config: GatewayConfig) -> Self {
        Self::over(config, Arc::default()).await
    }

    /// With the replicated state in memory, and a key that may do everything.
    pub async fn with_accounts() -> (Self, Arc<MemoryStore>) {
        let backend = Arc::new(MockBackend::default());
        let store = Arc::new(MemoryStore::default());
        assert!(backend.store.set(store.clone()).is_ok());
        let config = GatewayConfig {
            api_key: Some(OPERATOR.into()),
            ..GatewayConfig::default()
        };
        (Self::over(config, backend).await, store)
    }

    pub async fn over(config: GatewayConfig, backend: Arc<MockBackend>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        model_files::write_model(dir.path());
        let models = vec![ServedModel::load("m", dir.path()).unwrap()];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let served = baton_gateway::serve(
            listener,
            config,
            Arc::new(Mock(backend.clone())),
            models,
            shutdown.clone(),
        );
        let task = tokio::spawn(async move { served.await.unwrap() });
        Self {
            addr,
            backend,
            shutdown,
            task,
        }
    }

    pub async fn connect(&self) -> Wire {
        Wire {
            stream: TcpStream::connect(self.addr).await.unwrap(),
            buffer: Vec::new(),
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.request("GET", path, &[], b"").await
    }

    /// Posts JSON to a route.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        let headers = [("content-type", "application/json")];
        self.request("POST", path, &headers, body.to_string().as_bytes()).await
    }

    /// Posts JSON to the chat route.
    pub async fn chat(&self, body: &Value) -> Answer {
        self.chat_bytes(body.to_string().as_bytes()).await
    }

    pub async fn chat_bytes(&self, body: &[u8]) -> Answer {
        self.request("POST", CHAT, &[("content-type", "application/json")], body)
            .await
    }

    pub async fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut wire = self.connect().await;
        wire.send(method, path, headers, body).await;
        wire.answer().await
    }

    /// Asks as the holder of a key, with more headers.
    pub async fn ask(&self, key: &str, method: &str, path: &str, more: &[(&str, &str)], body: &Value) -> Answer {
        let bearer = format!("Bearer {key}");
        let mut headers = vec![("authorization", bearer.as_str()), ("content-type", "application/json")];
        headers.extend(more);
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.request(method, path, &headers, body.as_bytes()).await
    }

    /// Administers, and expects it to work.
    pub async fn admin(&self, method: &str, path: &str, body: Value) -> Value {
        let answer = self.ask(OPERATOR, method, path, &[], &body).await;
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text());
        answer.json()
    }

    /// A project and a key of it: its id, the key's id, its secret.
    pub async fn project_key(&self, limits: Value, key: Value) -> (String, String, String) {
        let project = self
            .admin(
                "POST",
                "/v1/organization/projects",
                json!({"name": "p", "limits": limits}),
            )
            .await;
        let id = project["id"].as_str().unwrap().to_owned();
        let mut body = json!({"name": "k"});
        body.as_object_mut().unwrap().extend(key.as_object().unwrap().clone());
        let path = format!("/v1/organization/projects/{id}/api_keys");
        let key = self.admin("POST", &path, body).await;
        let text = |name: &str| key[name].as_str().unwrap().to_owned();
        (id, text("id"), text("value"))
    }

    /// A usual request with a key still works.
    pub async fn is_well_as(&self, key: &str) {
        let answer = self.ask(key, "POST", CHAT, &[], &hi(json!({}))).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }

    /// A usual request still works.
    pub async fn is_well(&self) {
        let answer = self.chat(&hi(json!({}))).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
}

pub const CHAT: &str = "/v1/chat/completions";

/// A small chat request with more fields.
pub fn hi(extra: Value) -> Value {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// One HTTP/1.1 connection.
pub struct Wire {
    pub stream: TcpStream,
    buffer: Vec<u8>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Wire {
    pub async fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) {
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {}\r\n",
            body.len()
        );
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "\r\n";
        self.stream.write_all(head.as_bytes()).await.unwrap();
        // A server that has heard enough may have hung up.
        let _ = self.stream.write_all(body).await;
    }

    pub async fn post(&mut self, body: &Value) {
        self.send(
            "POST",
            CHAT,
            &[("content-type", "application/json")],
            body.to_string().as_bytes(),
        )
        .await;
    }

    /// Reads on until the raw bytes hold `text`.
    pub async fn read_until(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.buffer).contains(text) {
            assert!(
                self.fill().await > 0,
                "closed before {text:?}: {}",
                String::from_utf8_lossy(&self.buffer)
            );
        }
    }

    /// What was read and not taken.
    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&self.buffer).into_owned()
    }

    /// Throws away what was read.
    pub fn forget(&mut self) {
        self.buffer.clear();
    }

    /// Reads one answer, unless the connection ends before the whole of it is there.
    pub async fn try_answer(&mut self) -> Option<Answer> {
        let whole = |buffer: &[u8]| {
            let end = find(buffer, b"\r\n\r\n")? + 4;
            let head = std::str::from_utf8(&buffer[..end]).ok()?.to_ascii_lowercase();
            let length = head
                .split("content-length: ")
                .nth(1)
                .and_then(|rest| rest.lines().next());
            let length = length.and_then(|length| length.parse().ok()).unwrap_or(0);
            (buffer.len() - end >= length).then_some(())
        };
        while whole(&self.buffer).is_none() {
            if self.fill().await == 0 {
                return None;
            }
        }
        Some(self.answer().await)
    }

    /// Reads one answer, by its length or its chunks.
    pub async fn answer(&mut self) -> Answer {
        self.read_until("\r\n\r\n").await;
        let end = find(&self.buffer, b"\r\n\r\n").unwrap() + 4;
        let head = String::from_utf8(self.buffer.drain(..end).collect()).unwrap();
        let mut lines = head.trim_end().split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: Vec<(String, String)> = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .collect();
        let mut answer = Answer {
            status,
            headers,
            body: Vec::new(),
        };
        if matches!(status, 100 | 204) {
            return answer;
        }
        if let Some(length) = answer.header("content-length") {
            let length: usize = length.parse().unwrap();
            while self.buffer.len() < length {
                assert!(self.fill().await > 0, "closed within a body");
            }
            answer.body = self.buffer.drain(..length).collect();
        } else {
            loop {
                while find(&self.buffer, b"\r\n").is_none() {
                    assert!(self.fill().await > 0, "closed within chunks");
                }
                let at = find(&self.buffer, b"\r\n").unwrap();
                let size = String::from_utf8(self.buffer[..at].to_vec()).unwrap();
                let size = usize::from_str_radix(&size, 16).unwrap();
                while self.buffer.len() < at + 4 + size {
                    assert!(self.fill().await > 0, "closed within a chunk");
                }
                answer.body.extend_from_slice(&self.buffer[at + 2..at + 2 + size]);
                self.buffer.drain(..at + 4 + size);
                if size == 0 {
                    break;
                }
            }
        }
        answer
    }

    /// Reads more; 0 at the end.
    pub async fn fill(&mut self) -> usize {
        let read = self.stream.read_buf(&mut self.buffer);
        tokio::time::timeout(LONG, read)
            .await
            .expect("the server says nothing")
            .unwrap_or(0)
    }
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The `data` of the events; comments left out.
    pub fn events(&self) -> Vec<String> {
        let text = self.text();
        let events = text
            .split("\n\n")
            .filter(|event| !event.is_empty() && !event.starts_with(':'));
        events
            .map(|event| event.strip_prefix("data: ").expect(event).to_owned())
            .collect()
    }

    /// The error, after checking OpenAI's shape.
    pub fn error(&self) -> Value {
        let json = self.json();
        let error = json["error"]
            .as_object()
            .unwrap_or_else(|| panic!("no error in {json}"));
        assert_eq!(json.as_object().unwrap().len(), 1);
        let mut keys: Vec<&str> = error.keys().map(String::as_str).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["code", "message", "param", "type"], "{json}");
        assert!(
            error["message"].as_str().is_some_and(|message| message.len() > 10),
            "{json}"
        );
        json["error"].clone()
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
