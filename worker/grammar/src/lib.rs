//! Structured output: what a grammar admits next, as a mask over a model's vocabulary.
//!
//! - [`vocabulary`]: the bytes of every token, from a model's `tokenizer.json`.
//! - [`compiler`]: grammars from the wire to matchers, within bounds, each distinct one once.
//! - [`matcher`]: the state of one sequence: read a token, tell what may follow.
//! - [`error`]: why a grammar is not taken, in a sentence for whoever sent it.
//!
//! The matching is llguidance's. This crate adds what a server needs around it: nothing that comes from the network can
//! panic, recurse without end, fetch anything, or use memory and time without a bound; and a sequence's masks depend on its
//! grammar and its tokens alone (promise P1). So matchers share nothing that one could use up for the other, and text that a
//! grammar forces is left to the model to split into tokens: no mask depends on where a replay began.
//!
//! Not here: threads, deadlines and queues (the worker's), what a mask does to logits besides (the engine's).
#![forbid(unsafe_code)]

pub mod compiler;
pub mod error;
pub mod matcher;
pub mod vocabulary;

pub use compiler::{COMPILE_STACK_BYTES, GrammarCompiler};
pub use error::{GrammarError, VocabularyError};
pub use matcher::TokenMatcher;
pub use vocabulary::Vocabulary;
