//! Tells a worker that hangs from one that is slow, for whoever has requests on an `Attach` stream: a coordinator that
//! waits for tokens, a decode worker that waits for KV blocks. No sockets, tasks or clock; milliseconds are passed in.
//!
//! A connection says little: a stopped process keeps its TCP connections, and a cut cable resets none. What tells is
//! what the worker owes next, held against what is heard from it. A [`Vitals`] per stream keeps what the worker says of
//! itself ([`Pulse`]s, which come while requests are open, and any other message); a [`Watch`] per attempt keeps what
//! that attempt has got.
//!
//! ```text
//!             placed            pulse names it           token, or bytes landed
//!   (none) ───────────▶ sent ───────────────────▶ taken ───────────────────────▶ started ──┐ each further one
//!                         │                          │                              │  ▲────┘
//!                         ▼                          ▼                              ▼
//!            NotTaken after 3 s           Stalled: no engine step ends for 8 × its longest recent one (3 to 60 s)
//!            without a step               Overdue: steps end, none for us: see `overdue_after_ms`
//!                         └──────────────── Silent: nothing at all for four pulses (1 s at least) ─┘
//! ```
//!
//! - **Silent** is a stopped process, a dead host, a cut network. Pulses come from another thread than steps do, so a
//!   worker that is merely overloaded pulses on.
//! - **Stalled** is an engine that hangs while the process lives. Waiting for a transfer is not stalling: the worker has
//!   its own watch on that, which is bounded.
//! - **Overdue** is the documented maximum for a worker that lives and steps, and never comes to us.
//!
//! If this process stood still itself, the silence was our deafness: time between two looks counts for no more than
//! [`LOOK_EVERY_MS`] once it exceeds [`DEAF_MS`].
//!
//! Deliberately not here: what happens after a verdict (the request's owner goes on elsewhere, or computes itself).
#![forbid(unsafe_code)]

use baton_proto::worker::Pulse;

/// How often a worker pulses on a stream with open requests. Four a second cost nothing and find a silent worker in
/// about a second.
pub const PULSE_INTERVAL_MS: u32 = 250;
/// How often [`Vitals::look`] is to be called: adds at most this to every deadline.
pub const LOOK_EVERY_MS: u64 = 100;
/// A gap between two looks beyond this is a pause of our own.
pub const DEAF_MS: u64 = 300;
/// Pulses that may be missing. One is jitter, two are a retransmission.
const PULSES_MISSED_MAX: u64 = 4;
/// Least silence that counts, whatever the interval: a retransmission timeout and its first doubling, and what a busy
/// machine may keep a thread waiting.
const SILENCE_MIN_MS: u64 = 1000;
/// Time to take a request off the stream while no step ends either. The stream is ordered and takes microseconds.
const TAKE_MAX_MS: u64 = 3000;
/// How much longer than the longest recent step one may take: a prompt beside which no stream runs takes a whole chunk,
/// some times a usual step.
const STEP_FACTOR: u64 = 8;
/// Bounds of the stall limit: below, what a busy machine adds to a step of milliseconds; above, the largest chunk on a slow
/// machine. The upper one holds too while nothing was measured yet.
const STALL_MS: (u64, u64) = (3_000, 60_000);
/// The first token may take this many times what queue and prompt take at the measured rate.
const FIRST_FACTOR: u64 = 20;
/// Bounds of the wait for the first token on a worker that steps on; the upper one is the maximum there is.
const FIRST_MS: (u64, u64) = (120_000, 600_000);
/// The next token may take this many of the longest recent steps: a sequence can be preempted and queue again.
const NEXT_STEPS: u64 = 1000;
/// Bounds of the wait for the next token on a worker that steps on.
const NEXT_MS: (u64, u64) = (30_000, 120_000);

/// Why an attempt is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Hang {
    /// Nothing is heard.
    #[error("nothing was heard from the worker for {ms} ms")]
    Silent {
        /// For how long.
        ms: u64,
    },
    /// The request is not taken off the stream, and nothing else is done.
    #[error("the worker did not take the request in {ms} ms")]
    NotTaken {
        /// Since it was sent.
        ms: u64,
    },
    /// The process lives, its engine ends no step.
    #[error("the worker's engine has ended no step for {ms} ms")]
    Stalled {
        /// For how long.
        ms: u64,
    },
    /// The engine steps, and nothing comes of it for this attempt.
    #[error("the worker works, but brought this request nothing in {ms} ms")]
    Overdue {
        /// Since the last thing it brought.
        ms: u64,
    },
}

/// What one stream says of the worker at its other end.
#[derive(Debug)]
pub struct Vitals {
    /// Silence that counts; `None` for a worker that does not pulse.
    silence_ms: Option<u64>,
    looked_ms: u64,
    /// Time that does not count, because nobody listened.
    deaf_ms: u64,
    /// On our clock, as every time below: see [`clock`](Self::clock).
    heard_ms: u64,
    progressed_ms: u64,
    pulse: Pulse,
}

