//! Why there is no mask. Messages go to clients: they name what to change and nothing of this machine.

use thiserror::Error;

/// Longest part of a library's message that is passed on. A parser may quote the whole grammar.
const DETAIL_BYTES_MAX: usize = 400;

/// A grammar that is not taken, or cannot be followed further. The same everywhere: no other worker would do better.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum GrammarError {
    /// It does not compile.
    #[error("the grammar is not usable: {0}")]
    Invalid(String),
    /// It is larger or deeper than is taken.
    #[error("the grammar is too large: {0}")]
    TooLarge(String),
    /// Following it takes more work than a token may cost.
    #[error("the grammar is too complex to be followed: {0}; make it less ambiguous or its repetitions shorter")]
    TooComplex(String),
    /// A token was read that the grammar does not admit.
    #[error("token {0} is not what the grammar admits")]
    NotAdmitted(u32),
}

/// A model whose tokens' text is not known, so that no grammar can be followed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum VocabularyError {
    /// The file is missing or unreadable.
    #[error("the model's tokenizer.json cannot be read: {0}")]
    Read(String),
    /// It is no tokenizer, or one whose tokens are not pieces of text.
    #[error("the model's tokenizer cannot be used for grammars: {0}")]
    Unusable(String),
}

/// One line of a library's message.
pub(crate) fn detail(error: &dyn std::fmt::Display) -> String {
    // With `{:#}` anyhow tells all causes; some are on lines of their own, and a caught panic brings its backtrace.
    let text = format!("{error:#}");
    let text = text.split("\n<backtrace>").next().unwrap_or_default();
    let mut line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.len() > DETAIL_BYTES_MAX {
        let end = (0..=DETAIL_BYTES_MAX).rev().find(|at| line.is_char_boundary(*at));
        line.truncate(end.unwrap_or(0));
        line.push('…');
    }
    line
}
