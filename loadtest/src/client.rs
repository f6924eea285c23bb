//! A streaming chat client over HTTP/1.1 with one connection per request in flight. Measures when things arrive; adds
//! no retries (a failed request is a result), except on a kept-alive connection that the server had already closed.

use crate::sse::SseParser;
use crate::target::Target;
use crate::tls::Trust;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

/// Time to open a TCP connection. A server that is there answers in milliseconds; a full accept queue shows as this.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of an error answer that are read for its message.
const ERROR_BODY_BYTES_MAX: usize = 16 << 10;
/// Bytes of a non-streaming answer: the model list, a page of the ledger.
const PLAIN_BODY_BYTES_MAX: usize = 16 << 20;
/// Chunks of one answer. Above any context length in use, so only a server in a loop gets there.
const CHUNKS_MAX: usize = 4 << 20;

/// What one answered request took and brought.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Completion {
    /// From the intended send time to the first content.
    pub first: Duration,
    /// From the intended send time to the end of the stream.
    pub total: Duration,
    /// Time between one chunk with content and the next.
    pub gaps: Vec<Duration>,
    /// Chunks with content.
    pub chunks: u64,
    /// Token counts, where the server gave them.
    pub usage: Option<Usage>,
    /// The text, for callers that look at it.
    pub text: String,
}

/// Token counts of one answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt, template included.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    #[serde(default)]
    pub completion_tokens: u64,
    /// Where the prompt's tokens came from.
    #[serde(default)]
    pub prompt_tokens_details: Option<PromptDetails>,
}

/// Details of the prompt's tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
pub struct PromptDetails {
    /// Tokens whose KV was already there.
    #[serde(default)]
    pub cached_tokens: u64,
}

/// Kinds of failure, as reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailureKind {
    /// No connection.
    Connect,
    /// An HTTP status other than 200.
    Status(u16),
    /// Not finished within the request timeout.
    Timeout,
    /// The connection broke, or the stream ended before its end.
    Cut,
    /// An error inside the stream.
    Stream,
    /// The answer is not what an OpenAI server sends.
    Malformed,
}

impl std::fmt::Display for FailureKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connect => f.write_str("connect"),
            Self::Status(code) => write!(f, "http_{code}"),
            Self::Timeout => f.write_str("timeout"),
            Self::Cut => f.write_str("cut"),
            Self::Stream => f.write_str("stream_error"),
            Self::Malformed => f.write_str("malformed"),
        }
    }
}

/// A failed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// For counting.
    pub kind: FailureKind,
    /// For reading.
    pub message: String,
}

impl Failure {
    fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { kind, message }
    }
}

type Connection = SendRequest<Full<Bytes>>;

/// Connections to one target.
#[derive(Debug)]
pub struct Client {
    target: Target,
    api_key: Option<String>,
    request_timeout: Duration,
    trust: Trust,
    /// Kept-alive connections not in use; never more than were in flight at once.
    idle: Mutex<Vec<Connection>>,
}

impl Client {
    /// A client without connections yet.
    pub fn new(target: Target, api_key: Option<String>, request_timeout: Duration) -> Self {
        Self {
            target,
            api_key,
            request_timeout,
            trust: Trust::default(),
            idle: Mutex::default(),
        }
    }

    /// Believes this instead of the system's roots.
    pub fn trusting(self, trust: Trust) -> Self {
        Self { trust, ..self }
    }

    /// Sends one streaming chat request. Times count from `intended`, which may lie in the past.
    pub async fn chat(&self, body: Bytes, intended: Instant) -> Result<Completion, Failure> {
        let deadline = Instant::now() + self.request_timeout;
        match timeout_at(deadline, self.chat_untimed(body, intended)).await {
            Ok(result) => result,
            Err(_) => {
                let message = format!("not finished after {} s", self.request_timeout.as_secs_f64());
                Err(Failure::new(FailureKind::Timeout, message))
            }
        }
    }

    /// The id of the server's first model.
    pub async fn first_model(&self) -> Result<String, Failure> {
        #[derive(Deserialize)]
        struct List {
            data: Vec<Entry>,
        }
        #[derive(Deserialize)]
        struct Entry {
            id: String,
        }
        let body = self.get("/v1/models").await?;
        let list: List = serde_json::from_slice(&body)
            .map_err(|_| Failure::new(FailureKind::Malformed, "the answer is not a list of models"))?;
        let first = list.data.into_iter().next();
        first
            .map(|entry| entry.id)
            .ok_or_else(|| Failure::new(FailureKind::Malformed, "it serves no model"))
    }

    /// Fetches a small resource, such as `/v1/models` or `/cluster/workers`.
    pub async fn get(&self, path: &str) -> Result<Bytes, Failure> {
        let exchange = async {
            let (response, _) = self.send(Method::GET, path, Bytes::new()).await?;
            let (status, body) = read_all(response, PLAIN_BODY_BYTES_MAX).await;
            match status {
                StatusCode::OK => Ok(body),
                _ => Err(status_failure(status, &body)),
            }
        };
        match timeout(self.request_timeout, exchange).await {
            Ok(result) => result,
            Err(_) => Err(Failure::new(FailureKind::Timeout, "no answer in time")),
        }
    }

