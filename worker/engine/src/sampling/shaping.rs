//! What changes a sequence's logits before a token is picked from them, what it needs to remember for that, and what is told
//! of the token besides. Only sequences that ask for something of this have one.
//!
//! # Order (vLLM's)
//! 1. Log probabilities are those of the raw logits: before everything below.
//! 2. `logit_bias` is added.
//! 3. `repetition_penalty` divides positive and multiplies negative logits of tokens in the prompt or emitted;
//!    `frequency_penalty` times their count, and `presence_penalty` once, are taken off those emitted.
//! 4. Stop tokens are no candidates before `min_tokens` were emitted.
//! 5. What the grammar does not admit is no candidate. Where that leaves nothing but stop tokens, 4 does not hold.
//!
//! # State
//! A function of the prompt and the emitted tokens, whoever emitted them: the last `emitted` tokens of a replayed prompt are read
//! as emitted, each new one as it is [pushed](Shaping::push). So a replay, a hand-over or a preemption changes nothing (P1).
//! Costs of a token: the distinct tokens seen, with penalties; the vocabulary, with a grammar or log probabilities.
//!
//! The engine samples on several threads while the scheduler holds the sequence, so the state is behind a lock; it is
//! never held by two, because the scheduler pushes between steps.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_grammar::{GrammarError, TokenMatcher};
use baton_kernels::vocab;
use baton_proto::limits::{LOGIT_BIAS_MAX, TOP_LOGPROBS_MAX};
use baton_proto::worker::{self, TokenLogprobs};

use crate::error::SamplingError;

/// OpenAI's limit, and vLLM's: a token's logit moves by no more. Beyond it a token is forced or forbidden anyway.
pub const LOGIT_BIAS_ABS_MAX: f32 = 100.0;
/// OpenAI's limit on either sign of the additive penalties.
pub const PENALTY_ABS_MAX: f32 = 2.0;
/// Above it every repetition is as good as forbidden.
pub const REPETITION_PENALTY_MAX: f32 = 100.0;

/// See the module.
#[derive(Debug)]
pub struct Shaping {
    bias: Vec<(u32, f32)>,
    /// 1 does nothing.
    repetition: f32,
    presence: f32,
    frequency: f32,
    min_tokens: u64,
    stop_token_ids: Vec<u32>,
    top_logprobs: Option<u32>,
    has_grammar: bool,
    state: Mutex<State>,
}

/// Two are equal only if they are one.
impl PartialEq for Shaping {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

#[derive(Debug, Default)]
struct State {
    emitted: u64,
    /// Tokens that a penalty may fall on, and where each is; empty without penalties.
    seen: Vec<Seen>,
    index: HashMap<u32, usize>,
    grammar: Option<TokenMatcher>,
    /// Of the token that was sampled last.
    logprobs: Option<TokenLogprobs>,
    error: Option<GrammarError>,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    token: u32,
    emitted: u32,
}

/// What a request says besides [`SamplingParams`](super::SamplingParams).
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// As on the wire.
    pub sampling: &'a worker::Sampling,
    /// The prompt, with what earlier attempts emitted at its end.
    pub prompt: &'a [u32],
    /// How many of its last tokens these are.
    pub emitted_tokens: usize,
    /// Tokens that `min_tokens` holds back.
    pub stop_token_ids: &'a [u32],
    /// Token ids are below this.
    pub vocab_size: usize,
}

impl Shaping {
    /// What a request asks for, `None` if that is nothing of this. `grammar` has read the emitted tokens already.
    ///
    /// # Errors
    /// A number out of its range; its message is for the client.
    pub fn new(asked: Asked<'_>, grammar: Option<TokenMatcher>) -> Result<Option<Self>, SamplingError> {
        let wire = asked.sampling;
        let bias = bias(&wire.logit_bias, asked.vocab_size)?;
        let additive = |name, value: f32| match value.abs() <= PENALTY_ABS_MAX {
            true => Ok(value),
            false => Err(SamplingError::Penalty { name, value }),
        };
        let presence = additive("presence_penalty", wire.presence_penalty)?;
        let frequency = additive("frequency_penalty", wire.frequency_penalty)?;
        let repetition = match wire.repetition_penalty {
            0.0 => 1.0,
            value if value > 0.0 && value <= REPETITION_PENALTY_MAX => value,
            value => return Err(SamplingError::RepetitionPenalty(value)),
        };
        if let Some(top) = wire.top_logprobs.filter(|top| *top > TOP_LOGPROBS_MAX) {
            return Err(SamplingError::TopLogprobs(top));
        }
        let emitted = asked.emitted_tokens.min(asked.prompt.len());
        let min_tokens = u64::from(wire.min_tokens);
        let penalties = repetition != 1.0 || presence != 0.0 || frequency != 0.0;
        let nothing = bias.is_empty()
            && !penalties
            && min_tokens <= emitted as u64
            && wire.top_logprobs.is_none()
            && grammar.is_none();
        if nothing {
            return Ok(None);
        }
        let has_grammar = grammar.is_some();
        let mut state = State {
            emitted: emitted as u64,
            grammar,
            ..State::default()
        };
        let (prompt, emitted) = asked.prompt.split_at(asked.prompt.len() - emitted);
        if repetition != 1.0 {
            prompt.iter().for_each(|token| state.see(*token, 0));
        }
        if penalties {
            emitted.iter().for_each(|token| state.see(*token, 1));
        }
        Ok(Some(Shaping {
            bias,
            repetition,
            presence,
            frequency,
            min_tokens,
            stop_token_ids: asked.stop_token_ids.to_vec(),
            top_logprobs: wire.top_logprobs,
            has_grammar,
            state: Mutex::new(state),
        }))
    }

