//! A streamed answer as server-sent events: what a [`Render`] makes of the pieces and of the outcome, an error event if
//! something breaks midway, comments while nothing happens. Dropping the stream drops the run, which cancels it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;

use super::output::{Outcome, Piece};
use super::run::{Run, Step};
use crate::api_error::ApiError;
use crate::backend::Backend;
use crate::metrics::Counts;

/// A comment: clients ignore it, proxies see life.
const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");

/// Events ready to be sent, a handful.
#[derive(Default)]
pub(crate) struct Frames(VecDeque<Bytes>);

impl Frames {
    /// An event of data alone, as OpenAI's chat streams have them. `json` has no line break.
    pub fn data(&mut self, json: &[u8]) {
        self.0.push_back([b"data: ", json, b"\n\n"].concat().into());
    }

    /// An event with a name, as OpenAI's responses and Anthropic's messages have them.
    pub fn event(&mut self, name: &str, json: &[u8]) {
        self.0.push_back(
            [b"event: ", name.as_bytes(), b"\ndata: ", json, b"\n\n"]
                .concat()
                .into(),
        );
    }
}

/// Makes an endpoint's events.
pub(crate) trait Render: Send + 'static {
    /// Before all else; nothing was generated yet.
    fn begin(&mut self, frames: &mut Frames);

    /// More of one choice. Called only if it shows something; what is rendered counts as delivered. `counts` tells
    /// usage so far.
    fn piece(&mut self, piece: Piece, counts: &dyn Fn() -> Counts, frames: &mut Frames);

    /// All choices are over and the record is durable. The last call.
    fn end(&mut self, outcome: &Outcome, frames: &mut Frames);

    /// Something broke. The last call. Nothing may say that all is well.
    fn error(&mut self, error: &ApiError, frames: &mut Frames) {
        frames.data(error.body().to_string().as_bytes());
    }
}

struct Streaming<B: Backend, R> {
    run: Run<B>,
    render: R,
    keep_alive: Duration,
    /// The step that came before the headers went out.
    first: Option<Step>,
    ready: Frames,
    over: bool,
}

/// The body of a streamed answer. `first` is a step already taken.
pub(crate) fn body<B: Backend>(
    run: Run<B>,
    mut render: impl Render,
    keep_alive: Duration,
    first: Option<Step>,
) -> Body {
    let mut ready = Frames::default();
    render.begin(&mut ready);
    let state = Streaming {
        run,
        render,
        keep_alive,
        first,
        ready,
        over: false,
    };
    Body::from_stream(stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok::<_, Infallible>(event), state))
    }))
}

impl<B: Backend, R: Render> Streaming<B, R> {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.ready.0.pop_front() {
                return Some(event);
            }
            if self.over {
                return None;
            }
            let step = match self.first.take() {
                Some(step) => Ok(step),
                None => match tokio::time::timeout(self.keep_alive, self.run.step()).await {
                    Ok(step) => step,
                    Err(_) => return Some(KEEP_ALIVE),
                },
            };
            match step {
                Ok(Step::Piece(piece)) if piece.shows() => {
                    let choice = piece.choice;
                    let run = &self.run;
                    self.render.piece(piece, &|| run.counts(), &mut self.ready);
                    self.run.mark_delivered(choice);
                }
                Ok(Step::Piece(_)) => {}
                Ok(Step::Over) => match self.run.settle().await {
                    Ok(outcome) => {
                        self.render.end(&outcome, &mut self.ready);
                        self.over = true;
                    }
                    Err(error) => self.broken(&error),
                },
                Err(error) => self.broken(&error),
            }
        }
    }

    fn broken(&mut self, error: &ApiError) {
        self.render.error(error, &mut self.ready);
        self.over = true;
    }
}