    /// Deletes something, and returns the answer's body.
    ///
    /// # Errors
    /// Any status that is not a success, with the server's message.
    pub async fn delete(&self, path: &str) -> Result<Bytes, Failure> {
        self.change(Method::DELETE, path, Bytes::new()).await
    }

    /// Fetches a resource of any length into `to`; the request's time limit is that of each piece. Returns its length.
    pub async fn download(&self, path: &str, to: &mut impl std::io::Write) -> Result<u64, Failure> {
        let late = |_| Failure::new(FailureKind::Timeout, "no answer in time");
        let sent = timeout(self.request_timeout, self.send(Method::GET, path, Bytes::new())).await;
        let (response, _connection) = sent.map_err(late)??;
        if response.status() != StatusCode::OK {
            let (status, body) = read_all(response, ERROR_BODY_BYTES_MAX).await;
            return Err(status_failure(status, &body));
        }
        let mut body = response.into_body();
        let mut bytes = 0;
        while let Some(frame) = timeout(self.request_timeout, body.frame()).await.map_err(late)? {
            let frame = frame.map_err(|e| Failure::new(FailureKind::Cut, format!("the stream broke: {e}")))?;
            if let Some(data) = frame.data_ref() {
                to.write_all(data)
                    .map_err(|e| Failure::new(FailureKind::Cut, format!("it cannot be written: {e}")))?;
                bytes += data.len() as u64;
            }
        }
        Ok(bytes)
    }

    /// Posts a small JSON body and reads the small answer, whose status must be one of success.
    pub async fn post(&self, path: &str, body: impl Into<Bytes>) -> Result<Bytes, Failure> {
        self.change(Method::POST, path, body.into()).await
    }

    async fn change(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, Failure> {
        let exchange = async {
            let (response, _) = self.send(method, path, body).await?;
            let (status, body) = read_all(response, PLAIN_BODY_BYTES_MAX).await;
            match status.is_success() {
                true => Ok(body),
                false => Err(status_failure(status, &body)),
            }
        };
        match timeout(self.request_timeout, exchange).await {
            Ok(result) => result,
            Err(_) => Err(Failure::new(FailureKind::Timeout, "no answer in time")),
        }
    }

    async fn chat_untimed(&self, body: Bytes, intended: Instant) -> Result<Completion, Failure> {
        let (response, connection) = self.send(Method::POST, "/v1/chat/completions", body).await?;
        if response.status() != StatusCode::OK {
            let (status, body) = read_all(response, ERROR_BODY_BYTES_MAX).await;
            return Err(status_failure(status, &body));
        }
        let mut body = response.into_body();
        let (mut parser, mut reading) = (SseParser::default(), Reading::new(intended));
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| Failure::new(FailureKind::Cut, format!("the stream broke: {e}")))?;
            if let Some(data) = frame.data_ref() {
                let now = Instant::now();
                parser
                    .push(data, |event| reading.event(event, now))
                    .map_err(|e| Failure::new(FailureKind::Malformed, e.to_string()))?;
                if reading.failure.is_some() {
                    break;
                }
            }
        }
        let completion = reading.finish()?;
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(connection);
        Ok(completion)
    }

    /// Sends on an idle connection if there is one. If the server closed it meanwhile, on a new one.
    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<(Response<Incoming>, Connection), Failure> {
        while let Some(mut connection) = self.take_idle() {
            if connection.ready().await.is_err() {
                continue;
            }
            match connection.send_request(self.request(&method, path, &body)?).await {
                Ok(response) => return Ok((response, connection)),
                Err(error) if error.is_canceled() || error.is_incomplete_message() || error.is_closed() => {}
                Err(error) => return Err(Failure::new(FailureKind::Cut, error.to_string())),
            }
        }
        let mut connection = self.connect().await?;
        match connection.send_request(self.request(&method, path, &body)?).await {
            Ok(response) => Ok((response, connection)),
            Err(error) => Err(Failure::new(FailureKind::Cut, format!("no answer: {error}"))),
        }
    }

    fn take_idle(&self) -> Option<Connection> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let target = (self.target.host.as_str(), self.target.port);
        let refused = |reason: String| {
            Failure::new(
                FailureKind::Connect,
                format!("cannot connect to {}: {reason}", self.target.authority),
            )
        };
        let stream = match timeout(CONNECT_TIMEOUT, TcpStream::connect(target)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(refused(error.to_string())),
            Err(_) => return Err(refused(format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()))),
        };
        // Small packets must leave at once, or the kernel's delay would be measured.
        stream.set_nodelay(true).map_err(|e| refused(e.to_string()))?;
        if !self.target.tls {
            return drive(stream).await.map_err(refused);
        }
        let name = rustls::pki_types::ServerName::try_from(self.target.host.clone());
        let name = name.map_err(|_| refused("its name cannot be in a certificate".into()))?;
        let shaken = self.trust.connector().map_err(refused)?.connect(name, stream);
        match timeout(CONNECT_TIMEOUT, shaken).await {
            Ok(Ok(stream)) => drive(stream).await.map_err(refused),
            Ok(Err(error)) => Err(refused(error.to_string())),
            Err(_) => Err(refused("no TLS handshake in time".into())),
        }
    }

    fn request(&self, method: &Method, path: &str, body: &Bytes) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.target.prefix))
            .header(header::HOST, &self.target.authority)
            .header(header::USER_AGENT, concat!("baton-bench/", env!("CARGO_PKG_VERSION")));
        if method == Method::POST {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(key) = &self.api_key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        request
            .body(Full::new(body.clone()))
            .map_err(|e| Failure::new(FailureKind::Malformed, format!("the request cannot be sent: {e}")))
    }
}

