//! Stop strings across token borders: text that may begin one is held back.

/// What a piece of text gave.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Checked {
    /// Text that is certain to belong to the answer.
    pub(crate) text: String,
    /// Which stop string ended the answer. Nothing may be pushed afterwards.
    pub(crate) matched: Option<usize>,
}

/// Watches a growing text for the first stop string. The result depends on the text alone, not on
/// the pieces that it arrives in: the match that is complete first wins, and of those that end at
/// the same character the longest.
#[derive(Debug, Clone)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    /// The tail of the text seen that may still become a stop string.
    held: String,
}

impl StopMatcher {
    /// `stops`: not empty strings. `include`: the matched string stays in the text.
    pub(crate) fn new(mut stops: Vec<String>, include: bool) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { stops, include, held: String::new() }
    }

    /// The stop string behind [`Checked::matched`].
    pub(crate) fn stop(&self, index: usize) -> &str {
        self.stops.get(index).map_or("", String::as_str)
    }

    /// Adds text and returns what may be shown.
    pub(crate) fn push(&mut self, text: &str) -> Checked {
        if self.stops.is_empty() {
            return Checked { text: text.to_owned(), matched: None };
        }
        for c in text.chars() {
            self.held.push(c);
            if let Some(index) = self.complete() {
                let stop = self.stops[index].len();
                let keep = if self.include { self.held.len() } else { self.held.len() - stop };
                self.held.truncate(keep);
                return Checked { text: std::mem::take(&mut self.held), matched: Some(index) };
            }
        }
        let shown = self.held.len() - self.may_begin();
        let tail = self.held.split_off(shown);
        Checked { text: std::mem::replace(&mut self.held, tail), matched: None }
    }

    /// Gives the held text when the answer ends for another reason.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The longest stop string that the held text ends with.
    fn complete(&self) -> Option<usize> {
        let ending = self.stops.iter().enumerate().filter(|(_, s)| self.held.ends_with(*s));
        ending.max_by_key(|(index, s)| (s.len(), usize::MAX - index)).map(|(index, _)| index)
    }

    /// Bytes at the end of the held text that are the beginning of some stop string.
    fn may_begin(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest.saturating_sub(1));
        (from..self.held.len())
            .filter(|&at| self.held.is_char_boundary(at))
            .find(|&at| self.stops.iter().any(|s| s.starts_with(&self.held[at..])))
            .map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let mut matcher =
            StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect(), include);
        let mut shown = String::new();
        for piece in pieces {
            let checked = matcher.push(piece);
            shown.push_str(&checked.text);
            if checked.matched.is_some() {
                return (shown, checked.matched);
            }
        }
        shown.push_str(&matcher.finish());
        (shown, None)
    }

    #[test]
    fn cuts_at_a_stop_that_spans_pieces() {
        assert_eq!(run(&["END"], false, &["some E", "N", "D more"]), ("some ".into(), Some(0)));
        assert_eq!(run(&["END"], true, &["some E", "N", "D more"]), ("some END".into(), Some(0)));
        assert_eq!(run(&["END"], false, &["some E", "N"]), ("some EN".into(), None));
        assert_eq!(run(&["aab"], false, &["a", "a", "a", "b"]), ("a".into(), Some(0)));
        assert_eq!(run(&["é\n", "\n"], false, &["caf", "é", "\n"]), ("caf".into(), Some(0)));
    }

    #[test]
    fn nothing_of_a_possible_stop_is_shown_early() {
        let mut matcher = StopMatcher::new(vec!["</s>".into()], false);
        assert_eq!(matcher.push("a</").text, "a");
        assert_eq!(matcher.push("s").text, "");
        assert_eq!(matcher.push("x").text, "</sx");
    }

    proptest! {
        /// The reference: scan the whole text for the match that ends first.
        #[test]
        fn equals_a_scan_of_the_whole_text(
            text in "[abc]{0,40}", stops in prop::collection::vec("[abc]{1,4}", 1..4),
            cuts in prop::collection::vec(1usize..5, 40), include: bool,
        ) {
            let mut first: Option<(usize, usize)> = None;
            for end in 1..=text.len() {
                let longest = stops.iter().filter(|s| text[..end].ends_with(*s)).map(String::len);
                if let Some(length) = longest.max() {
                    first = Some((end - length, end));
                    break;
                }
            }
            let expected = match first {
                Some((start, end)) => &text[..if include { end } else { start }],
                None => &text[..],
            };
            let mut pieces = Vec::new();
            let mut rest = &text[..];
            for cut in cuts {
                let (head, tail) = rest.split_at(cut.min(rest.len()));
                pieces.push(head);
                rest = tail;
            }
            pieces.push(rest);
            let names: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (shown, matched) = run(&names, include, &pieces);
            prop_assert_eq!(shown, expected);
            prop_assert_eq!(matched.is_some(), first.is_some());
        }
    }
}
