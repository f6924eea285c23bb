//! Stop strings over a stream of text pieces: text that may still turn out to begin a stop string is held back. Knows
//! nothing of tokens.
//!
//! The result does not depend on how the text is cut into pieces: the stop that is complete first wins, and of several
//! complete at once the one that began first. A stop string itself is shown only where that was asked for.

/// Watches for stop strings.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    /// The stop string is shown too.
    include: bool,
    held: String,
}

/// What may be shown after a piece.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// Text to show; more may come.
    Text(String),
    /// Last text to show, up to where this stop string began (or with it); the rest is to be thrown away.
    Stopped(String, String),
}

impl StopMatcher {
    /// Empty stop strings are ignored.
    pub fn new(stops: Vec<String>, include: bool) -> Self {
        Self {
            stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(),
            include,
            held: String::new(),
        }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> Shown {
        if self.stops.is_empty() {
            return Shown::Text(piece.to_owned());
        }
        self.held.push_str(piece);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at, stop)))
            .min();
        if let Some((end, start, stop)) = first {
            let stop = stop.clone();
            self.held.truncate(if self.include { end } else { start });
            return Shown::Stopped(std::mem::take(&mut self.held), stop);
        }
        let keep = self
            .stops
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Shown::Text(std::mem::replace(&mut self.held, rest))
    }

    /// The text is over: what was held back is shown.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest end of `text` that begins `stop` without completing it.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|&len| stop.is_char_boundary(len) && text.as_bytes().ends_with(&stop.as_bytes()[..len]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The whole text's answer: shown text, and whether it was stopped.
    fn oracle(text: &str, stops: &[String]) -> (String, bool) {
        for end in (1..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let begun = stops
                .iter()
                .filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
            if let Some(longest) = begun.map(String::len).max() {
                return (text[..end - longest].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    proptest! {
        #[test]
        fn equals_the_whole_text_however_it_is_cut(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
        ) {
            let (text, stopped) = oracle(&pieces.concat(), &stops);
            let mut matcher = StopMatcher::new(stops, false);
            let mut shown = String::new();
            let mut hit = false;
            for piece in &pieces {
                match matcher.push(piece) {
                    Shown::Text(more) => shown += &more,
                    Shown::Stopped(more, _) => {
                        shown += &more;
                        hit = true;
                        break;
                    }
                }
                prop_assert!(text.starts_with(&shown), "shown too early: {shown:?} of {text:?}");
            }
            if !hit {
                shown += &matcher.finish();
            }
            prop_assert_eq!((shown, hit), (text, stopped));
        }
    }

    #[test]
    fn nothing_is_held_without_need() {
        let mut matcher = StopMatcher::new(vec!["END".into()], false);
        assert_eq!(matcher.push("a E"), Shown::Text("a ".into()));
        assert_eq!(matcher.push("x"), Shown::Text("Ex".into()));
        assert_eq!(matcher.push("EN"), Shown::Text(String::new()));
        assert_eq!(matcher.push("D tail"), Shown::Stopped(String::new(), "END".into()));
    }

    #[test]
    fn a_stop_string_is_shown_if_asked_for() {
        let mut matcher = StopMatcher::new(vec!["END".into(), "ND".into()], true);
        assert_eq!(matcher.push("a E"), Shown::Text("a ".into()));
        assert_eq!(matcher.push("ND tail"), Shown::Stopped("END".into(), "END".into()));
    }
}
