//! The engine's view of one Attach stream: an outbox that never blocks the engine.
//!
//! Each engine step adds deltas; `flush` sends them as one message if the stream takes it. While it does not, later
//! deltas of the same sequence are merged into the waiting ones, so an outbox holds at most one delta per open
//! request and at most the tokens those requests asked for.

use baton_proto::worker::{FromWorker, SequenceDelta, StepOutput, from_worker};
use std::collections::HashMap;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tonic::Status;

/// Messages a stream may have under way before deltas are merged instead: two engine steps, so that a healthy reader
/// never waits and a slow one does not pile up latency.
pub(crate) const OUTBOUND_MESSAGES_MAX: usize = 2;

/// Identifies an Attach stream within this process.
pub(crate) type CallerId = u64;

/// Where an Attach stream's messages go.
pub(crate) type OutboundSender = mpsc::Sender<Result<FromWorker, Status>>;

/// What `flush` found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Nothing is left to send.
    Empty,
    /// The stream is full; try again soon.
    Full,
    /// The caller is gone.
    Gone,
}

pub(crate) struct Outbox {
    sender: OutboundSender,
    waiting: Vec<SequenceDelta>,
    /// Position in `waiting` of each id, while it has not finished.
    at: HashMap<u64, usize>,
}

impl Outbox {
    pub(crate) fn new(sender: OutboundSender) -> Self {
        Self {
            sender,
            waiting: Vec::new(),
            at: HashMap::new(),
        }
    }

    pub(crate) fn add(&mut self, delta: SequenceDelta) {
        match self.at.get(&delta.id) {
            Some(&index) => {
                let waiting = &mut self.waiting[index];
                waiting.token_ids.extend(delta.token_ids);
                waiting.logprobs.extend(delta.logprobs);
                waiting.cached_tokens = delta.cached_tokens.or(waiting.cached_tokens);
                waiting.finish = delta.finish;
                if waiting.finish.is_some() {
                    self.at.remove(&delta.id);
                }
            }
            None => {
                if delta.finish.is_none() {
                    self.at.insert(delta.id, self.waiting.len());
                }
                self.waiting.push(delta);
            }
        }
    }

    pub(crate) fn flush(&mut self) -> Flushed {
        if self.waiting.is_empty() {
            return Flushed::Empty;
        }
        match self.sender.try_reserve() {
            Ok(permit) => {
                self.at.clear();
                let deltas = std::mem::take(&mut self.waiting);
                permit.send(Ok(FromWorker {
                    kind: Some(from_worker::Kind::Step(StepOutput { deltas })),
                }));
                Flushed::Empty
            }
            Err(TrySendError::Full(())) => Flushed::Full,
            Err(TrySendError::Closed(())) => Flushed::Gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_proto::worker::Finish;

    fn delta(id: u64, tokens: &[u32], finish: bool) -> SequenceDelta {
        SequenceDelta {
            id,
            token_ids: tokens.to_vec(),
            finish: finish.then(Finish::default),
            cached_tokens: None,
            logprobs: Vec::new(),
        }
    }

    fn received(receiver: &mut mpsc::Receiver<Result<FromWorker, Status>>) -> Vec<SequenceDelta> {
        match receiver.try_recv().unwrap().unwrap().kind.unwrap() {
            from_worker::Kind::Step(step) => step.deltas,
            other => panic!("only steps were sent: {other:?}"),
        }
    }

    #[test]
    fn a_count_of_cached_tokens_survives_merging() {
        let (sender, mut receiver) = mpsc::channel(1);
        let mut outbox = Outbox::new(sender);
        let told = |cached_tokens| SequenceDelta {
            cached_tokens,
            ..delta(1, &[], false)
        };
        outbox.add(told(Some(16)));
        outbox.add(told(Some(32)));
        outbox.add(delta(1, &[7], false));
        assert_eq!(outbox.flush(), Flushed::Empty);
        let expected = SequenceDelta {
            cached_tokens: Some(32),
            ..delta(1, &[7], false)
        };
        assert_eq!(received(&mut receiver), vec![expected]);
    }

    #[test]
    fn a_slow_caller_gets_merged_deltas_and_loses_nothing() {
        let (sender, mut receiver) = mpsc::channel(1);
        let mut outbox = Outbox::new(sender);
        outbox.add(delta(1, &[10], false));
        assert_eq!(outbox.flush(), Flushed::Empty);
        for token in 11..15 {
            outbox.add(delta(1, &[token], false));
            outbox.add(delta(2, &[token], token == 14));
            assert_eq!(outbox.flush(), Flushed::Full);
        }
        assert_eq!(received(&mut receiver), vec![delta(1, &[10], false)]);
        assert_eq!(outbox.flush(), Flushed::Empty);
        assert_eq!(
            received(&mut receiver),
            vec![delta(1, &[11, 12, 13, 14], false), delta(2, &[11, 12, 13, 14], true)]
        );
        // An id that finished may be used again at once; the two lives stay apart.
        outbox.add(delta(3, &[1], true));
        outbox.add(delta(3, &[2], false));
        assert_eq!(outbox.flush(), Flushed::Empty);
        assert_eq!(
            received(&mut receiver),
            vec![delta(3, &[1], true), delta(3, &[2], false)]
        );
        drop(receiver);
        outbox.add(delta(3, &[9], false));
        assert_eq!(outbox.flush(), Flushed::Gone);
    }
}
