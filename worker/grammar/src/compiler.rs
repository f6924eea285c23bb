//! From a grammar on the wire to the matcher of a sequence, within bounds.
//!
//! Before llguidance sees it, a grammar is measured: bytes, nesting, JSON nodes. While it compiles, llguidance counts work and
//! size. What a distinct grammar came to, matcher or refusal, is kept, so that a thousand requests with one schema
//! compile it once, and a thousand with one bomb too. Each sequence gets a copy of its own of everything that
//! grows while it is used.
//!
//! Compiling blocks, up to a second or so at the limits; the caller chooses the thread, gives it a stack of
//! [`COMPILE_STACK_BYTES`], and a deadline.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use baton_proto::limits::GRAMMAR_BYTES_MAX;
use baton_proto::worker::Grammar;
use baton_proto::worker::grammar::Kind;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use quick_cache::sync::Cache;
use serde_json::{Value as Json, json};

use crate::error::{GrammarError, VocabularyError, detail};
use crate::matcher::TokenMatcher;
use crate::vocabulary::Vocabulary;

/// Stack for [`GrammarCompiler::matcher`]. llguidance goes down about 3 KiB for each level of schemas nested by references,
/// regular expressions 250 levels deep included; this is an order of magnitude more, and only what is touched costs.
pub const COMPILE_STACK_BYTES: usize = 64 << 20;

/// Deepest nesting of brackets. Schemas people write have 20 levels; parsers recurse by level.
const NESTING_MAX: usize = 100;

/// Most values in a schema. The largest published ones (FHIR) have about 100,000.
const SCHEMA_NODES_MAX: usize = 100_000;

/// Distinct grammars kept, refusals included. One takes from some 10 KiB to a few MiB.
const KEPT_MAX: usize = 128;

/// Whitespace between JSON tokens: a line break and indentation, but no endless run of blanks, which is what a model
/// that has lost its way likes best.
const JSON_WHITESPACE: &str = r"[ \n\r\t]{1,40}";

/// llguidance's word for a grammar after which no token can come.
const NO_TEXT: &str = "NoExtensionBias";

/// What llguidance may use; half of its own limits or less, which are for one user's machine.
fn limits() -> ParserLimits {
    ParserLimits {
        // Branches alive at one byte: beyond a few hundred a grammar is ambiguous, and every token pays for it.
        max_items_in_row: 1000,
        // Compiling its regular expressions, at about 50,000 a millisecond: 20 ms. FHIR takes half of it.
        initial_lexer_fuel: 1_000_000,
        // One mask, at about 14,000 a millisecond: 7 ms, a bound for what one sequence can take from a step's others.
        step_lexer_fuel: 100_000,
        step_max_items: 50_000,
        // One to two KiB each, for each sequence: 40 MiB.
        max_lexer_states: 20_000,
        // Symbols, some 100 bytes each.
        max_grammar_size: 250_000,
        precompute_large_lexemes: true,
        // The client knows its grammar, and the text so far.
        verbose_errors: false,
    }
}

type Kept = Result<Arc<Mutex<Matcher>>, GrammarError>;

/// Makes matchers over one vocabulary.
pub struct GrammarCompiler {
    factory: ParserFactory,
    vocabulary: Vocabulary,
    kept: Cache<[u8; 32], Kept>,
}

impl GrammarCompiler {
    /// A compiler that has seen nothing. Takes about a second for 128,000 tokens.
    ///
    /// # Errors
    /// llguidance cannot use the vocabulary.
    pub fn new(vocabulary: Vocabulary) -> Result<Self, VocabularyError> {
        let made = catch_unwind(AssertUnwindSafe(|| ParserFactory::new_simple(vocabulary.env())));
        let unusable = |error: &dyn std::fmt::Display| VocabularyError::Unusable(detail(error));
        let mut factory = made
            .map_err(|_| unusable(&"its tokens cannot be sorted"))?
            .map_err(|error| unusable(&error))?;
        *factory.limits_mut() = limits();
        factory.quiet();
        Ok(Self {
            factory,
            vocabulary,
            kept: Cache::new(KEPT_MAX),
        })
    }

    /// The vocabulary it was made for.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// A matcher that has read nothing. Blocks; see the module for the stack it needs. Callers with the same grammar
    /// wait for the first of them.
    ///
    /// # Errors
    /// What is wrong with the grammar, for whoever sent it.
    pub fn matcher(&self, grammar: &Grammar) -> Result<TokenMatcher, GrammarError> {
        let kind = kind(grammar)?;
        let kept = self.kept.get_or_insert_with(&key(kind), || {
            let compiled = catch_unwind(AssertUnwindSafe(|| self.compile(kind)));
            let compiled = compiled.unwrap_or_else(|_| Err(GrammarError::Invalid("it cannot be compiled".to_owned())));
            Ok::<_, std::convert::Infallible>(compiled.map(|matcher| Arc::new(Mutex::new(matcher))))
        });
        let Ok(kept) = kept;
        let template = kept?;
        self.copy(&template)
    }

