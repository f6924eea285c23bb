//! From a request in neutral terms to a stream of neutral events: what every endpoint that generates text is built on.
//! Chat completions are the first renderer of it; completions, responses, messages and the rest are others.
//!
//! ```text
//!  HTTP request ─▶ intake ─▶ Received ─▶ parse (the endpoint's) ─▶ GenerationRequest ─▶ prepare ─▶ Prepared
//!                                                                                                    │ start: hold, place
//!     whole JSON ◀─ answer::whole ◀─ Collected ◀─┐                                                   ▼
//!                                                ├── Run ◀── Sequence (one per choice) ◀── Generation (backend)
//!     SSE frames ◀─ answer::streamed ◀─ Render ◀─┘    ╰─ settle: exactly one usage record
//! ```
//!
//! An endpoint is three things and no more:
//!
//! 1. a **parse** function, bytes to [`GenerationRequest`](request::GenerationRequest) and whatever of its own it needs later. It runs where
//!    it may take its time (long bodies on a thread that may block);
//! 2. a **whole answer**, from [`Collected`](output::Collected) to JSON;
//! 3. a [`Render`](stream::Render), from [`Piece`](output::Piece)s to server-sent events.
//!
//! [`intake::receive`] and [`start::start`] do what lies between: limits of body, memory and requests in work; the model and who
//! may use it; template, tokens and room in the context; grammar, tools and reasoning; budgets; placing; and, in
//! [`run::Run`], the end of it all. A request without HTTP (a batch's line) begins with [`intake::Received`].
//!
//! # Invariants
//!
//! - A request has `prompts × n` **choices**; choice `p·n + i` is the `i`-th of prompt `p`, and its seed is `seed + i`. They are
//!   placed together, fail together (one that fails cancels the others) and are settled as **one** record: every prompt
//!   counted once, completions summed.
//! - Pieces of one choice come in order. The joined deltas do not depend on how the cluster cut the tokens into steps: each
//!   token is read by itself. No delta splits a character.
//! - Nobody is told that a choice has ended before the record is durable: ends come with
//!   [`Outcome`](output::Outcome), after the last piece of the last choice.
//! - Dropping any of these, in any phase, cancels what runs and settles what was delivered.
//!
//! Deliberately not here: JSON of any endpoint, HTTP routes, who pays (`accounts`), what the cluster does (`backend`).

pub(crate) mod answer;
pub(crate) mod draft;
pub(crate) mod intake;
pub(crate) mod output;
pub(crate) mod prepare;
pub(crate) mod request;
pub(crate) mod run;
pub(crate) mod sequence;
pub(crate) mod start;
pub(crate) mod stream;