impl Vitals {
    /// A stream that has just been greeted; the greeting says how often the worker pulses, 0 for never.
    pub fn new(pulse_interval_ms: u32, now_ms: u64) -> Self {
        let interval = u64::from(pulse_interval_ms);
        Self {
            silence_ms: (interval > 0).then(|| (PULSES_MISSED_MAX * interval).max(SILENCE_MIN_MS)),
            looked_ms: now_ms,
            deaf_ms: 0,
            heard_ms: now_ms,
            progressed_ms: now_ms,
            pulse: Pulse::default(),
        }
    }

    /// Any message came, or the stream had been idle until now, so that none was due.
    pub fn heard(&mut self, now_ms: u64) {
        self.heard_ms = self.clock(now_ms);
    }

    /// A pulse came.
    pub fn pulse(&mut self, pulse: Pulse, now_ms: u64) {
        self.heard(now_ms);
        if pulse.steps_total != self.pulse.steps_total {
            self.progressed_ms = self.heard_ms;
        }
        self.pulse = pulse;
    }

    /// To be called every [`LOOK_EVERY_MS`], before the watches are checked.
    pub fn look(&mut self, now_ms: u64) {
        let gap = now_ms.saturating_sub(self.looked_ms);
        self.looked_ms = now_ms;
        if gap > DEAF_MS {
            self.deaf_ms += gap - LOOK_EVERY_MS;
        }
    }

    /// Whether nothing has been heard for too long. Meaningful while requests are open.
    pub fn is_silent(&self, now_ms: u64) -> bool {
        self.silent_since(self.heard_ms, now_ms).is_some()
    }

    fn silent_since(&self, since_ms: u64, now_ms: u64) -> Option<u64> {
        let ms = self.clock(now_ms).saturating_sub(since_ms);
        self.silence_ms.is_some_and(|limit| ms >= limit).then_some(ms)
    }

    /// Time as far as somebody listened.
    fn clock(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.deaf_ms)
    }

    /// How long the engine may go without ending a step.
    fn stalled_after_ms(&self) -> u64 {
        match self.pulse.steps_total {
            0 => STALL_MS.1,
            _ => (STEP_FACTOR * self.step_ms_max()).clamp(STALL_MS.0, STALL_MS.1),
        }
    }

    fn step_ms_max(&self) -> u64 {
        u64::from(self.pulse.step_us_max).div_ceil(1000)
    }
}

/// One attempt on a worker.
#[derive(Debug)]
pub struct Watch {
    id: u64,
    prompt_tokens: u64,
    placed_ms: u64,
    /// When it last got something.
    got_ms: u64,
    started: bool,
}

impl Watch {
    /// Request `id` is being sent; so many tokens are to be computed before it can bring anything.
    pub fn new(vitals: &Vitals, id: u64, prompt_tokens: usize, now_ms: u64) -> Self {
        let now_ms = vitals.clock(now_ms);
        Self {
            id,
            prompt_tokens: prompt_tokens as u64,
            placed_ms: now_ms,
            got_ms: now_ms,
            started: false,
        }
    }

    /// Tokens came, or bytes landed.
    pub fn got(&mut self, vitals: &Vitals, now_ms: u64) {
        self.got_ms = vitals.clock(now_ms);
        self.started = true;
    }

    /// Whether the attempt is to be given up.
    pub fn check(&self, vitals: &Vitals, now_ms: u64) -> Option<Hang> {
        let since = |at: u64| vitals.clock(now_ms).saturating_sub(at);
        let alive_ms = vitals.heard_ms.max(self.got_ms);
        if let Some(ms) = vitals.silent_since(alive_ms, now_ms) {
            return Some(Hang::Silent { ms });
        }
        // The rest is judged by pulses.
        vitals.silence_ms?;
        let stood_ms = since(vitals.progressed_ms.max(self.got_ms));
        let taken = self.started || vitals.pulse.taken >= self.id;
        if !taken && stood_ms.min(since(self.placed_ms)) >= TAKE_MAX_MS {
            return Some(Hang::NotTaken {
                ms: since(self.placed_ms),
            });
        }
        if taken && vitals.pulse.transferring == 0 && stood_ms >= vitals.stalled_after_ms() {
            return Some(Hang::Stalled { ms: stood_ms });
        }
        let ms = since(self.got_ms);
        (ms >= self.overdue_after_ms(vitals)).then_some(Hang::Overdue { ms })
    }

    /// The longest wait while the worker lives and steps.
    fn overdue_after_ms(&self, vitals: &Vitals) -> u64 {
        if self.started {
            return (NEXT_STEPS * vitals.step_ms_max()).clamp(NEXT_MS.0, NEXT_MS.1);
        }
        let rate = f64::from(vitals.pulse.prefill_tokens_per_s);
        if rate <= 0.0 {
            return FIRST_MS.1;
        }
        let tokens = self.prompt_tokens.saturating_add(vitals.pulse.pending_prompt_tokens) as f64;
        // A cast from float saturates.
        let expected_ms = (tokens / rate * 1000.0) as u64;
        FIRST_FACTOR.saturating_mul(expected_ms).clamp(FIRST_MS.0, FIRST_MS.1)
    }
}

#[cfg(test)]
mod tests;
