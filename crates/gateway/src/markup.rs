//! `+` with texts that `safe` has marked, as Python adds them: the other side is escaped.
//!
//! Jinja2 renders chats without escaping, and yet a template that adds a text to `x | safe` gets
//! its own part escaped: the reference's tool calls of some models look so. The engine does it
//! only where everything is escaped. So in templates that say `safe`, sums become calls of a
//! function which adds as Python does. `~` never escapes and is left alone.

use minijinja::value::{Rest, Value as Jinja, ValueKind};
use minijinja::{Environment, Error, State};

use crate::bounded::{TEXT_LIMIT, too_much};

/// What sums become.
const FUNCTION: &str = "sum_of";
/// Words that end an operand.
const BETWEEN: [&str; 12] =
    ["and", "or", "not", "in", "is", "if", "else", "elif", "set", "for", "recursive", "filter"];

/// Whether any text can be marked in a template.
pub(crate) fn marks_texts(source: &str) -> bool {
    let marking = |rest: &str| ["safe", "escape", "e"].iter().any(|name| is_word(rest, name));
    source.split('|').skip(1).any(|rest| marking(rest.trim_start()))
}

fn is_word(text: &str, word: &str) -> bool {
    let rest = text.strip_prefix(word);
    rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
}

/// An expression, or a statement with some, with its sums as calls.
pub(crate) fn sums_as_calls(text: &str) -> String {
    let mut walk = Walk { rest: text, ..Walk::default() };
    while !walk.rest.is_empty() {
        walk.step();
    }
    walk.flush();
    walk.out
}

/// Reads from `rest`, writes to `out`; in between the sum that is being read.
#[derive(Default)]
struct Walk<'t> {
    rest: &'t str,
    out: String,
    /// Operands, each with the operator before it.
    terms: Vec<(char, String)>,
    operator: char,
    term: String,
}

impl<'t> Walk<'t> {
    fn take(&mut self, bytes: usize) -> &'t str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.rest = rest;
        taken
    }

    /// One token.
    fn step(&mut self) {
        let Some(first) = self.rest.chars().next() else { return };
        match first {
            '"' | '\'' => {
                let taken = self.take(quoted(self.rest));
                self.term.push_str(taken);
            }
            '(' | '[' | '{' => {
                let inner = bracketed(self.rest);
                let taken = self.take(inner);
                let close = taken.len() - usize::from(taken.ends_with([')', ']', '}']));
                let within = sums_as_calls(taken.get(1..close).unwrap_or(""));
                self.term.push_str(&format!("{first}{within}{}", &taken[close.max(1)..]));
            }
            '+' | '-' if !self.term.trim().is_empty() => {
                self.take(1);
                self.terms.push((self.operator, std::mem::take(&mut self.term)));
                self.operator = first;
            }
            ',' | ':' | '=' | '!' | '<' | '>' | '~' => {
                self.flush();
                let taken = self.take(1);
                self.out.push_str(taken);
            }
            c if c.is_alphanumeric() || c == '_' => self.word(),
            c => {
                self.take(c.len_utf8());
                self.term.push(c);
            }
        }
    }

    fn word(&mut self) {
        let end = self.rest.find(|c: char| !c.is_alphanumeric() && c != '_');
        let word = self.take(end.unwrap_or(self.rest.len()));
        let named = self.term.trim_end().ends_with(['.', '|']);
        if BETWEEN.contains(&word) && !named {
            self.flush();
            self.out.push_str(word);
        } else {
            self.term.push_str(word);
        }
    }

    /// Writes the sum that has been read. One with a difference in it is of numbers.
    fn flush(&mut self) {
        self.terms.push((self.operator, std::mem::take(&mut self.term)));
        self.operator = '+';
        let terms = std::mem::take(&mut self.terms);
        let sum = terms.len() > 1 && terms[1..].iter().all(|(operator, _)| *operator == '+');
        if sum {
            let texts: Vec<&str> = terms.iter().map(|(_, term)| term.trim()).collect();
            self.out.push_str(&format!(" {FUNCTION}({}) ", texts.join(", ")));
            return;
        }
        for (i, (operator, term)) in terms.iter().enumerate() {
            if i > 0 {
                self.out.push(*operator);
            }
            self.out.push_str(term);
        }
    }
}

