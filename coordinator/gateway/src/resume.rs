//! Streams that outlive their connection: a client that asked for it (`x-stream-resume: true`) and lost the connection
//! fetches the rest with `GET /v1/streams/{id}` and `Last-Event-ID`, without a gap or a repeat.
//!
//! ```text
//!            answer begins                    reader gone                     within the grace time
//!   opened ───────────────▶ attached(reader 1) ─────────▶ detached ────────────────────────▶ attached(reader 2)
//!                                │ body ends                  │ grace over
//!                                ▼                            ▼
//!                              ended ── grace over ──▶ forgotten (what still runs is cancelled and settled)
//! ```
//!
//! A layer around answers, whatever route they are of: it numbers their events (`id: <stream>:<n>`, from 1) and keeps the last
//! ones. Invariants: at most one reader; the source is polled only by the reader, so while nobody reads nothing is taken from
//! it, and what is billed is what was handed out, as without this; event `n` is the same bytes for every reader; a reader gets
//! `n+1` after `n`, or a 410 before it gets anything.
//!
//! Not here: a coordinator that died. Its streams are gone; see `docs/hardening.md` for what a client does then.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use hyper::body::Frame;
use tokio::sync::OnceCell;

use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::gateway::Gateway;

/// The request's header that asks for it.
pub const STREAM_RESUME_HEADER: &str = "x-stream-resume";
/// The answer's header with the stream's id; there only if it can be resumed.
pub const STREAM_ID_HEADER: &str = "x-stream-id";
const LAST_EVENT_ID: &str = "last-event-id";

/// Streams kept at once: as many as there may be requests in work by default. One more is not resumable.
const STREAMS_MAX: usize = 1024;
/// Bytes of events kept per stream: some thousand tokens, which is more than any socket's buffers hold unread.
const KEPT_BYTES_MAX: usize = 128 << 10;
/// Bytes of one event; a larger one ends the stream.
const EVENT_BYTES_MAX: usize = 4 << 20;
/// Characters of a stream's id.
const ID_CHARS_MAX: usize = 128;

/// The streams of this gateway that can be resumed.
pub(crate) struct Streams {
    grace: Duration,
    kept: Mutex<Registry>,
    /// This member's id in its group; 0 where there is none.
    member: OnceCell<u64>,
}

#[derive(Default)]
struct Registry {
    closed: bool,
    streams: HashMap<String, Arc<Stream>>,
}

impl Streams {
    pub fn new(grace: Duration) -> Arc<Self> {
        Arc::new(Self {
            grace,
            kept: Mutex::default(),
            member: OnceCell::new(),
        })
    }

    /// Nothing can be resumed any more; streams without a reader end now.
    pub fn close(&self) {
        let streams = {
            let mut kept = self.registry();
            kept.closed = true;
            std::mem::take(&mut kept.streams)
        };
        drop(streams);
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn member<B: Backend>(&self, backend: &B) -> u64 {
        let ask = async || backend.coordinators().await.map_or(0, |group| group.answered_by);
        *self.member.get_or_init(ask).await
    }

    /// Makes an answer resumable, if it is a stream and there is room.
    pub async fn keep<B: Backend>(
        self: &Arc<Self>,
        response: Response,
        request_id: &str,
        caller: &Caller,
        backend: &B,
    ) -> Response {
        let kind = response.headers().get(header::CONTENT_TYPE);
        let streams = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        if response.status() != StatusCode::OK || !streams {
            return response;
        }
        let id = format!("{}.{request_id}", self.member(backend).await);
        let Ok(shown) = HeaderValue::from_str(&id) else {
            return response;
        };
        let (mut parts, body) = response.into_parts();
        let stream = Arc::new(Stream {
            id: id.clone(),
            owner: owner(caller),
            state: Mutex::new(Track::new(body)),
        });
        {
            let mut kept = self.registry();
            if !kept.closed && kept.streams.len() < STREAMS_MAX {
                kept.streams.insert(id, stream.clone());
                parts.headers.insert(STREAM_ID_HEADER, shown);
            }
        }
        Response::from_parts(parts, Body::new(self.attach(stream, 1)))
    }

    /// A reader that goes on with event `next`; whoever read before is cut off.
    fn attach(self: &Arc<Self>, stream: Arc<Stream>, next: u64) -> Reader {
        let mut state = stream.state();
        state.reader += 1;
        let number = state.reader;
        if let Some(before) = state.waker.take() {
            before.wake();
        }
        drop(state);
        Reader {
            streams: self.clone(),
            stream,
            number,
            next,
        }
    }

    /// Forgets a stream that nobody came back for.
    fn forget(&self, stream: &Stream, reader: u64) {
        let gone = {
            let mut kept = self.registry();
            match kept.streams.get(&stream.id) {
                Some(found) if found.state().reader == reader => kept.streams.remove(&stream.id),
                _ => None,
            }
        };
        // Its source goes with it, which cancels and settles: outside of the lock.
        drop(gone);
    }
}

/// Whether a request asks for it.
pub(crate) fn wanted(headers: &HeaderMap) -> Result<bool, ApiError> {
    match headers.get(STREAM_RESUME_HEADER).map(HeaderValue::as_bytes) {
        None | Some(b"false") => Ok(false),
        Some(b"true") => Ok(true),
        Some(_) => Err(ApiError::field(
            STREAM_RESUME_HEADER,
            "The header `X-Stream-Resume` must be true or false.",
        )),
    }
}

/// `GET /v1/streams/{id}`.
pub(crate) async fn resume<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(streams): Extension<Arc<Streams>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let unknown = || ApiError::no_such("stream that could be resumed", &id);
    if id.len() > ID_CHARS_MAX || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        return Err(unknown());
    }
    let next = next_event(&headers, &id)?;
    let found = streams.registry().streams.get(&id).cloned();
    let Some(stream) = found else {
        return elsewhere(&gateway, &streams, &id).await?.ok_or_else(unknown);
    };
    // Another caller's does not exist for this one.
    if stream.owner != owner(&caller) {
        return Err(unknown());
    }
    if !stream.state().has(next) {
        let message =
            "The events after the last one named are not kept any more, or never were; send the request again.";
        return Err(ApiError::with(
            StatusCode::GONE,
            "invalid_request_error",
            Some("stream_gone"),
            message,
        ));
    }
    let reader = streams.attach(stream, next);
    let shown = HeaderValue::from_str(&id).map_err(|_| ApiError::internal())?;
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::HeaderName::from_static(STREAM_ID_HEADER), shown),
    ];
    Ok((headers, Body::new(reader)).into_response())
}

