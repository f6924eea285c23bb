//! The grammar state of one sequence: a function of the grammar and the tokens read, so it is rebuilt anywhere by reading
//! them again.
//!
//! A mask is computed once for each state, by whoever asks first; it may be asked for as soon as the token before is
//! known, long before there are logits.

use llguidance::Matcher;
use toktrie::SimpleVob;

use crate::error::{GrammarError, detail};

/// See the module.
pub struct TokenMatcher {
    matcher: Matcher,
    /// Of the present state, once asked for.
    mask: Option<SimpleVob>,
    eos_ids: Box<[u32]>,
}

impl std::fmt::Debug for TokenMatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenMatcher")
            .field("stop_reason", &self.matcher.stop_reason())
            .finish_non_exhaustive()
    }
}

impl TokenMatcher {
    pub(crate) fn new(matcher: Matcher, eos_ids: &[u32]) -> Self {
        Self {
            matcher,
            mask: None,
            eos_ids: eos_ids.into(),
        }
    }

    /// Reads a token. One that ends the text is taken where the text may end, and again after that.
    ///
    /// # Errors
    /// The grammar does not admit it; or reading it takes too much work. Nothing is admitted from then on.
    pub fn advance(&mut self, token: u32) -> Result<(), GrammarError> {
        self.mask = None;
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return match self.eos_ids.contains(&token) {
                true => Ok(()),
                false => Err(GrammarError::NotAdmitted(token)),
            };
        }
        match self.matcher.try_consume_tokens(&[token]) {
            Ok(1) => Ok(()),
            Ok(_) => Err(GrammarError::NotAdmitted(token)),
            Err(error) => Err(GrammarError::TooComplex(detail(&error))),
        }
    }

    /// Computes the mask of the present state, unless it is there.
    ///
    /// # Errors
    /// It takes too much work, or no token of the vocabulary can go on.
    pub fn prepare(&mut self) -> Result<(), GrammarError> {
        if self.mask.is_none() {
            let mask = self.matcher.compute_mask_or_eos();
            self.mask = Some(mask.map_err(|error| GrammarError::TooComplex(detail(&error)))?);
        }
        Ok(())
    }

    /// Whether the text may end here.
    pub fn may_end(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false)
    }

    /// Whether the text is whole and nothing but its end may follow.
    pub fn is_over(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }

    /// Makes every token that is not admitted no candidate (-inf), those beyond the vocabulary included.
    ///
    /// # Errors
    /// As of [`prepare`](Self::prepare).
    pub fn apply(&mut self, logits: &mut [f32]) -> Result<(), GrammarError> {
        self.prepare()?;
        let Some(mask) = &self.mask else { return Ok(()) };
        let words = mask.as_slice();
        for (at, logits) in logits.chunks_mut(u32::BITS as usize).enumerate() {
            match words.get(at).copied().unwrap_or(0) {
                u32::MAX => {}
                0 => logits.fill(f32::NEG_INFINITY),
                word => {
                    for (bit, logit) in logits.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Tokens admitted now, in order of id.
    ///
    /// # Errors
    /// As of [`prepare`](Self::prepare).
    pub fn admitted(&mut self) -> Result<Vec<u32>, GrammarError> {
        self.prepare()?;
        Ok(self.mask.as_ref().map(SimpleVob::to_list).unwrap_or_default())
    }
}
