//! The place between a worker link and the task of one request: tokens pile up here while the task is busy, and are
//! taken together. The link never waits for a slow reader, and what a reader can make pile up is bounded by its own
//! `max_tokens`.

use baton_proto::worker::{Finish, TokenLogprobs};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum End {
    /// The worker said so.
    Finished(Finish),
    /// The link broke, or the worker broke the contract. Another worker can go on.
    Broken(String),
}

/// What came since the last look.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Delivery {
    pub(crate) tokens: Vec<u32>,
    /// One for each of `tokens`, or none.
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) end: Option<End>,
    /// Prompt tokens from a prefix cache, if the worker told them since.
    pub(crate) cached_tokens: Option<u32>,
}

#[derive(Debug)]
struct Inner {
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    /// Most likely tokens asked for beside each token; `None`: no logarithms at all.
    top_logprobs: Option<u32>,
    end: Option<End>,
    cached_tokens: Option<u32>,
    /// Tokens that may still come.
    budget: u32,
}

#[derive(Debug)]
pub(crate) struct Mailbox {
    inner: Mutex<Inner>,
    arrived: Notify,
}

impl Mailbox {
    pub(crate) fn new(max_tokens: u32, top_logprobs: Option<u32>) -> Self {
        Self {
            inner: Mutex::new(Inner {
                tokens: Vec::new(),
                logprobs: Vec::new(),
                top_logprobs,
                end: None,
                cached_tokens: None,
                budget: max_tokens,
            }),
            arrived: Notify::new(),
        }
    }

    /// Puts in a count of cached prompt tokens. After the end nothing more is taken.
    pub(crate) fn tell_cached(&self, cached_tokens: u32) {
        let mut inner = self.lock();
        if inner.end.is_none() {
            inner.cached_tokens = Some(cached_tokens);
        }
        drop(inner);
        self.arrived.notify_one();
    }

    /// Puts in what the worker sent. After the end nothing more is taken: what an abandoned attempt still sends is void.
    pub(crate) fn put(&self, tokens: &[u32], logprobs: Vec<TokenLogprobs>, end: Option<End>) {
        let mut inner = self.lock();
        if inner.end.is_some() {
            return;
        }
        if !fits(&logprobs, tokens.len(), inner.top_logprobs) {
            // Nothing of it counts: the next worker computes these tokens again, with their logarithms.
            inner.end = Some(End::Broken("the worker sent other logprobs than were asked for".into()));
            drop(inner);
            self.arrived.notify_one();
            return;
        }
        let len = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        if len > inner.budget {
            let taken = inner.budget as usize;
            inner.tokens.extend_from_slice(&tokens[..taken]);
            inner.logprobs.extend(logprobs.into_iter().take(taken));
            inner.budget = 0;
            inner.end = Some(End::Broken("the worker sent more tokens than were asked for".into()));
        } else {
            inner.tokens.extend_from_slice(tokens);
            inner.logprobs.extend(logprobs);
            inner.budget -= len;
            inner.end = end;
        }
        drop(inner);
        self.arrived.notify_one();
    }

    /// Waits for something to arrive and takes all of it. The end, once there, is told at every call. Cancel-safe.
    pub(crate) async fn take(&self) -> Delivery {
        loop {
            {
                let mut inner = self.lock();
                if !inner.tokens.is_empty() || inner.end.is_some() || inner.cached_tokens.is_some() {
                    return Delivery {
                        end: inner.end.clone(),
                        tokens: std::mem::take(&mut inner.tokens),
                        logprobs: std::mem::take(&mut inner.logprobs),
                        cached_tokens: inner.cached_tokens.take(),
                    };
                }
            }
            self.arrived.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One for each token if asked for, each with no more than was asked for; else none.
fn fits(logprobs: &[TokenLogprobs], tokens: usize, asked: Option<u32>) -> bool {
    match asked {
        None => logprobs.is_empty(),
        Some(top) => {
            let whole =
                |of: &TokenLogprobs| of.top_ids.len() == of.top_logprobs.len() && of.top_ids.len() <= top as usize;
            logprobs.len() == tokens && logprobs.iter().all(whole)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn logprobs_come_with_their_tokens_or_not_at_all() {
        let of = |top: usize| TokenLogprobs {
            logprob: -1.0,
            top_ids: vec![7; top],
            top_logprobs: vec![-0.5; top],
        };
        let mailbox = Mailbox::new(9, Some(1));
        mailbox.put(&[1, 2], vec![of(1), of(0)], None);
        assert_eq!(mailbox.take().await.logprobs, [of(1), of(0)]);
        for (bad, asked) in [(vec![], Some(1)), (vec![of(2)], Some(1)), (vec![of(0)], None)] {
            let mailbox = Mailbox::new(9, asked);
            mailbox.put(&[1], bad, None);
            let delivery = mailbox.take().await;
            assert!(delivery.tokens.is_empty() && matches!(delivery.end, Some(End::Broken(_))));
        }
    }

    #[tokio::test]
    async fn a_slow_reader_gets_everything_at_once_and_no_more_than_asked() {
        let mailbox = Mailbox::new(4, None);
        mailbox.put(&[1], vec![], None);
        mailbox.put(&[2, 3], vec![], None);
        assert_eq!(mailbox.take().await.tokens, [1, 2, 3]);
        mailbox.put(&[4, 5], vec![], None);
        let last = mailbox.take().await;
        assert_eq!(last.tokens, [4]);
        assert!(matches!(last.end, Some(End::Broken(_))));
        mailbox.put(&[6], vec![], Some(End::Finished(Finish::default())));
        let again = mailbox.take().await;
        assert!(again.tokens.is_empty() && matches!(again.end, Some(End::Broken(_))));
    }
}
