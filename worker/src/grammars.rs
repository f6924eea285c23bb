//! Grammars of requests, compiled before the engine hears of them.
//!
//! A schema can take a second to compile, so it happens on a thread of its own, a few at a time, under a deadline; requests
//! without a grammar never come here, and other requests of the same stream do not wait. The tokenizer's vocabulary is
//! loaded with the first grammar: a worker that is never asked for one pays nothing.

use baton_engine::{AdmitError, SamplingError};
use baton_grammar::vocabulary::eos_ids;
use baton_grammar::{COMPILE_STACK_BYTES, GrammarCompiler, GrammarError, TokenMatcher, Vocabulary, VocabularyError};
use baton_proto::worker::Grammar;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OnceCell, Semaphore, oneshot};
use tokio::time::timeout;

/// Threads that compile at once. The engine needs the others; a grammar takes milliseconds as a rule, and is kept.
const COMPILES_MAX: usize = 2;

/// Longest wait for a turn, and then for the matcher. The largest grammars that the limits admit take one or two seconds; a
/// thread that is still busy goes on to its end, counts as one of [`COMPILES_MAX`], and what it finds is kept.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a request is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// A sentence for whoever sent the request.
    pub(crate) error: String,
    /// Another worker, or this one later, may take it.
    pub(crate) retryable: bool,
    /// The field that nobody can take as it is.
    pub(crate) invalid_field: Option<&'static str>,
}

impl Refusal {
    /// It may go elsewhere.
    pub(crate) fn elsewhere(error: impl Into<String>) -> Self {
        Self {
            error: error.into(),
            retryable: true,
            invalid_field: None,
        }
    }

    fn grammar(error: impl Into<String>) -> Self {
        Self {
            error: error.into(),
            retryable: false,
            invalid_field: Some("grammar"),
        }
    }
}

impl From<AdmitError> for Refusal {
    fn from(error: AdmitError) -> Self {
        Self {
            error: error.to_string(),
            retryable: error.retryable(),
            invalid_field: None,
        }
    }
}

impl From<SamplingError> for Refusal {
    fn from(error: SamplingError) -> Self {
        Self {
            error: error.to_string(),
            retryable: false,
            invalid_field: Some(error.field()),
        }
    }
}

/// See the module.
pub(crate) struct Grammars {
    /// Where the tokenizer is; `Err` says why this worker follows no grammars.
    model_path: Result<PathBuf, &'static str>,
    compiler: OnceCell<Result<Arc<GrammarCompiler>, String>>,
    permits: Arc<Semaphore>,
}

impl Grammars {
    pub(crate) fn new(model_path: Result<PathBuf, &'static str>) -> Self {
        Self {
            model_path,
            compiler: OnceCell::new(),
            permits: Arc::new(Semaphore::new(COMPILES_MAX)),
        }
    }

    /// The state of a sequence after `emitted` tokens.
    pub(crate) async fn matcher(&self, grammar: Grammar, emitted: Vec<u32>) -> Result<Box<TokenMatcher>, Refusal> {
        let busy = || Refusal::elsewhere("the worker is busy with other grammars");
        // The first one reads the vocabulary, and is not to be blamed for the time it takes.
        let compiler = self.compiler.get_or_init(|| self.load()).await.clone();
        let compiler = compiler.map_err(Refusal::grammar)?;
        let permit = timeout(COMPILE_TIMEOUT, self.permits.clone().acquire_owned()).await;
        let permit = permit.map_err(|_| busy())?.map_err(|_| busy())?;
        let (sender, matcher) = oneshot::channel();
        let compile = move || {
            let matcher = compiler.matcher(&grammar).and_then(|mut matcher| {
                emitted.iter().try_for_each(|token| matcher.advance(*token))?;
                Ok::<_, GrammarError>(Box::new(matcher))
            });
            drop(permit);
            let _ = sender.send(matcher);
        };
        let thread = std::thread::Builder::new()
            .name("grammar".into())
            .stack_size(COMPILE_STACK_BYTES);
        thread.spawn(compile).map_err(|_| busy())?;
        match timeout(COMPILE_TIMEOUT, matcher).await {
            Ok(Ok(matcher)) => matcher.map_err(|error| Refusal::grammar(error.to_string())),
            // The thread panicked.
            Ok(Err(_)) => Err(Refusal::grammar("the grammar cannot be compiled")),
            Err(_) => Err(Refusal::grammar(
                "the grammar takes too long to compile; make it smaller",
            )),
        }
    }

    async fn load(&self) -> Result<Arc<GrammarCompiler>, String> {
        let path = self.model_path.clone()?;
        let load = move || {
            let vocabulary = Vocabulary::load(&path, &eos_ids(&path))?;
            Ok::<_, VocabularyError>(Arc::new(GrammarCompiler::new(vocabulary)?))
        };
        let loaded = tokio::task::spawn_blocking(load).await;
        let loaded = loaded.map_err(|error| error.to_string())?;
        loaded.map_err(|error| {
            tracing::warn!(%error, "this worker follows no grammars");
            format!("this model cannot follow grammars: {error}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_proto::worker::grammar::Kind;

    fn regex(regex: &str) -> Grammar {
        Grammar {
            kind: Some(Kind::Regex(regex.to_owned())),
        }
    }

    #[tokio::test]
    async fn a_worker_without_a_vocabulary_says_so_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let grammars = Grammars::new(Ok(dir.path().to_owned()));
        for _ in 0..2 {
            let refusal = grammars.matcher(regex("a"), Vec::new()).await.unwrap_err();
            assert!(refusal.error.contains("tokenizer.json"), "{}", refusal.error);
            assert_eq!((refusal.retryable, refusal.invalid_field), (false, Some("grammar")));
        }
        let refusal = Grammars::new(Err("not here"))
            .matcher(regex("a"), Vec::new())
            .await
            .unwrap_err();
        assert_eq!(refusal.error, "not here");
    }
}