/// Speaks HTTP over a stream until the server closes it or the sender is dropped.
async fn drive(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Result<Connection, String> {
    let (sender, driver) = handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    tokio::spawn(driver);
    Ok(sender)
}

fn status_failure(status: StatusCode, body: &[u8]) -> Failure {
    #[derive(Deserialize)]
    struct Envelope {
        error: ErrorBody,
    }
    let message = match serde_json::from_slice::<Envelope>(body) {
        Ok(envelope) => envelope.error.message,
        Err(_) => String::from_utf8_lossy(body).chars().take(200).collect(),
    };
    Failure::new(FailureKind::Status(status.as_u16()), message)
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    message: String,
}

/// Reads a small body; what is past `limit` is left unread.
async fn read_all(response: Response<Incoming>, limit: usize) -> (StatusCode, Bytes) {
    let status = response.status();
    let (mut body, mut bytes) = (response.into_body(), Vec::new());
    while let Some(Ok(frame)) = body.frame().await {
        if let Some(data) = frame.data_ref() {
            bytes.extend_from_slice(&data[..data.len().min(limit - bytes.len())]);
        }
        if bytes.len() == limit {
            break;
        }
    }
    (status, bytes.into())
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<ErrorBody>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    delta: Delta,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize, Default)]
struct Delta {
    #[serde(default)]
    content: Option<String>,
    /// Two spellings are in use for the thinking part; both are tokens.
    #[serde(default, alias = "reasoning")]
    reasoning_content: Option<String>,
    #[serde(default)]
    tool_calls: Option<serde_json::Value>,
}

/// The state of reading one answer.
struct Reading {
    intended: Instant,
    last: Option<Instant>,
    end: Instant,
    done: bool,
    finished: bool,
    completion: Completion,
    failure: Option<Failure>,
}

impl Reading {
    fn new(intended: Instant) -> Self {
        Self {
            intended,
            last: None,
            end: intended,
            done: false,
            finished: false,
            completion: Completion::default(),
            failure: None,
        }
    }

    fn event(&mut self, event: &[u8], now: Instant) {
        if self.done || self.failure.is_some() {
            return;
        }
        self.end = now;
        if event.trim_ascii() == b"[DONE]" {
            self.done = true;
            return;
        }
        let chunk: Chunk = match serde_json::from_slice(event) {
            Ok(chunk) => chunk,
            Err(error) => {
                self.failure = Some(Failure::new(
                    FailureKind::Malformed,
                    format!("an event is not a chunk: {error}"),
                ));
                return;
            }
        };
        if let Some(error) = chunk.error {
            self.failure = Some(Failure::new(FailureKind::Stream, error.message));
            return;
        }
        if chunk.usage.is_some() {
            self.completion.usage = chunk.usage;
        }
        for choice in chunk.choices {
            let text = choice.delta.content.unwrap_or_default();
            let thought = choice.delta.reasoning_content.unwrap_or_default();
            let called = choice.delta.tool_calls.is_some_and(|calls| !calls.is_null());
            if !text.is_empty() || !thought.is_empty() || called {
                self.content(now);
                self.completion.text.push_str(&text);
            }
            self.finished |= choice.finish_reason.is_some();
        }
    }

    fn content(&mut self, now: Instant) {
        match self.last.replace(now) {
            None => self.completion.first = now.saturating_duration_since(self.intended),
            Some(last) => self.completion.gaps.push(now.saturating_duration_since(last)),
        }
        self.completion.chunks += 1;
        if self.completion.gaps.len() > CHUNKS_MAX {
            self.failure = Some(Failure::new(FailureKind::Malformed, "the answer does not end"));
        }
    }

    fn finish(mut self) -> Result<Completion, Failure> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        if !self.done && !self.finished {
            return Err(Failure::new(
                FailureKind::Cut,
                "the stream ended without a finish reason or [DONE]",
            ));
        }
        self.completion.total = self.end.saturating_duration_since(self.intended);
        if self.last.is_none() {
            // The model said nothing (its first token was end-of-sequence): the end is the first thing seen.
            self.completion.first = self.completion.total;
        }
        Ok(self.completion)
    }
}