    /// How many of the most likely tokens are told beside each sampled one, if log probabilities are asked for.
    pub fn top_logprobs(&self) -> Option<u32> {
        self.top_logprobs
    }

    /// Whether a grammar is followed.
    pub fn has_grammar(&self) -> bool {
        self.has_grammar
    }

    /// Does ahead what the next token needs besides logits: the grammar's mask. Errors show when it is used.
    pub fn prepare(&self) {
        if let Some(grammar) = &mut self.state().grammar {
            let _ = grammar.prepare();
        }
    }

    /// A token was emitted. Answers its log probabilities where they were sampled here.
    ///
    /// # Errors
    /// The grammar does not admit it, or cannot be followed further: the sequence is over.
    pub fn push(&self, token: u32) -> Result<Option<TokenLogprobs>, GrammarError> {
        let mut state = self.state();
        state.emitted += 1;
        if self.repetition != 1.0 || self.presence != 0.0 || self.frequency != 0.0 {
            state.see(token, 1);
        }
        if let Some(grammar) = &mut state.grammar {
            grammar.advance(token)?;
        }
        Ok(state.logprobs.take())
    }

    /// Log probabilities of the token that comes next, told by whoever sampled it.
    pub fn tell_logprobs(&self, logprobs: Option<TokenLogprobs>) {
        self.state().logprobs = logprobs;
    }

    /// Why the last sampling found no candidate, if the grammar is why.
    pub fn take_error(&self) -> Option<GrammarError> {
        self.state().error.take()
    }

    /// Whether logits change at all.
    pub(super) fn changes_logits(&self) -> bool {
        let state = self.state();
        !self.bias.is_empty() || !state.seen.is_empty() || state.emitted < self.min_tokens || state.grammar.is_some()
    }

    /// Steps 2 to 5 of the module, in place.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        let mut state = self.state();
        state.error = None;
        for (token, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        for seen in &state.seen {
            if let Some(logit) = logits.get_mut(seen.token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / self.repetition
                } else {
                    *logit * self.repetition
                };
                if seen.emitted > 0 {
                    *logit -= self.frequency * seen.emitted as f32 + self.presence;
                }
            }
        }
        let held_back = state.emitted < self.min_tokens;
        let mut stops = Vec::new();
        if held_back {
            for token in &self.stop_token_ids {
                if let Some(logit) = logits.get_mut(*token as usize) {
                    stops.push((*token as usize, std::mem::replace(logit, f32::NEG_INFINITY)));
                }
            }
        }
        let State { grammar, error, .. } = &mut *state;
        let Some(grammar) = grammar else { return };
        if let Err(why) = grammar.apply(logits) {
            *error = Some(why);
            logits.fill(f32::NEG_INFINITY);
            return;
        }
        if held_back && vocab::largest(logits) == f32::NEG_INFINITY {
            // Nothing but its end may follow: a sequence must not die of both wishes. Last first, should one be named twice.
            for (token, logit) in stops.into_iter().rev() {
                logits[token] = logit;
            }
            if let Err(why) = grammar.apply(logits) {
                *error = Some(why);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A state is whole between its statements; nothing in them panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn see(&mut self, token: u32, times: u32) {
        let seen = &mut self.seen;
        let at = *self.index.entry(token).or_insert_with(|| {
            seen.push(Seen { token, emitted: 0 });
            seen.len() - 1
        });
        seen[at].emitted = seen[at].emitted.saturating_add(times);
    }
}

fn bias(wire: &[worker::LogitBias], vocab_size: usize) -> Result<Vec<(u32, f32)>, SamplingError> {
    if wire.len() > LOGIT_BIAS_MAX {
        return Err(SamplingError::TooManyBiases(wire.len()));
    }
    wire.iter()
        .map(|worker::LogitBias { token_id, bias }| {
            if *token_id as usize >= vocab_size {
                return Err(SamplingError::BiasToken {
                    token: *token_id,
                    vocab_size,
                });
            }
            match bias.abs() <= LOGIT_BIAS_ABS_MAX {
                true => Ok((*token_id, *bias)),
                false => Err(SamplingError::Bias(*bias)),
            }
        })
        .collect()
}
