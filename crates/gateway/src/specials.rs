//! Keeps a user's text from becoming control tokens.
//!
//! A template mixes its own control tokens with texts of users, and may trim or split those. So a
//! text gets unguessable marks at the places where it could form a control token, by itself or
//! with its neighbours; a control token found around a mark is not the template's. Texts that
//! cannot take part in one, nearly all, pass unchanged.

use std::collections::BTreeMap;

/// A random string of private-use characters, made for one request.
#[derive(Debug, Clone)]
pub(crate) struct Marker(String);

impl Marker {
    /// 72 random bits; short, as hostile texts get many.
    pub(crate) fn random() -> Self {
        let bits = uuid::Uuid::new_v4().as_u128();
        let character = |i: u32| {
            // 4096 of the 6400 private-use characters of the basic plane.
            let low = u32::try_from((bits >> (12 * i)) & 0xfff).unwrap_or(0);
            char::from_u32(0xe000 + low).unwrap_or('\u{e000}')
        };
        Self((0..6).map(character).collect())
    }

    /// The text without marks, and the byte offsets in it where they stood, ascending.
    pub(crate) fn strip(&self, text: &str) -> (String, Vec<usize>) {
        let mut clean = String::with_capacity(text.len());
        let mut marks = Vec::new();
        for (i, part) in text.split(&self.0).enumerate() {
            if i > 0 {
                marks.push(clean.len());
            }
            clean.push_str(part);
        }
        (clean, marks)
    }
}

/// The control tokens' names, for finding them and parts of them in text.
#[derive(Debug, Default)]
pub(crate) struct Specials {
    names: BTreeMap<u32, String>,
    /// A tree over the names' bytes; node 0 is the root.
    nodes: Vec<Node>,
    /// Proper suffixes of all names by first character: what a text may begin with that a
    /// neighbour before it could complete.
    tails: BTreeMap<char, Vec<String>>,
}

#[derive(Debug, Default)]
struct Node {
    next: BTreeMap<u8, usize>,
    id: Option<u32>,
}

impl Specials {
    /// From names to ids; names are not empty.
    pub(crate) fn new(controls: BTreeMap<String, u32>) -> Self {
        let mut this = Self { nodes: vec![Node::default()], ..Self::default() };
        for (name, id) in controls {
            let mut at = 0;
            for byte in name.bytes() {
                let fresh = this.nodes.len();
                at = *this.nodes[at].next.entry(byte).or_insert(fresh);
                if at == fresh {
                    this.nodes.push(Node::default());
                }
            }
            this.nodes[at].id = Some(id);
            for (offset, first) in name.char_indices().skip(1) {
                this.tails.entry(first).or_default().push(name[offset..].to_owned());
            }
            this.names.insert(id, name);
        }
        for tails in this.tails.values_mut() {
            tails.sort();
            tails.dedup();
        }
        this
    }

    /// Whether `text` is the name of control token `id`.
    pub(crate) fn spells(&self, id: u32, text: &str) -> bool {
        self.names.get(&id).is_some_and(|name| name == text)
    }

    /// The longest name that `text` begins with, as (id, bytes); and whether the whole of `text`
    /// is the beginning of some name.
    fn walk(&self, text: &str) -> (Option<(u32, usize)>, bool) {
        let (mut at, mut found) = (0, None);
        for (i, byte) in text.bytes().enumerate() {
            match self.nodes.get(at).and_then(|node| node.next.get(&byte)) {
                Some(next) => at = *next,
                None => return (found, false),
            }
            if let Some(id) = self.nodes[at].id {
                found = Some((id, i + 1));
            }
        }
        (found, !text.is_empty())
    }

    /// Whether a neighbour before `text` could make a control token with its beginning.
    fn continues(&self, text: &str) -> bool {
        let Some(first) = text.chars().next() else { return false };
        let tails = self.tails.get(&first).map_or(&[][..], Vec::as_slice);
        tails.iter().any(|tail| text.starts_with(tail) || tail.starts_with(text))
    }

    /// Inserts marks where `text` could form a control token.
    pub(crate) fn guard(&self, text: &str, marker: &Marker) -> String {
        let lead = text.len() - text.trim_start().len();
        let end = text.trim_end().len().max(lead);
        let mut out = String::with_capacity(text.len());
        for (at, c) in text.char_indices() {
            // A template may trim, so both beginnings and both ends count.
            let begins = (at == 0 && self.continues(text))
                || (at == lead && self.continues(&text[lead..end]))
                || (at == lead && self.continues(&text[lead..]));
            if begins {
                out.push_str(&marker.0);
            }
            out.push(c);
            let (found, open) = self.walk(&text[at..]);
            let trimmed = at < end && self.walk(&text[at..end]).1;
            if found.is_some() || open || trimmed {
                out.push_str(&marker.0);
            }
        }
        out
    }

    /// Cuts text at control tokens, leftmost and longest first: `Ok` is one, `Err` text between.
    pub(crate) fn split<'t>(&self, text: &'t str) -> Vec<Result<u32, &'t str>> {
        let (mut pieces, mut from, mut at) = (Vec::new(), 0, 0);
        while at < text.len() {
            if let (Some((id, length)), _) = self.walk(&text[at..]) {
                if from < at {
                    pieces.push(Err(&text[from..at]));
                }
                pieces.push(Ok(id));
                at += length;
                from = at;
            } else {
                at += text[at..].chars().next().map_or(1, char::len_utf8);
            }
        }
        if from < text.len() {
            pieces.push(Err(&text[from..]));
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specials() -> Specials {
        Specials::new([("<|end|>".to_owned(), 5), ("<|endless|>".to_owned(), 6)].into())
    }

    fn marks(text: &str) -> Vec<usize> {
        let marker = Marker::random();
        let guarded = specials().guard(text, &marker);
        let (clean, marks) = marker.strip(&guarded);
        assert_eq!(clean, text);
        marks
    }

    #[test]
    fn ordinary_text_is_not_marked() {
        for text in ["", "hello", "a < b", "<think>x</think>", "1 | 2", " spaces  "] {
            assert_eq!(marks(text), Vec::<usize>::new(), "{text:?}");
        }
    }

    #[test]
    fn names_and_their_parts_at_the_borders_are_marked() {
        assert_eq!(marks("a<|end|>b"), [2]);
        assert_eq!(marks("<|end|><|endless|>"), [1, 8]);
        assert_eq!(marks("so <|en"), [4]);
        assert_eq!(marks("so <|en \n"), [4]);
        assert_eq!(marks("nd|> more"), [0]);
        assert_eq!(marks("  nd|> more"), [2]);
        assert_eq!(marks("> quoted"), [0]);
        assert_eq!(marks("end"), [0]);
    }

    #[test]
    fn splits_at_the_longest_name() {
        let text = "a<|endless|><|end|>b<|en";
        assert_eq!(specials().split(text), [Err("a"), Ok(6), Ok(5), Err("b<|en")]);
    }
}
