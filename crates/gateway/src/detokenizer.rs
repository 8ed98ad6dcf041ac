//! Token ids to text, one at a time, never splitting a character.
//!
//! The pieces put together equal the decoding of all ids at once, for valid and invalid bytes
//! alike, so that a streamed answer and a whole one hold the same text.

use std::sync::Arc;

use crate::tokenizer::{Decoding, Tokenizer};

/// A run of raw bytes longer than this is shown as far as it is valid, although a later invalid
/// byte would, decoding everything at once, replace the whole run.
const RUN_LIMIT: usize = 64;
/// Tokens that may wait for the rest of a character where only the library can decode.
const WINDOW_LIMIT: usize = 64;

/// Decodes one growing sequence of ids. Memory is bounded.
pub(crate) struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    state: State,
}

enum State {
    /// The beginning of a character, at most three bytes.
    Bytes { pending: Vec<u8> },
    /// Raw bytes since the last word; characters still to strip from the start of the text.
    Fallback { run: Vec<u8>, strip: Option<(char, usize)> },
    /// `ids[..read]` are shown already and give the later ones their context.
    Whole { ids: Vec<u32>, read: usize },
}

impl Detokenizer {
    /// `skip_special` leaves control tokens out of the text.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        let state = match *tokenizer.decoding() {
            Decoding::Bytes => State::Bytes { pending: Vec::new() },
            Decoding::Fallback { strip } => State::Fallback { run: Vec::new(), strip },
            Decoding::Whole => State::Whole { ids: Vec::new(), read: 0 },
        };
        Self { tokenizer, skip_special, state }
    }

    /// Adds an id; returns the text that is complete with it.
    pub(crate) fn push(&mut self, id: u32) -> String {
        let Some(word) = self.tokenizer.word(id) else { return String::new() };
        if self.skip_special && word.special {
            return String::new();
        }
        match &mut self.state {
            State::Bytes { pending } => {
                pending.extend_from_slice(&word.bytes);
                take_characters(pending)
            }
            State::Fallback { run, strip } => {
                let mut text = String::new();
                if word.raw_byte {
                    run.extend_from_slice(&word.bytes);
                    if run.len() >= RUN_LIMIT {
                        text = take_valid(run);
                    }
                } else {
                    text = take_run(run);
                    text.push_str(&String::from_utf8_lossy(&word.bytes));
                }
                strip_start(strip, text)
            }
            State::Whole { ids, read } => {
                ids.push(id);
                window(&self.tokenizer, ids, read, false)
            }
        }
    }

    /// Ends the sequence; returns what was waiting.
    pub(crate) fn finish(&mut self) -> String {
        match &mut self.state {
            State::Bytes { pending } => {
                let text = String::from_utf8_lossy(pending).into_owned();
                pending.clear();
                text
            }
            State::Fallback { run, strip } => {
                let text = take_run(run);
                strip_start(strip, text)
            }
            State::Whole { ids, read } => window(&self.tokenizer, ids, read, true),
        }
    }

    /// All ids at once, through the same steps.
    pub(crate) fn all(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip_special: bool) -> String {
        let mut this = Self::new(Arc::clone(tokenizer), skip_special);
        let mut text: String = ids.iter().map(|id| this.push(*id)).collect();
        text.push_str(&this.finish());
        text
    }
}

/// Takes whole characters and replaced invalid bytes; leaves the beginning of a character.
fn take_characters(pending: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut used = 0;
    for chunk in pending.utf8_chunks() {
        text.push_str(chunk.valid());
        used += chunk.valid().len();
        let invalid = chunk.invalid();
        if invalid.is_empty() {
            continue;
        }
        let incomplete = std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
        if used + invalid.len() == pending.len() && incomplete {
            break;
        }
        text.push(char::REPLACEMENT_CHARACTER);
        used += invalid.len();
    }
    pending.drain(..used);
    text
}

/// Takes a run of raw bytes: its text where it is valid as a whole, else one replacement per byte.
fn take_run(run: &mut Vec<u8>) -> String {
    let bytes = std::mem::take(run);
    String::from_utf8(bytes).unwrap_or_else(|e| {
        std::iter::repeat_n(char::REPLACEMENT_CHARACTER, e.as_bytes().len()).collect()
    })
}

