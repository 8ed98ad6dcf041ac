//! What published templates say in Jinja2's dialect, put into the words of the engine here before
//! it parses them: `{% generation %}` blocks, and loops over nothing.
//!
//! The source is walked as the engine's lexer walks it: comments, raw blocks and texts in quotes
//! are left alone. A tag that does not end is left alone, too; the parser says what is wrong.

use minijinja::value::{Value as Jinja, ValueKind};
use minijinja::{Environment, Error, ErrorKind};

use crate::markup;

/// Put behind what a loop walks over.
const LOOPED: &str = "loop_items";

/// The source as this engine shall read it.
pub(crate) fn adapted(source: &str) -> String {
    let marks = markup::marks_texts(source);
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let opens = |text: &str| ["{%", "{#", "{{"].iter().filter_map(|open| text.find(open)).min();
    while let Some(open) = opens(rest) {
        let (before, tag) = rest.split_at(open);
        out.push_str(before);
        rest = tag;
        let end = match &tag[..2] {
            "{#" => tag.find("#}").map(|end| end + 2),
            "{%" => tag_end(tag, "%}"),
            _ => tag_end(tag, "}}"),
        };
        let Some(end) = end else { break };
        let (tag, tail) = tag.split_at(end);
        rest = tail;
        if tag.starts_with("{#") {
            out.push_str(tag);
            continue;
        }
        let (open, inner, close) = (&tag[..2], &tag[2..end - 2], &tag[end - 2..]);
        let (inner, raw) = match open {
            "{%" => statement(inner),
            _ => (inner.to_owned(), false),
        };
        out.push_str(open);
        out.push_str(&if marks { with_sums_as_calls(&inner) } else { inner });
        out.push_str(close);
        if raw {
            let (raw, tail) = rest.split_at(raw_end(rest));
            out.push_str(raw);
            rest = tail;
        }
    }
    out.push_str(rest);
    out
}