/// Bytes of the quoted text at the beginning.
fn quoted(text: &str) -> usize {
    let mut escaped = false;
    let open = text.chars().next();
    for (at, c) in text.char_indices().skip(1) {
        if Some(c) == open && !escaped {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}

/// Bytes of what stands in brackets at the beginning, the brackets included.
fn bracketed(text: &str) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while let Some(c) = text[at..].chars().next() {
        match c {
            '"' | '\'' => {
                at += quoted(&text[at..]);
                continue;
            }
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        at += c.len_utf8();
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// Teaches the engine what [`sums_as_calls`] writes.
pub(crate) fn teach(environment: &mut Environment<'static>) {
    environment.add_function(FUNCTION, |state: &mut State, terms: Rest<Jinja>| {
        let mut terms = terms.0.into_iter();
        let first = terms.next().unwrap_or_default();
        terms.try_fold(first, |sum, term| add(state, &sum, &term))
    });
}

fn add(state: &State, left: &Jinja, right: &Jinja) -> Result<Jinja, Error> {
    let (Some(l), Some(r)) = (left.as_str(), right.as_str()) else {
        if left.kind() == ValueKind::String || right.kind() == ValueKind::String {
            // As the engine says it.
            let message = format!("cannot add {} and {}", left.kind(), right.kind());
            return Err(Error::new(minijinja::ErrorKind::InvalidOperation, message));
        }
        let sum = state.env().compile_expression("left + right")?;
        return sum.eval(minijinja::context! { left, right });
    };
    let marked = left.is_safe() || right.is_safe();
    let escaped = |value: &Jinja, text: &str| match marked && !value.is_safe() {
        true => escape(text),
        false => text.to_owned(),
    };
    if l.len().saturating_add(r.len()) > TEXT_LIMIT {
        return Err(too_much());
    }
    let sum = escaped(left, l) + &escaped(right, r);
    state.consume_fuel(1 + sum.len() as u64 / 64)?;
    if sum.len() > TEXT_LIMIT {
        return Err(too_much());
    }
    Ok(if marked { Jinja::from_safe_string(sum) } else { Jinja::from(sum) })
}

/// As Python's `markupsafe` escapes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_become_calls() {
        for (text, want) in [
            (" 'a' + b + c.d|f(1 + 2) ", " sum_of('a', b, c.d|f( sum_of(1, 2) )) "),
            (" set x = a + b if c else d ", " set x = sum_of(a, b) if c else d "),
            ("{'k': a + b, 'l': [c + '+']}", "{'k': sum_of(a, b) , 'l': [ sum_of(c, '+') ]}"),
            ("x.y[i + 1] ~ z + w", "x.y[ sum_of(i, 1) ] ~ sum_of(z, w) "),
        ] {
            assert_eq!(sums_as_calls(text), want, "{text}");
        }
    }

    #[test]
    fn what_holds_no_sum_stays_as_it_is() {
        for text in [
            "",
            "- a ",
            "a - b + c",
            "-1",
            "f(a, b=-c)",
            "m['+'] ~ \"a + 'b\"",
            "a not in (b)",
            "(",
            ")",
        ] {
            assert_eq!(sums_as_calls(text), text);
        }
    }

    #[test]
    fn marks_are_found() {
        assert!(marks_texts("{{ x|tojson | safe }}") && marks_texts("{{ x |e}}"));
        assert!(!marks_texts("{{ safe }}{{ x | escaped }}{{ x|safety }}"));
    }
}
