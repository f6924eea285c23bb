//! The plainest HTTP client there is: one connection per request, any bytes as body, answers as they are.

use baton_loadtest::SseParser;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{HeaderMap, Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::time::Duration;

/// Longest wait for anything a test asks. Debug builds on busy machines are slow; a hang is still caught.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&self.body)))
    }
}

async fn send(method: Method, url: &str, path: &str, body: Bytes) -> hyper::Response<Incoming> {
    send_with(method, url, path, &[], body).await
}

async fn send_with(
    method: Method,
    url: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> hyper::Response<Incoming> {
    let address = url.strip_prefix("http://").expect("an http URL");
    let stream = tokio::net::TcpStream::connect(address)
        .await
        .expect("the server listens");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .expect("HTTP");
    tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path).header("host", address);
    if headers.iter().all(|(name, _)| *name != "content-type") {
        request = request.header("content-type", "application/json");
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(body)).expect("a request");
    tokio::time::timeout(LIMIT, sender.send_request(request))
        .await
        .expect("an answer in time")
        .expect("an answer")
}

async fn whole(response: hyper::Response<Incoming>) -> Answer {
    let (status, headers) = (response.status(), response.headers().clone());
    let body = tokio::time::timeout(LIMIT, response.into_body().collect()).await;
    Answer {
        status,
        headers,
        body: body.expect("a body in time").expect("a whole body").to_bytes(),
    }
}

/// Any request, with more headers.
pub async fn request_with(
    method: Method,
    url: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Answer {
    whole(send_with(method, url, path, headers, body.into()).await).await
}

/// GET.
pub async fn get(url: &str, path: &str) -> Answer {
    whole(send(Method::GET, url, path, Bytes::new()).await).await
}

/// POST of any bytes.
pub async fn post(url: &str, path: &str, body: impl Into<Bytes>) -> Answer {
    whole(send(Method::POST, url, path, body.into()).await).await
}

/// A chat request with one user message; `extra` adds or replaces fields.
pub fn chat_body(prompt: &str, extra: Value) -> Value {
    let mut body = json!({
        "model": "baton-demo",
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 16,
    });
    if let (Value::Object(body), Value::Object(extra)) = (&mut body, extra) {
        body.extend(extra);
    }
    body
}

/// What a chat request ended with.
#[derive(Debug, Clone, PartialEq)]
pub struct Chat {
    pub text: String,
    pub finish_reason: String,
    pub usage: Value,
}

impl Chat {
    /// Takes in a chunk of a streamed answer.
    pub fn take(&mut self, chunk: &Value) {
        assert!(chunk.get("error").is_none(), "{chunk}");
        if let Some(choice) = chunk["choices"].get(0) {
            self.text += choice["delta"]["content"].as_str().unwrap_or_default();
            if let Some(reason) = choice["finish_reason"].as_str() {
                assert_eq!(self.finish_reason, "", "one finish reason: {chunk}");
                self.finish_reason = reason.to_owned();
            }
        }
        if !chunk["usage"].is_null() {
            assert!(self.usage.is_null(), "one usage: {chunk}");
            self.usage = chunk["usage"].clone();
        }
    }

    pub fn count(&self, field: &str) -> u64 {
        self.usage[field]
            .as_u64()
            .unwrap_or_else(|| panic!("usage has {field}: {}", self.usage))
    }
}

/// A chat request, answered whole.
pub async fn chat(url: &str, body: &Value) -> Chat {
    let answer = post(url, "/v1/chat/completions", body.to_string()).await;
    let json = answer.json();
    assert_eq!(answer.status, StatusCode::OK, "{json}");
    let choice = &json["choices"][0];
    Chat {
        text: choice["message"]["content"].as_str().unwrap_or_default().to_owned(),
        finish_reason: choice["finish_reason"].as_str().unwrap_or_default().to_owned(),
        usage: json["usage"].clone(),
    }
}

/// A chat request being streamed. Dropping it hangs up.
pub struct ChatStream {
    body: Incoming,
    parser: SseParser,
    pending: std::collections::VecDeque<Value>,
    done: bool,
}

impl ChatStream {
    /// Starts `body`, made streaming with usage.
    pub async fn start(url: &str, body: &Value) -> Self {
        let mut body = body.clone();
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let response = send(Method::POST, url, "/v1/chat/completions", body.to_string().into()).await;
        if response.status() != StatusCode::OK {
            panic!("{:?}", whole(response).await);
        }
        Self {
            body: response.into_body(),
            parser: SseParser::default(),
            pending: Default::default(),
            done: false,
        }
    }

    /// The next chunk; `None` after `[DONE]`.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(chunk) = self.pending.pop_front() {
                return Some(chunk);
            }
            if self.done {
                return None;
            }
            let frame = tokio::time::timeout(LIMIT, self.body.frame())
                .await
                .expect("a chunk in time");
            let frame = frame
                .expect("the stream ends with [DONE]")
                .expect("the stream is not cut");
            let (pending, done) = (&mut self.pending, &mut self.done);
            self.parser
                .push(frame.data_ref().map_or(&[], |data| data), |event| match event {
                    b"[DONE]" => *done = true,
                    event => pending.push_back(serde_json::from_slice(event).expect("a chunk is JSON")),
                })
                .expect("chunks are small");
        }
    }

    /// Reads to the end.
    pub async fn finish(self) -> Chat {
        self.finish_from(&[]).await
    }

    /// Reads to the end, after the chunks of the beginning.
    pub async fn finish_from(mut self, beginning: &[Value]) -> Chat {
        let mut chat = Chat {
            text: String::new(),
            finish_reason: String::new(),
            usage: Value::Null,
        };
        beginning.iter().for_each(|chunk| chat.take(chunk));
        while let Some(chunk) = self.next().await {
            chat.take(&chunk);
        }
        chat
    }
}