    /// The same, if that grammar was seen before; never compiles.
    ///
    /// # Errors
    /// As of [`matcher`](Self::matcher).
    pub fn known(&self, grammar: &Grammar) -> Option<Result<TokenMatcher, GrammarError>> {
        let kind = match kind(grammar) {
            Ok(kind) => kind,
            Err(error) => return Some(Err(error)),
        };
        let kept = self.kept.get(&key(kind))?;
        Some(kept.and_then(|template| self.copy(&template)))
    }

    fn copy(&self, template: &Mutex<Matcher>) -> Result<TokenMatcher, GrammarError> {
        let template = template.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(TokenMatcher::new(template.deep_clone(), self.vocabulary.eos_ids()))
    }

    fn compile(&self, kind: &Kind) -> Result<Matcher, GrammarError> {
        let grammar = match kind {
            Kind::JsonSchema(schema) => TopLevelGrammar::from_json_schema(json_schema(schema)?),
            Kind::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Kind::Lark(lark) => {
                check_nesting(lark)?;
                TopLevelGrammar::from_lark(lark.clone())
            }
        };
        let parser = self.factory.create_parser(grammar);
        let mut matcher = Matcher::new(parser);
        if let Some(error) = matcher.get_error() {
            return Err(GrammarError::Invalid(explain(&detail(&error))));
        }
        // The first mask is the largest as a rule. Whoever copies this matcher has its lexer's states already.
        match matcher.compute_mask_or_eos() {
            Ok(_) => Ok(matcher),
            Err(error) if error.to_string().contains(NO_TEXT) => {
                Err(GrammarError::Invalid("it admits no text at all".to_owned()))
            }
            Err(error) => Err(GrammarError::TooComplex(detail(&error))),
        }
    }
}

fn kind(grammar: &Grammar) -> Result<&Kind, GrammarError> {
    let empty = || GrammarError::Invalid("it is empty, or of a kind that this version does not know".to_owned());
    let kind = grammar.kind.as_ref().ok_or_else(empty)?;
    let (Kind::JsonSchema(text) | Kind::Regex(text) | Kind::Lark(text)) = kind;
    if text.is_empty() {
        return Err(empty());
    }
    if text.len() > GRAMMAR_BYTES_MAX {
        return Err(GrammarError::TooLarge(format!(
            "{} bytes; at most {GRAMMAR_BYTES_MAX} are taken",
            text.len()
        )));
    }
    Ok(kind)
}

fn key(kind: &Kind) -> [u8; 32] {
    let (tag, text) = match kind {
        Kind::JsonSchema(text) => (b'j', text),
        Kind::Regex(text) => (b'r', text),
        Kind::Lark(text) => (b'l', text),
    };
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[tag]).update(text.as_bytes());
    *hasher.finalize().as_bytes()
}

fn json_schema(text: &str) -> Result<Json, GrammarError> {
    // serde_json itself stops at 128 levels.
    let mut schema: Json =
        serde_json::from_str(text).map_err(|error| GrammarError::Invalid(format!("the schema is no JSON: {error}")))?;
    let nodes = nodes(&schema, 0)?;
    if nodes > SCHEMA_NODES_MAX {
        return Err(GrammarError::TooLarge(format!(
            "a schema of {nodes} values; at most {SCHEMA_NODES_MAX} are taken"
        )));
    }
    if let Some(schema) = schema.as_object_mut() {
        // llguidance's options come in the schema itself. How strict it is does not become the client's choice: with
        // `lenient` it would promise what it does not keep.
        schema.insert("x-guidance".to_owned(), json!({"whitespace_pattern": JSON_WHITESPACE}));
    }
    Ok(schema)
}

/// The library's words where they are of its own options.
fn explain(message: &str) -> String {
    if message.contains("oneOf constraints are not supported") {
        return "oneOf is taken only where no two of its options admit the same value; use anyOf".to_owned();
    }
    if message.contains("$ref's (#/...)") {
        return "a $ref must point into the schema itself, as in \"#/$defs/name\"; nothing is fetched".to_owned();
    }
    message.to_owned()
}

fn nodes(value: &Json, depth: usize) -> Result<usize, GrammarError> {
    if depth > NESTING_MAX {
        return Err(too_deep());
    }
    let mut count = 1;
    match value {
        Json::Array(items) => {
            for item in items {
                count += nodes(item, depth + 1)?;
            }
        }
        Json::Object(fields) => {
            for field in fields.values() {
                count += nodes(field, depth + 1)?;
            }
        }
        _ => {}
    }
    Ok(count)
}

/// Counts brackets wherever they stand, in strings too: who needs a hundred open ones there can escape them otherwise.
fn check_nesting(lark: &str) -> Result<(), GrammarError> {
    let mut depth = 0usize;
    for byte in lark.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > NESTING_MAX {
            return Err(too_deep());
        }
    }
    Ok(())
}

fn too_deep() -> GrammarError {
    GrammarError::TooLarge(format!("it is nested more than {NESTING_MAX} levels deep"))
}
