//! One choice: the cluster's events become pieces. No I/O but the channel it is polled from; not settled here.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use baton_proto::worker::{Finish, FinishReason, TokenLogprobs};

use crate::backend::{Generation, GenerationEvent, Track};
use crate::detokenizer::Detokenizer;
use crate::generation::output::{End, EndReason, Piece, StopHit, TokenLogprob};
use crate::reader::TokenReader;
use crate::turn::Turn;

/// How long a cancelled generation's exact counts are waited for. A worker answers a cancel within one engine step.
const STOP_WAIT_MAX: Duration = Duration::from_millis(500);

/// Brings the exact counts of a cancelled generation.
pub(crate) type Stopping = Pin<Box<dyn Future<Output = Option<Finish>> + Send>>;

/// How a choice's tokens are to be read.
pub(crate) struct ChoiceReader {
    pub tokens: TokenReader,
    pub turn: Turn,
    /// The client's stop tokens; the others are the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Stop tokens are shown.
    pub include_stop: bool,
    /// Log-probabilities are wanted.
    pub logprobs: bool,
}

/// See the module.
pub(crate) struct Sequence {
    index: u32,
    reader: ChoiceReader,
    generation: Option<Generation>,
    pub track: Track,
    /// The work was cancelled because the text is complete; brings its exact counts.
    pub stopping: Option<Stopping>,
    /// Known once the generation is over.
    pub finish: Option<Finish>,
    /// Set once the choice is over.
    pub end: Option<End>,
    /// Tokens whose text was handed to the connection: what a client that hangs up is billed for.
    pub delivered: u32,
    /// Tokens of thought.
    pub reasoning_tokens: u32,
    pub first_tokens_at: Option<Instant>,
    pub last_tokens_at: Option<Instant>,
}

/// Why a choice, and with it its request, failed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// For the log; with `field`, for the client.
    pub cause: String,
    pub retryable: bool,
    /// What of the job no worker can serve.
    pub field: Option<String>,
}

impl Sequence {
    pub fn new(index: u32, reader: ChoiceReader, generation: Generation) -> Self {
        Self {
            index,
            reader,
            track: generation.track(),
            generation: Some(generation),
            stopping: None,
            finish: None,
            end: None,
            delivered: 0,
            reasoning_tokens: 0,
            first_tokens_at: None,
            last_tokens_at: None,
        }
    }

    /// Tokens counted so far.
    pub fn tokens(&self) -> u32 {
        self.reader.tokens.tokens()
    }

    /// Moved at least once: its first worker's times are lost.
    pub fn moved(&self) -> bool {
        self.track.placement().attempts > 1
    }

    /// The next event; `Ready(None)` if the cluster went away without a finish. Pending for ever once the choice is over.
    pub fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<GenerationEvent>> {
        match &mut self.generation {
            Some(generation) => generation.poll_next(context),
            None => Poll::Pending,
        }
    }

    /// Reads an event.
    pub fn take(&mut self, event: GenerationEvent) -> Result<Piece, Failure> {
        let mut piece = Piece {
            choice: self.index,
            ..Piece::default()
        };
        let reason = event.finish.as_ref().map(Finish::reason);
        if let Some(finish) = event.finish {
            self.finish = Some(finish);
            self.generation = None;
        }
        let hit = self.read(
            &event.tokens,
            &event.logprobs,
            reason == Some(FinishReason::Stop),
            &mut piece,
        );
        let reason = match reason {
            _ if self.reader.tokens.stopped() => {
                self.cancel();
                Some(EndReason::Stop)
            }
            None => None,
            Some(FinishReason::Stop) => Some(EndReason::Stop),
            Some(FinishReason::Length) => Some(EndReason::Length),
            Some(_) => return Err(self.failure()),
        };
        if let Some(reason) = reason {
            let rest = self.reader.tokens.finish();
            self.reader.turn.push(&rest, &mut piece.deltas);
            let cut_short = reason == EndReason::Length || self.reader.tokens.stopped();
            self.reader.turn.finish(cut_short, &mut piece.deltas);
            // Flushing may itself complete a stop string; nothing is left to cancel.
            let stop = self
                .reader
                .tokens
                .stopped_by()
                .map(|stop| StopHit::Text(stop.to_owned()));
            let reason = if stop.is_some() { EndReason::Stop } else { reason };
            self.end = Some(End {
                reason: if reason == EndReason::Stop && self.reader.turn.called() {
                    EndReason::ToolCalls
                } else {
                    reason
                },
                stop: stop.or(hit),
            });
        }
        piece.completion_tokens = self.tokens();
        Ok(piece)
    }

    /// Token by token, so that nothing depends on how they were cut into events.
    fn read(
        &mut self,
        tokens: &[u32],
        logprobs: &[TokenLogprobs],
        ends_turn: bool,
        piece: &mut Piece,
    ) -> Option<StopHit> {
        for (at, &token) in tokens.iter().enumerate() {
            if self.reader.tokens.stopped() {
                break;
            }
            let last = ends_turn && at + 1 == tokens.len();
            let asked = last && self.reader.stop_token_ids.contains(&token);
            if last && !(asked && self.reader.include_stop) {
                self.reader.tokens.end();
                return asked.then_some(StopHit::Token(token));
            }
            let text = self.reader.tokens.push(token);
            self.reader.turn.push(&text, &mut piece.deltas);
            self.reasoning_tokens += u32::from(self.reader.turn.is_reasoning());
            if let Some(logprobs) = logprobs.get(at).filter(|_| self.reader.logprobs) {
                piece
                    .logprobs
                    .push(told(self.reader.tokens.detokenizer(), token, logprobs));
            }
            if asked {
                return Some(StopHit::Token(token));
            }
        }
        None
    }

    fn failure(&self) -> Failure {
        let finish = self.finish.as_ref();
        Failure {
            cause: finish.map(|finish| finish.error.clone()).unwrap_or_default(),
            retryable: finish.is_some_and(|finish| finish.retryable),
            field: finish
                .map(|finish| finish.invalid_field.clone())
                .filter(|field| !field.is_empty()),
        }
    }

    /// Cancels the work, if it runs.
    pub fn cancel(&mut self) {
        if let Some(generation) = self.generation.take() {
            self.stopping = Some(Box::pin(generation.stop(STOP_WAIT_MAX)));
        }
    }
}

fn told(detokenizer: &Detokenizer, token: u32, logprobs: &TokenLogprobs) -> TokenLogprob {
    let top = logprobs.top_ids.iter().zip(&logprobs.top_logprobs);
    TokenLogprob {
        token: detokenizer.token(token),
        logprob: logprobs.logprob,
        top: top.map(|(&id, &logprob)| (detokenizer.token(id), logprob)).collect(),
    }
}
