//! A streamed answer as server-sent events: role, text, one finish reason, usage if asked for, `[DONE]`; an error event
//! if something breaks midway; comments while nothing happens. Dropping the stream drops the run, which cancels it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;

use crate::api_error::ApiError;
use crate::backend::Backend;
use crate::response::ChunkWriter;
use crate::run::{End, Run, Step};

/// A comment: clients ignore it, proxies see life.
const KEEP_ALIVE: Bytes = Bytes::from_static(b": keep-alive\n\n");
const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

struct ChatStream<B: Backend> {
    run: Run<B>,
    chunks: ChunkWriter,
    keep_alive: Duration,
    /// The step that came before the headers went out.
    first: Option<Step>,
    /// Events ready to be sent, a handful.
    ready: VecDeque<Bytes>,
    /// The text is complete; what remains is to settle.
    last: Option<End>,
    over: bool,
}

/// The body of a streamed answer. `first` is a step already taken.
pub(crate) fn body<B: Backend>(run: Run<B>, chunks: ChunkWriter, keep_alive: Duration, first: Option<Step>) -> Body {
    let ready = VecDeque::from([event(&chunks.role())]);
    let state = ChatStream {
        run,
        chunks,
        keep_alive,
        first,
        ready,
        last: None,
        over: false,
    };
    Body::from_stream(stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok::<_, Infallible>(event), state))
    }))
}

impl<B: Backend> ChatStream<B> {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.over {
                return None;
            }
            if let Some(end) = self.last.take() {
                self.finish(end).await;
                continue;
            }
            let step = match self.first.take() {
                Some(step) => Ok(step),
                None => match tokio::time::timeout(self.keep_alive, self.run.step()).await {
                    Ok(step) => step,
                    Err(_) => return Some(KEEP_ALIVE),
                },
            };
            match step {
                Ok(Step::Text(text)) => self.text(&text),
                Ok(Step::Last(text, end)) => {
                    self.text(&text);
                    self.last = Some(end);
                }
                Err(error) => self.error(&error),
            }
        }
    }

    async fn finish(&mut self, end: End) {
        match self.run.settle(end).await {
            Ok(counts) => {
                self.ready.push_back(event(&self.chunks.finish(end.reason())));
                self.ready.extend(self.chunks.usage(counts).map(|chunk| event(&chunk)));
                self.ready.push_back(DONE);
                self.over = true;
            }
            Err(error) => self.error(&error),
        }
    }

    fn text(&mut self, text: &str) {
        if !text.is_empty() {
            self.ready.push_back(event(&self.chunks.text(text)));
            self.run.mark_delivered();
        }
    }

    /// Clients take an event with `error` as the end; `[DONE]` would say that all is well.
    fn error(&mut self, error: &ApiError) {
        self.ready.push_back(event(error.body().to_string().as_bytes()));
        self.over = true;
    }
}

fn event(json: &[u8]) -> Bytes {
    [b"data: ", json, b"\n\n"].concat().into()
}