/// Takes the valid beginning of a long run; of a run that begins invalid, all of it.
fn take_valid(run: &mut Vec<u8>) -> String {
    let valid = match std::str::from_utf8(run) {
        Ok(text) => text.len(),
        Err(e) => e.valid_up_to(),
    };
    if valid == 0 {
        return take_run(run);
    }
    let rest = run.split_off(valid);
    take_run(&mut std::mem::replace(run, rest))
}

/// Strips up to so many of a character from the start of a text that comes in pieces.
fn strip_start(strip: &mut Option<(char, usize)>, text: String) -> String {
    let mut rest = text.as_str();
    while let Some((content, left)) = *strip {
        let Some(first) = rest.chars().next() else { break };
        if first != content || left == 0 {
            *strip = None;
            break;
        }
        *strip = Some((content, left - 1));
        rest = &rest[first.len_utf8()..];
    }
    rest.to_owned()
}

/// What the unread ids add to the text of the read ones before them.
fn window(tokenizer: &Tokenizer, ids: &mut Vec<u32>, read: &mut usize, end: bool) -> String {
    let before = tokenizer.decode(&ids[..*read], false);
    let after = tokenizer.decode(ids, false);
    let added = after.get(before.len()..).unwrap_or("");
    let waits = added.is_empty() || added.ends_with(char::REPLACEMENT_CHARACTER);
    if waits && !end && ids.len() - *read < WINDOW_LIMIT {
        return String::new();
    }
    let added = added.to_owned();
    ids.drain(..*read);
    *read = ids.len();
    added
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BYTE_LEVEL: &[u8] = include_bytes!("../tests/fixtures/byte_level.json");
    const BYTE_FALLBACK: &[u8] = include_bytes!("../tests/fixtures/byte_fallback.json");

    fn pieces(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip: bool) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), skip);
        let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        pieces.push(detokenizer.finish());
        pieces
    }

    fn load(json: &[u8]) -> Arc<Tokenizer> {
        Arc::new(Tokenizer::new(json).expect("the fixture is a tokenizer"))
    }

    #[test]
    fn a_character_over_several_tokens_comes_whole() {
        for json in [BYTE_LEVEL, BYTE_FALLBACK] {
            let tokenizer = load(json);
            let ids = tokenizer.encode("é日🙂x", false).expect("encodes");
            assert!(ids.len() > 6, "the fixture spells these in bytes");
            let pieces = pieces(&tokenizer, &ids, true);
            assert!(pieces.iter().all(|p| !p.contains(char::REPLACEMENT_CHARACTER)));
            assert_eq!(pieces.concat(), "é日🙂x");
        }
    }

    #[test]
    fn decoders_are_recognised() {
        assert_eq!(*load(BYTE_LEVEL).decoding(), Decoding::Bytes);
        let strip = Some((' ', 1));
        assert_eq!(*load(BYTE_FALLBACK).decoding(), Decoding::Fallback { strip });
    }

    #[test]
    fn a_long_run_of_bytes_does_not_wait_for_its_end() {
        let tokenizer = load(BYTE_FALLBACK);
        let text = "日".repeat(60);
        let ids = tokenizer.encode(&text, false).expect("encodes");
        let pieces = pieces(&tokenizer, &ids, true);
        assert!(pieces[..ids.len() / 2].iter().any(|piece| !piece.is_empty()));
        assert_eq!(pieces.concat(), text);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn pieces_equal_decoding_at_once(
            ids in prop::collection::vec(0u32..520, 0..80), skip: bool, level: bool,
        ) {
            let tokenizer = load(if level { BYTE_LEVEL } else { BYTE_FALLBACK });
            prop_assert_eq!(
                pieces(&tokenizer, &ids, skip).concat(),
                tokenizer.decode(&ids, skip)
            );
        }

        /// The library's way, used for decoders that are not understood here, on valid text.
        #[test]
        fn window_equals_decoding_at_once(text in "[a-z é日🙂]{0,40}", level: bool) {
            let json = if level { BYTE_LEVEL } else { BYTE_FALLBACK };
            let mut tokenizer = Tokenizer::new(json).expect("the fixture is a tokenizer");
            let ids = tokenizer.encode(&text, false).expect("encodes");
            tokenizer.set_decoding(Decoding::Whole);
            let tokenizer = Arc::new(tokenizer);
            prop_assert_eq!(
                pieces(&tokenizer, &ids, true).concat(),
                tokenizer.decode(&ids, true)
            );
        }
    }
}
