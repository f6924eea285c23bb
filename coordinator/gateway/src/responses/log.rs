//! The events of a response in the background: kept while it runs, for whoever follows it, from whichever event on.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::watch;

use crate::generation::stream::{Frames, KEEP_ALIVE};

#[derive(Default)]
struct Kept {
    frames: Vec<Bytes>,
    bytes: usize,
    over: bool,
}

/// See the module.
pub(crate) struct Log {
    kept: Mutex<Kept>,
    bytes_max: usize,
    changed: watch::Sender<()>,
}

impl Log {
    pub fn new(bytes_max: u64) -> Self {
        Self {
            kept: Mutex::default(),
            bytes_max: usize::try_from(bytes_max).unwrap_or(usize::MAX),
            changed: watch::Sender::new(()),
        }
    }

    /// Takes what was written. False once it is more than may be kept.
    pub fn take(&self, frames: &mut Frames) -> bool {
        let mut kept = self.kept();
        while let Some(frame) = frames.pop() {
            kept.bytes = kept.bytes.saturating_add(frame.len());
            kept.frames.push(frame);
        }
        let fits = kept.bytes <= self.bytes_max;
        drop(kept);
        self.changed.send_replace(());
        fits
    }

    /// Nothing more comes.
    pub fn close(&self) {
        self.kept().over = true;
        self.changed.send_replace(());
    }

    /// As they are stored.
    pub fn texts(&self) -> Vec<String> {
        let kept = self.kept();
        kept.frames
            .iter()
            .map(|frame| String::from_utf8_lossy(frame).into_owned())
            .collect()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The events from number `from` on, those to come included.
pub(crate) fn follow(log: Arc<Log>, from: usize, keep_alive: Duration) -> Body {
    let changed = log.changed.subscribe();
    let state = (log, from, changed);
    Body::from_stream(stream::unfold(state, move |(log, at, mut changed)| async move {
        loop {
            changed.mark_unchanged();
            let (frame, over) = {
                let kept = log.kept();
                (kept.frames.get(at).cloned(), kept.over)
            };
            if let Some(frame) = frame {
                return Some((Ok::<_, Infallible>(frame), (log, at + 1, changed)));
            }
            if over {
                return None;
            }
            if tokio::time::timeout(keep_alive, changed.changed()).await.is_err() {
                return Some((Ok(KEEP_ALIVE), (log, at, changed)));
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    fn frames(numbers: std::ops::Range<u32>) -> Frames {
        let mut frames = Frames::default();
        numbers.for_each(|number| frames.data(number.to_string().as_bytes()));
        frames
    }

    #[tokio::test]
    async fn followers_see_every_event_from_theirs_on() {
        let log = Arc::new(Log::new(1 << 20));
        assert!(log.take(&mut frames(0..2)));
        let early = tokio::spawn(follow(log.clone(), 0, Duration::from_secs(9)).collect());
        let late = follow(log.clone(), 3, Duration::from_secs(9));
        tokio::task::yield_now().await;
        assert!(log.take(&mut frames(2..5)));
        log.close();
        let text = |bytes: Bytes| {
            String::from_utf8(bytes.to_vec())
                .unwrap()
                .replace("data: ", "")
                .replace('\n', "")
        };
        assert_eq!(text(early.await.unwrap().unwrap().to_bytes()), "01234");
        assert_eq!(text(late.collect().await.unwrap().to_bytes()), "34");
        assert_eq!(log.texts().len(), 5);
    }

    #[test]
    fn it_is_bounded() {
        let log = Log::new(20);
        assert!(log.take(&mut frames(0..2)));
        assert!(!log.take(&mut frames(2..9)));
    }
}
