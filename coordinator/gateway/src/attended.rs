//! A request as its connection attends to it: bodies with deadlines both ways, and guards that count it until the last byte of
//! its answer was taken.
//!
//! A body comes at a least rate, and an answer must be fetched. The second cannot be left to the socket alone: an HTTP/2
//! client can keep a socket lively while the window of one stream stays shut, and with it a request in work. So the
//! connection looks at every answer: one that gave a frame and was not asked for the next for too long is stalled. Its
//! source is dropped, which cancels the request and frees its place; the stream ends with an error, should anybody ask.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{Method, Response};
use http_body_util::BodyExt;
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Sleep;

use crate::activity::{Activity, Verdict};
use crate::clients::PeerRequest;

/// The least rate of a request's body in bytes per second, after its first time limit: what a poor mobile line does. The
/// handler's own limit on the whole may be shorter.
const BODY_BYTES_PER_S_MIN: u64 = 8 << 10;

/// What is broken about a body; only for logs and error chains.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the body comes too slowly")]
    Slow,
    #[error("the client stopped reading")]
    Stalled,
    #[error(transparent)]
    Other(axum::Error),
    #[error(transparent)]
    Wire(hyper::Error),
}

/// A connection's requests and answers.
pub(crate) struct Attendance {
    activity: Mutex<Activity>,
    answers: Mutex<Vec<Weak<Answer>>>,
    stall_max: Duration,
}

impl Attendance {
    pub fn new(activity: Activity, stall_max: Duration) -> Arc<Self> {
        Arc::new(Self {
            activity: Mutex::new(activity),
            answers: Mutex::default(),
            stall_max,
        })
    }

    /// Counts a request in.
    pub fn request(self: &Arc<Self>, method: &Method, places: Places) -> Attended {
        self.activity().began();
        Attended {
            attendance: self.clone(),
            // An answer without a body is never asked for one.
            finished: method == Method::HEAD,
            _places: places,
        }
    }

    /// The connection was told to go.
    pub fn closing(&self, now: Instant) {
        self.activity().closing(now);
    }

    /// Cuts stalled answers, and says what to do with the connection.
    pub fn look(&self, now: Instant) -> Verdict {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.retain(|answer| answer.upgrade().is_some_and(|answer| answer.look(now, self.stall_max)));
        drop(answers);
        self.activity().verdict(now)
    }

    pub fn look_every(&self) -> Duration {
        self.activity().look_every(self.stall_max)
    }

    fn activity(&self) -> std::sync::MutexGuard<'_, Activity> {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The places a request takes among all and among its client's.
pub(crate) type Places = (Option<OwnedSemaphorePermit>, Option<PeerRequest>);

/// A request in work. Dropped, it counts as taken back, unless its answer was taken whole.
pub(crate) struct Attended {
    attendance: Arc<Attendance>,
    finished: bool,
    _places: Places,
}

impl Attended {
    /// The answer, attended to until its end.
    pub fn answer(self, response: Response<Body>) -> Response<Outgoing> {
        response.map(|body| {
            let attendance = self.attendance.clone();
            let answer = Arc::new(Answer(Mutex::new(Some(Open {
                body,
                request: self,
                handed: None,
            }))));
            let mut answers = attendance.answers.lock().unwrap_or_else(PoisonError::into_inner);
            // One at a time on HTTP/1.1, so this stays short; HTTP/2 has a limit on streams, and is looked at all the time.
            if answers.len() >= answers.capacity() {
                answers.retain(|answer| answer.strong_count() > 0);
            }
            answers.push(Arc::downgrade(&answer));
            Outgoing(answer)
        })
    }
}

impl Drop for Attended {
    fn drop(&mut self) {
        self.attendance.activity().ended(self.finished, Instant::now());
    }
}

struct Open {
    body: Body,
    request: Attended,
    /// When the last frame was given, if the next was not asked for yet.
    handed: Option<Instant>,
}

struct Answer(Mutex<Option<Open>>);

impl Answer {
    fn open(&self) -> std::sync::MutexGuard<'_, Option<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False if it needs no further looks.
    fn look(&self, now: Instant, stall_max: Duration) -> bool {
        let mut open = self.open();
        let handed = match open.as_ref() {
            None => return false,
            Some(open) => open.handed,
        };
        let stalled = handed.is_some_and(|handed| now.saturating_duration_since(handed) >= stall_max);
        let cut = if stalled { open.take() } else { None };
        // What goes with it takes locks of its own.
        drop(open);
        cut.is_none()
    }
}

/// An answer's body.
pub(crate) struct Outgoing(Arc<Answer>);

impl HttpBody for Outgoing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut open = self.0.open();
        let Some(this) = open.as_mut() else {
            return Poll::Ready(Some(Err(BodyError::Stalled)));
        };
        this.handed = None;
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        match &frame {
            Some(Ok(_)) => this.handed = Some(Instant::now()),
            Some(Err(_)) => {}
            None => this.request.finished = true,
        }
        this.request.finished |= this.body.is_end_stream();
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::Other)))
    }

    fn is_end_stream(&self) -> bool {
        self.0.open().as_ref().is_some_and(|open| open.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.0
            .open()
            .as_ref()
            .map_or_else(SizeHint::default, |open| open.body.size_hint())
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        let open = self.0.open().take();
        if let Some(mut open) = open {
            // An answer that was empty from the start is never polled.
            open.request.finished |= open.body.is_end_stream();
        }
    }
}