/// The member that a stream's id names, if it is another: the client is sent there. Its key is not passed on between members,
/// which talk to each other only under their own certificates.
async fn elsewhere<B: Backend>(
    gateway: &Gateway<B>,
    streams: &Streams,
    id: &str,
) -> Result<Option<Response>, ApiError> {
    let member = id.split_once('.').and_then(|(member, _)| member.parse::<u64>().ok());
    let backend = &*gateway.ledger.backend;
    let Some(member) = member.filter(|member| *member != 0) else {
        return Ok(None);
    };
    if member == streams.member(backend).await {
        return Ok(None);
    }
    let group = backend.coordinators().await?;
    let other = group.coordinators.into_iter().find(|other| other.id == member);
    let Some(other) = other.filter(|other| other.reachable && !other.api_url.is_empty()) else {
        return Ok(None);
    };
    let url = format!("{}/v1/streams/{id}", other.api_url.trim_end_matches('/'));
    let url = HeaderValue::from_str(&url).map_err(|_| ApiError::internal())?;
    Ok(Some(
        (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, url)]).into_response(),
    ))
}

/// The event that a reader wants first.
fn next_event(headers: &HeaderMap, id: &str) -> Result<u64, ApiError> {
    let Some(last) = headers.get(LAST_EVENT_ID) else {
        return Ok(1);
    };
    let last = last
        .to_str()
        .ok()
        .and_then(|last| last.strip_prefix(id)?.strip_prefix(':'));
    let digits = last.filter(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    let number = digits.and_then(|digits| digits.parse::<u64>().ok()?.checked_add(1));
    number.ok_or_else(|| {
        ApiError::field(
            LAST_EVENT_ID,
            "The header `Last-Event-ID` must be the `id` of an event of this very stream.",
        )
    })
}

fn owner(caller: &Caller) -> (Arc<str>, Arc<str>) {
    (caller.tenant.clone(), caller.key_id.clone())
}

struct Stream {
    id: String,
    owner: (Arc<str>, Arc<str>),
    state: Mutex<Track>,
}

impl Stream {
    fn state(&self) -> MutexGuard<'_, Track> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream's source, and what was taken from it.
struct Track {
    /// `None` once it has ended.
    source: Option<Body>,
    /// The beginning of an event.
    partial: BytesMut,
    events: VecDeque<Bytes>,
    events_bytes: usize,
    /// Number of the first event kept, from 1.
    first: u64,
    /// The reader, counted up.
    reader: u64,
    waker: Option<Waker>,
}

impl Track {
    fn new(source: Body) -> Self {
        Self {
            source: Some(source),
            partial: BytesMut::new(),
            events: VecDeque::new(),
            events_bytes: 0,
            first: 1,
            reader: 0,
            waker: None,
        }
    }

    /// Whether a reader may go on with event `n`: it is kept, or the next to come.
    fn has(&self, n: u64) -> bool {
        n >= self.first && n - self.first <= self.events.len() as u64
    }

    fn event(&self, n: u64) -> Option<Bytes> {
        self.events
            .get(usize::try_from(n.checked_sub(self.first)?).ok()?)
            .cloned()
    }

    /// Takes bytes of the source. Comments among them are dropped: they say that somebody is there, to whoever is.
    fn take(&mut self, id: &str, data: &[u8]) {
        self.partial.extend_from_slice(data);
        while let Some(end) = self.partial.windows(2).position(|two| two == b"\n\n") {
            let event = self.partial.split_to(end + 2);
            if event.starts_with(b":") {
                continue;
            }
            let number = self.first + self.events.len() as u64;
            let event = [format!("id: {id}:{number}\n").as_bytes(), &event].concat();
            self.events_bytes += event.len();
            self.events.push_back(event.into());
            // The newest stays, however large.
            while self.events_bytes > KEPT_BYTES_MAX && self.events.len() > 1 {
                self.events_bytes -= self.events.pop_front().map_or(0, |event| event.len());
                self.first += 1;
            }
        }
    }
}

/// One connection's view of a stream.
struct Reader {
    streams: Arc<Streams>,
    stream: Arc<Stream>,
    number: u64,
    next: u64,
}

/// Why a reader's body breaks off.
#[derive(Debug, thiserror::Error)]
enum ReaderError {
    #[error("the stream is read by a later connection")]
    Replaced,
    #[error("an event is too large")]
    TooLarge,
    #[error(transparent)]
    Source(axum::Error),
}

impl HttpBody for Reader {
    type Data = Bytes;
    type Error = ReaderError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ReaderError>>> {
        let this = self.get_mut();
        let mut state = this.stream.state();
        let state = &mut *state;
        if state.reader != this.number {
            return Poll::Ready(Some(Err(ReaderError::Replaced)));
        }
        loop {
            if let Some(event) = state.event(this.next) {
                this.next += 1;
                return Poll::Ready(Some(Ok(Frame::data(event))));
            }
            let Some(source) = state.source.as_mut() else {
                return Poll::Ready(None);
            };
            match Pin::new(source).poll_frame(context) {
                Poll::Pending => {
                    state.waker = Some(context.waker().clone());
                    return Poll::Pending;
                }
                Poll::Ready(None) => state.source = None,
                Poll::Ready(Some(Err(error))) => {
                    state.source = None;
                    return Poll::Ready(Some(Err(ReaderError::Source(error))));
                }
                Poll::Ready(Some(Ok(frame))) => {
                    let Ok(data) = frame.into_data() else { continue };
                    if data.starts_with(b":") && state.partial.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                    state.take(&this.stream.id, &data);
                    if state.partial.len() > EVENT_BYTES_MAX {
                        state.source = None;
                        return Poll::Ready(Some(Err(ReaderError::TooLarge)));
                    }
                }
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let (streams, stream, number) = (self.streams.clone(), self.stream.clone(), self.number);
        if stream.state().reader != number {
            return;
        }
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn(async move {
                    // Only the registry holds it meanwhile, so that closing ends it.
                    let (grace, id) = (streams.grace, stream.id.clone());
                    drop(stream);
                    tokio::time::sleep(grace).await;
                    let found = streams.registry().streams.get(&id).cloned();
                    if let Some(found) = found {
                        streams.forget(&found, number);
                    }
                });
            }
            Err(_) => streams.forget(&stream, number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_numbered_once_and_the_oldest_go() {
        let mut track = Track::new(Body::empty());
        track.take("7.x", b"data: a\n");
        assert!(track.event(1).is_none());
        track.take("7.x", b"\n: comment\n\ndata: b\n\nda");
        assert_eq!(track.event(1).unwrap(), "id: 7.x:1\ndata: a\n\n");
        assert_eq!(track.event(2).unwrap(), "id: 7.x:2\ndata: b\n\n");
        assert!(track.has(1) && track.has(3) && !track.has(4) && !track.has(0));
        track.take("7.x", format!("ta: {}\n\n", "c".repeat(KEPT_BYTES_MAX)).as_bytes());
        assert!(!track.has(1) && !track.has(2) && track.has(3) && track.has(4));
        track.take("7.x", b"data: d\n\n");
        assert!(track.events_bytes <= KEPT_BYTES_MAX && track.has(4) && track.has(5));
    }

    #[test]
    fn a_last_event_is_of_this_stream_or_refused() {
        let next = |value: &'static [u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(LAST_EVENT_ID, HeaderValue::from_bytes(value).unwrap());
            next_event(&headers, "7.x").ok()
        };
        assert_eq!(next(b"7.x:41"), Some(42));
        assert_eq!(next(b"7.x:0"), Some(1));
        for bad in [
            &b""[..],
            b"7.x",
            b"7.x:",
            b"7.x:-1",
            b"7.x:+1",
            b"7.y:1",
            b"7.x:18446744073709551615",
            b"7.x:1\xff",
        ] {
            assert_eq!(next(bad), None);
        }
    }
}