/// Where a tag ends, behind its `close`: outside of brackets and quotes.
fn tag_end(tag: &str, close: &str) -> Option<usize> {
    let (mut depth, mut quote, mut escaped) = (0usize, None, false);
    for (at, c) in tag.char_indices().skip(2) {
        if let Some(open) = quote {
            if c == open && !escaped {
                quote = None;
            }
            escaped = c == '\\' && !escaped;
            continue;
        }
        if depth == 0 && tag[at..].starts_with(close) {
            return Some(at + close.len());
        }
        match c {
            '"' | '\'' => quote = Some(c),
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// The inside of a tag with its sums as calls. Signs at its ends are about the space around it.
fn with_sums_as_calls(inner: &str) -> String {
    let start = usize::from(inner.starts_with(['-', '+']));
    let end = inner.len() - usize::from(inner.len() > start && inner.ends_with(['-', '+']));
    let (before, after) = (&inner[..start], &inner[end..]);
    format!("{before}{}{after}", markup::sums_as_calls(&inner[start..end]))
}

/// Where the tag that ends a raw block begins.
fn raw_end(text: &str) -> usize {
    let is_end = |at: &usize| {
        let word = text[at + 2..].trim_start_matches(['-', '+']).trim_start();
        word.starts_with("endraw")
    };
    text.match_indices("{%").map(|(at, _)| at).find(is_end).unwrap_or(text.len())
}

/// What shall stand between `{%` and `%}`, and whether a raw block begins with it.
fn statement(inner: &str) -> (String, bool) {
    let word = inner.trim_matches(['-', '+']).trim();
    let text = match word {
        // It marks the assistant's part for training and is no statement here; blocks that always
        // run keep its whitespace rules.
        "generation" => inner.replace(word, " if true "),
        "endgeneration" => inner.replace(word, " endif "),
        _ if word.starts_with("for") => checked_loop(inner).unwrap_or_else(|| inner.to_owned()),
        _ => inner.to_owned(),
    };
    (text, word == "raw")
}

/// `for x in (items)|loop_items if ..`: what is walked over goes through a filter.
fn checked_loop(inner: &str) -> Option<String> {
    let words = words(inner);
    let mut words = words.iter().map(|(at, word)| (*at, *word));
    if words.next()?.1 != "for" {
        return None;
    }
    let (at, _) = words.find(|(_, word)| *word == "in")?;
    let start = at + "in".len();
    let end = words.find(|(_, word)| ["if", "recursive"].contains(word)).map(|(at, _)| at);
    let end = end.unwrap_or_else(|| inner.trim_end_matches(['-', '+']).len());
    let (head, tail) = (&inner[..start], &inner[end..]);
    Some(format!("{head} ({})|{LOOPED} {tail}", inner[start..end].trim()))
}

/// The words outside of brackets and quotes, with the offsets at which they begin.
fn words(text: &str) -> Vec<(usize, &str)> {
    let (mut words, mut depth, mut quote, mut begin) = (Vec::new(), 0usize, None, None);
    let mut escaped = false;
    for (at, c) in text.char_indices().chain([(text.len(), ' ')]) {
        if let Some(open) = quote {
            if c == open && !escaped {
                quote = None;
            }
            escaped = c == '\\' && !escaped;
            continue;
        }
        let in_word = c.is_alphanumeric() || c == '_';
        match begin {
            None if in_word && depth == 0 => begin = Some(at),
            Some(start) if !in_word => {
                words.push((start, &text[start..at]));
                begin = None;
            }
            _ => {}
        }
        match c {
            '"' | '\'' => quote = Some(c),
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    words
}

/// Teaches the engine what [`adapted`] writes, and how Jinja2 reads numbers. To walk over `none` is
/// an error there, while here it would be an empty loop: a template refuses a chat without tools
/// so.
pub(crate) fn teach(environment: &mut Environment<'static>) {
    markup::teach(environment);
    environment.add_filter("int", |value: &Jinja, default: Option<Jinja>| {
        number(value).map_or_else(
            || default.unwrap_or_else(|| Jinja::from(0)),
            |number| {
                // The text of a whole number may be longer than a fraction is exact.
                let whole = value.as_str().and_then(|text| text.trim().parse::<i64>().ok());
                Jinja::from(whole.unwrap_or(number as i64))
            },
        )
    });
    environment.add_filter("float", |value: &Jinja, default: Option<Jinja>| {
        number(value).map_or_else(|| default.unwrap_or_else(|| Jinja::from(0.0)), Jinja::from)
    });
    environment.add_filter(LOOPED, |items: &Jinja| {
        if items.is_none() {
            let message = "none cannot be walked over";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        Ok(items.clone())
    });
}

/// A value as a number, where it is or spells one. What is none gives the filters' default in
/// Jinja2, and templates ask that way.
fn number(value: &Jinja) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value.clone()).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_go_through_the_filter() {
        let cases = [
            ("{% for m in messages %}", "{% for m in (messages)|loop_items %}"),
            ("{%- for m in messages -%}", "{%- for m in (messages)|loop_items -%}"),
            ("{%for k, v in d['in if']|items%}", "{%for k, v in (d['in if']|items)|loop_items %}"),
            ("{% for m in a(b if c else d) if m.in -%}", {
                "{% for m in (a(b if c else d))|loop_items if m.in -%}"
            }),
            ("{% for t in x.y\n recursive %}", "{% for t in (x.y)|loop_items recursive %}"),
            ("{% for x in ['%}', \"\\\"%}\"] %}", {
                "{% for x in (['%}', \"\\\"%}\"])|loop_items %}"
            }),
        ];
        for (source, want) in cases {
            assert_eq!(adapted(source), want);
        }
    }

    #[test]
    fn what_is_no_loop_stays_as_it_is() {
        for source in [
            "",
            "{% fort in x %}",
            "{% set x = 'for y in z' %}{% endfor %}",
            "{# {% for x in y %} #}",
            "{% raw %}{% for x in y %}{% endraw %}",
            "{% for x in y",
            "{% for x %}",
            "{%}{{ '{' }}{#",
            "{{ '{% for x in y %}' }}{{ {'a': {'b': \"}}{% for x in y %}\"}} }}",
            "{% if 'a' in b %}é{% endif %}",
        ] {
            assert_eq!(adapted(source), source);
        }
    }

    #[test]
    fn generation_becomes_a_block_that_always_runs() {
        let source = "a {%- generation -%} b {% endgeneration %}";
        assert_eq!(adapted(source), "a {%-  if true  -%} b {%  endif  %}");
    }
}