/// A request's body with a least rate.
pub(crate) struct Arriving {
    body: Incoming,
    first: Duration,
    began: Instant,
    bytes: u64,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Arriving {
    /// `first` is the time that even an empty body may take.
    pub fn body(body: Incoming, first: Duration) -> Body {
        if body.is_end_stream() {
            return Body::empty();
        }
        Body::new(
            Self {
                body,
                first,
                began: Instant::now(),
                bytes: 0,
                deadline: None,
            }
            .map_err(axum::Error::new),
        )
    }

    fn due(&self) -> Instant {
        self.began + self.first + Duration::from_millis(self.bytes.saturating_mul(1000) / BODY_BYTES_PER_S_MIN)
    }
}

impl HttpBody for Arriving {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(context) {
            let data = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
            this.bytes = this.bytes.saturating_add(data.map_or(0, |data| data.len() as u64));
            let late = matches!(frame, Some(Ok(_))) && Instant::now() >= this.due();
            return Poll::Ready(match late {
                true => Some(Err(BodyError::Slow)),
                false => frame.map(|frame| frame.map_err(BodyError::Wire)),
            });
        }
        let due = this.due();
        let deadline = this
            .deadline
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due.into())));
        if deadline.deadline() != tokio::time::Instant::from_std(due) {
            deadline.as_mut().reset(due.into());
        }
        ready!(deadline.as_mut().poll(context));
        Poll::Ready(Some(Err(BodyError::Slow)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream;
    use http_body_util::Full;

    const STALL: Duration = Duration::from_secs(10);

    fn attendance() -> Arc<Attendance> {
        Attendance::new(Activity::new(Duration::from_secs(30), Instant::now()), STALL)
    }

    fn endless() -> (Body, Weak<()>) {
        let alive = Arc::new(());
        let held = Arc::downgrade(&alive);
        let frames = stream::unfold(alive, |alive| async move {
            Some((Ok::<_, std::convert::Infallible>(Bytes::from_static(b"x")), alive))
        });
        (Body::from_stream(frames), held)
    }

    #[tokio::test]
    async fn an_answer_that_nobody_fetches_is_cut_and_frees_its_source() {
        let attendance = attendance();
        let (body, source) = endless();
        let attended = attendance.request(&Method::GET, (None, None));
        let mut answer = attended.answer(Response::new(body)).into_body();
        let start = Instant::now();
        attendance.look(start + 100 * STALL);
        assert!(
            source.upgrade().is_some(),
            "before the first frame it is the server that is slow"
        );
        answer.frame().await.unwrap().unwrap();
        let now = Instant::now();
        attendance.look(now + STALL / 2);
        assert!(source.upgrade().is_some());
        attendance.look(now + STALL + Duration::from_millis(1));
        assert!(source.upgrade().is_none());
        assert!(matches!(answer.frame().await, Some(Err(BodyError::Stalled))));
        assert_eq!(
            attendance.activity().verdict(now + Duration::from_secs(100)),
            Verdict::Close
        );
    }

    #[tokio::test]
    async fn what_was_taken_whole_is_told_from_what_was_not() {
        let attendance = attendance();
        let mut finished = 0;
        for (method, body, fetch, whole) in [
            (Method::GET, Body::new(Full::from("hello")), true, true),
            (Method::GET, Body::new(Full::from("hello")), false, false),
            (Method::GET, Body::empty(), false, true),
            (Method::HEAD, Body::new(Full::from("hello")), false, true),
            (Method::GET, endless().0, true, false),
        ] {
            let attended = attendance.request(&method, (None, None));
            let mut answer = attended.answer(Response::new(body)).into_body();
            if fetch {
                answer.frame().await.unwrap().unwrap();
            }
            drop(answer);
            let before = std::mem::replace(&mut finished, attendance.activity().finished());
            assert_eq!(finished - before, u64::from(whole), "{method} {fetch}");
        }
        drop(attendance.request(&Method::GET, (None, None)));
        assert_eq!(attendance.activity().finished(), finished, "never answered");
    }
}
