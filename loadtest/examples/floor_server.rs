//! The least that answers `baton bench`: reads a request, parses nothing of its body, and sends a canned stream of one token at
//! once. What `baton bench` measures of it is the client, the loopback and the kernel; what it measures of a front end beyond
//! that is the front end's. Not a server for anything else: HTTP is recognised only as far as that client speaks it.
//!
//!     cargo run --release -p baton-loadtest --example floor_server -- 18400

use std::error::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Longest request taken, in bytes: longer than any that a latency measurement sends.
const REQUEST_BYTES_MAX: usize = 8 << 20;

const MODELS: &str = r#"{"object":"list","data":[{"id":"floor","object":"model"}]}"#;
/// In the shape and about the length of what a gateway sends.
const EVENTS: [&str; 4] = [
    r#"{"id":"chatcmpl-0000000000000000","object":"chat.completion.chunk","created":1,"model":"floor","choices":[{"index":0,"delta":{"role":"assistant","content":" word"},"finish_reason":null}],"usage":null}"#,
    r#"{"id":"chatcmpl-0000000000000000","object":"chat.completion.chunk","created":1,"model":"floor","choices":[{"index":0,"delta":{},"finish_reason":"length"}],"usage":null}"#,
    r#"{"id":"chatcmpl-0000000000000000","object":"chat.completion.chunk","created":1,"model":"floor","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#,
    "[DONE]",
];

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let port = std::env::args().nth(1).map_or(Ok(0), |text| text.parse())?;
    let listener = TcpListener::bind(("127.0.0.1", port)).await?;
    println!("http://{}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        // A client that goes away ends its own connection only.
        tokio::spawn(async move {
            let _ = serve(stream).await;
        });
    }
}

async fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut events = String::new();
    for event in EVENTS {
        let event = format!("data: {event}\n\n");
        events += &format!("{:x}\r\n{event}\r\n", event.len());
    }
    let stream_answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n{events}0\r\n\r\n"
    );
    let models = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{MODELS}", MODELS.len());
    let mut buffer = Vec::with_capacity(64 << 10);
    loop {
        let Some(end) = request_end(&buffer) else {
            if buffer.len() > REQUEST_BYTES_MAX || stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            continue;
        };
        let answer = if buffer.starts_with(b"GET") {
            &models
        } else {
            &stream_answer
        };
        buffer.drain(..end);
        stream.write_all(answer.as_bytes()).await?;
    }
}

/// Where the first request in `buffer` ends, once all of it is there.
fn request_end(buffer: &[u8]) -> Option<usize> {
    let head = buffer.windows(4).position(|bytes| bytes == b"\r\n\r\n")? + 4;
    let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
    let length: usize = length.map_or(Some(0), |text| text.trim().parse().ok())?;
    let end = head.checked_add(length)?;
    (buffer.len() >= end).then_some(end)
}
