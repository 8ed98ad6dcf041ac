//! Form, read from every file: headers, lengths, words, paths, links, numbers of decisions.
//!
//! Each rule is a function from text to sentences, one per violation; the tests at the end hand it
//! a bad sample and see it bite. What stands inside a macro call (`proptest!`) is not measured.

mod house;

use std::collections::BTreeSet;
use std::fs;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// Lines of a function, from its signature to its closing brace.
const FUNCTION_LINES: usize = 70;
/// Lines of a source file.
const FILE_LINES: usize = 800;
/// Characters of a line of code.
const COLUMNS: usize = 100;
/// Bytes of a file that is neither a model nor a golden reference.
const BLOB_BYTES: u64 = 1 << 20;

/// Functions over the limit: path, name, lines. Nothing may be added; an entry that grew, shrank
/// or is not needed any more fails, so that the list only ever gets shorter.
const LONG_FUNCTIONS: &[(&str, &str, usize)] = &[];
/// Files over the limit: path, lines. The same rule.
const LONG_FILES: &[(&str, usize)] = &[];

/// Words that promise work instead of doing it. Spelled in halves: this file is checked too.
const WORDS: [&str; 4] =
    [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK")];
/// First folders of paths that only exist on somebody's machine.
const MACHINE_FOLDERS: [&str; 5] = ["work", "root", "home", "tmp", "Users"];
/// Pure crates: their clippy.toml files are one text.
const PURE: [&str; 4] = ["model", "planner", "cluster", "engine"];

/// A text file of the workspace.
struct Source {
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_code(&self) -> bool {
        self.is_rust() || self.path.ends_with(".proto") || self.path.ends_with(".cu")
    }
}

/// Every file of text that people write: not the lock file, models or golden references.
fn sources() -> Vec<Source> {
    let root = house::root();
    let written = |path: &String| {
        let data = path.starts_with("models/demo/") || path.starts_with("tests/golden/");
        path != "Cargo.lock" && !data
    };
    let paths = house::files(&root).expect("the workspace can be read").into_iter();
    let read = |path: String| {
        let bytes = fs::read(root.join(&path)).expect("a listed file can be read");
        Some(Source { path, text: String::from_utf8(bytes).ok()? })
    };
    let found: Vec<_> = paths.filter(written).filter_map(read).collect();
    assert!(found.iter().filter(|source| source.is_rust()).count() > 30, "the walk finds the code");
    found
}

/// A module says in its first line what it is for.
fn header(source: &Source) -> Option<String> {
    let first = source.text.lines().next().unwrap_or_default();
    let says = first.strip_prefix("//!").is_some_and(|rest| rest.trim().len() >= 8);
    (!says).then(|| format!("{}: the first line is no `//!` header", source.path))
}

/// Lines that are too wide.
fn wide_lines(source: &Source) -> Vec<String> {
    let wide = |(_, line): &(usize, &str)| line.chars().count() > COLUMNS;
    let numbered = source.text.lines().enumerate().filter(wide);
    numbered.map(|(at, _)| format!("{}:{}: over {COLUMNS} columns", source.path, at + 1)).collect()
}

/// Every function of a file with its length in lines.
#[derive(Default)]
struct Functions(Vec<(String, usize)>);

impl Functions {
    fn add(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let first = signature.span().start().line;
        let last = block.brace_token.span.close().end().line;
        self.0.push((signature.ident.to_string(), last - first + 1));
    }
}

impl<'ast> Visit<'ast> for Functions {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.add(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.add(&item.sig, block);
        }
        visit::visit_trait_item_fn(self, item);
    }
}

/// The functions of a source text.
fn functions(text: &str) -> Result<Vec<(String, usize)>, syn::Error> {
    let mut found = Functions::default();
    found.visit_file(&syn::parse_file(text)?);
    Ok(found.0)
}

/// What is over `limit` and not excused, and what is excused and should not be.
fn ratchet(measured: &[(String, usize)], excused: &[(String, usize)], limit: usize) -> Vec<String> {
    let mut found = Vec::new();
    for (name, lines) in measured.iter().filter(|(_, lines)| *lines > limit) {
        match excused.iter().find(|(excuse, _)| excuse == name) {
            None => found.push(format!("{name}: {lines} lines, the limit is {limit}")),
            Some((_, had)) if had != lines => {
                found.push(format!("{name}: {lines} lines, the list says {had}"));
            }
            Some(_) => {}
        }
    }
    let still = |name: &String| measured.iter().any(|(long, n)| long == name && *n > limit);
    let idle = excused.iter().filter(|(name, _)| !still(name));
    found.extend(idle.map(|(name, _)| format!("{name}: needs no exception, take it off the list")));
    found
}

/// Paths of a machine: `/` and a folder of [`MACHINE_FOLDERS`] where a path may begin.
fn machine_paths(source: &Source) -> Vec<String> {
    let mut found = Vec::new();
    for (at, line) in source.text.lines().enumerate() {
        for folder in MACHINE_FOLDERS.map(|folder| format!("/{folder}/")) {
            let begins = |start: usize| {
                let before = line[..start].chars().next_back();
                before.is_none_or(|c| !c.is_alphanumeric() && !"_.-".contains(c))
            };
            if line.match_indices(&folder).any(|(start, _)| begins(start)) {
                found.push(format!("{}:{}: a path of one machine", source.path, at + 1));
            }
        }
    }
    found
}

/// Lines with one of [`WORDS`] as a whole word.
fn promises(source: &Source) -> Vec<String> {
    let mut found = Vec::new();
    for (at, line) in source.text.lines().enumerate() {
        for word in WORDS {
            let stands = |start: usize| {
                let inside = |c: char| c.is_alphanumeric() || c == '_';
                let before = line[..start].chars().next_back();
                let after = line[start + word.len()..].chars().next();
                !before.is_some_and(inside) && !after.is_some_and(inside)
            };
            if line.match_indices(word).any(|(start, _)| stands(start)) {
                found.push(format!("{}:{}: {word}: do it or leave it", source.path, at + 1));
            }
        }
    }
    found
}

/// Lints that product code switches off without a reason.
fn bare_allows(source: &Source) -> Vec<String> {
    let mut found = Vec::new();
    for opening in [concat!("#", "[allow("), concat!("#", "![allow(")] {
        for (at, _) in source.text.match_indices(opening) {
            let attribute = source.text[at..].split(")]").next().unwrap_or_default();
            if !attribute.contains("reason = ") {
                let line = source.text[..at].lines().count().max(1);
                found.push(format!("{}:{line}: an allow without a reason", source.path));
            }
        }
    }
    found
}

/// Decision records are numbered 0001, 0002, ... without gap or twin, and the index links each.
fn decisions(names: &[&str], index: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut next = 1;
    for name in names {
        match name.get(..4).and_then(|digits| digits.parse::<usize>().ok()) {
            Some(number) if number == next && name[4..].starts_with('-') => next += 1,
            _ => found.push(format!("{name}: expected number {next:04}")),
        }
        if !index.contains(&format!("]({name})")) {
            found.push(format!("{name}: not in the index"));
        }
    }
    found
}

/// The spans of a document between single backticks.
fn code_spans(document: &str) -> Vec<&str> {
    let prose = |line: &&str| !line.trim_start().starts_with("```");
    document.lines().filter(prose).flat_map(|line| line.split('`').skip(1).step_by(2)).collect()
}

/// Whether a code span is a path of this repository: `crates/...`, or `folder/file#symbol`.
fn repository_path(span: &str) -> Option<(&str, Option<&str>)> {
    let (path, symbol) = match span.split_once('#') {
        Some((path, symbol)) => (path, Some(symbol)),
        None => (span, None),
    };
    let plain = |c: char| c.is_alphanumeric() || "_-./".contains(c);
    let folders = ["crates", "proto", "kernels", "deploy", "tests", "docs", "models", ".ci"];
    let first = path.split('/').next().unwrap_or_default();
    let named = path.contains('/') && folders.contains(&first);
    (path.chars().all(plain) && (named || path.ends_with(".rs"))).then_some((path, symbol))
}

/// Whether `text` defines `symbol` as a function, type, trait, constant, module, message or rpc.
fn defines(text: &str, symbol: &str) -> bool {
    let kinds = ["fn", "struct", "enum", "trait", "type", "const", "mod", "message", "rpc"];
    kinds.iter().any(|kind| {
        let definition = format!("{kind} {symbol}");
        text.match_indices(&definition).any(|(at, _)| {
            let after = text[at + definition.len()..].chars().next();
            after.is_none_or(|c| !c.is_alphanumeric() && c != '_')
        })
    })
}

/// Paths and symbols that a document names and that `read` does not find.
/// `read` gives a file's text, an empty one for a folder.
fn dead_paths(document: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut found = Vec::new();
    for (path, symbol) in code_spans(document).into_iter().filter_map(repository_path) {
        match (read(path), symbol) {
            (None, _) => found.push(format!("`{path}` does not exist")),
            (Some(text), Some(symbol)) if !defines(&text, symbol) => {
                found.push(format!("`{path}` defines no {symbol}"));
            }
            _ => {}
        }
    }
    found
}

/// Relative links of a document, without their anchors.
fn links(document: &str) -> Vec<&str> {
    let targets = document.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let path = |target| str::split(target, '#').next().unwrap_or_default();
    targets.filter(|target| !target.contains("://")).map(path).filter(|t| !t.is_empty()).collect()
}

/// Module files that no `mod` line and no `#[path]` of their crate declares.
fn dead_modules(sources: &[(&str, &str)]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, _) in sources {
        let Some((package, inner)) = path.split_once("/src/") else { continue };
        let mut parts: Vec<_> = inner.trim_end_matches(".rs").split('/').collect();
        if parts.last() == Some(&"mod") {
            parts.pop();
        }
        let Some(name) = parts.last().filter(|name| !matches!(**name, "lib" | "main")) else {
            continue;
        };
        let file = path.rsplit('/').next().unwrap_or_default();
        let declared = |text: &str| {
            let mut lines = text.lines().map(str::trim);
            let placed = format!("#[path = \"{file}\"]");
            lines.any(|line| line.ends_with(&format!("mod {name};")) || line == placed)
        };
        let mut same = sources.iter().filter(|(other, _)| other.starts_with(package));
        if !same.any(|(_, text)| declared(text)) {
            found.push(format!("{path}: no `mod {name};` declares it"));
        }
    }
    found
}

/// What one clippy.toml bans: the paths of its `{ path = "...", ... }` lines.
fn bans(text: &str) -> BTreeSet<&str> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("{ path = \""));
    lines.filter_map(|rest| rest.split('"').next()).collect()
}

#[test]
fn every_module_opens_with_its_purpose() {
    let found: Vec<_> = sources().iter().filter(|s| s.is_rust()).filter_map(header).collect();
    house::assert_none(&found);
}

#[test]
fn no_line_of_code_is_too_wide() {
    let code = sources().into_iter().filter(Source::is_code);
    house::assert_none(&code.flat_map(|source| wide_lines(&source)).collect::<Vec<String>>());
}

#[test]
fn functions_stay_short() {
    let mut measured = Vec::new();
    for source in sources().into_iter().filter(Source::is_rust) {
        let inner = functions(&source.text).expect(&source.path).into_iter();
        measured.extend(inner.map(|(name, lines)| (format!("{} {name}", source.path), lines)));
    }
    assert!(measured.len() > 100, "functions are found");
    let excused = LONG_FUNCTIONS.iter().map(|(path, name, n)| (format!("{path} {name}"), *n));
    house::assert_none(&ratchet(&measured, &excused.collect::<Vec<_>>(), FUNCTION_LINES));
}

#[test]
fn files_stay_short() {
    let rust = sources().into_iter().filter(Source::is_rust);
    let measured: Vec<_> = rust.map(|s| (s.path.clone(), s.text.lines().count())).collect();
    let excused: Vec<_> = LONG_FILES.iter().map(|(path, n)| (path.to_string(), *n)).collect();
    house::assert_none(&ratchet(&measured, &excused, FILE_LINES));
}

#[test]
fn no_file_names_a_machine_or_promises_work() {
    let rules = [machine_paths, promises];
    let found: Vec<_> =
        sources().iter().flat_map(|source| rules.iter().flat_map(|rule| rule(source))).collect();
    house::assert_none(&found);
}

#[test]
fn every_allow_has_a_reason() {
    let product = |s: &Source| s.path.contains("/src/") && !s.path.contains("_tests");
    let rust = sources().into_iter().filter(|s| s.is_rust() && product(s));
    house::assert_none(&rust.flat_map(|source| bare_allows(&source)).collect::<Vec<String>>());
}

#[test]
fn decision_records_are_numbered_and_listed() {
    let root = house::root();
    let all = house::files(&root).expect("the workspace can be read");
    let records = all.iter().filter_map(|path| path.strip_prefix("docs/decisions/"));
    let names: Vec<_> = records.filter(|name| *name != "README.md").collect();
    let index = fs::read_to_string(root.join("docs/decisions/README.md")).expect("the index");
    assert!(!names.is_empty());
    house::assert_none(&decisions(&names, &index));
}

#[test]
fn no_large_file_outside_models_and_golden_references() {
    let root = house::root();
    let size = |path: &str| fs::metadata(root.join(path)).map_or(0, |about| about.len());
    let large = |path: &String| {
        let data = path.starts_with("models/") || path.starts_with("tests/golden/");
        !data && size(path) > BLOB_BYTES
    };
    let all = house::files(&root).expect("the workspace can be read");
    assert!(size("models/demo/model.safetensors") > BLOB_BYTES, "sizes are read");
    house::assert_none(&all.into_iter().filter(large).collect::<Vec<String>>());
}

#[test]
fn documents_name_what_exists() {
    let root = house::root();
    let read = |path: &str| {
        let full = root.join(path);
        if full.is_dir() { Some(String::new()) } else { fs::read_to_string(full).ok() }
    };
    let mut found = Vec::new();
    for source in sources().iter().filter(|source| source.path.ends_with(".md")) {
        let folder = source.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        let dead = links(&source.text).into_iter().filter(|l| !root.join(folder).join(l).exists());
        found.extend(dead.map(|link| format!("{}: link to {link}", source.path)));
        if source.path == "docs/ARCHITECTURE.md" {
            assert!(code_spans(&source.text).len() > 50, "the document names code");
        }
        let dead = dead_paths(&source.text, read);
        found.extend(dead.into_iter().map(|sentence| format!("{}: {sentence}", source.path)));
    }
    house::assert_none(&found);
}

#[test]
fn every_module_file_is_declared() {
    let all = sources();
    let rust = all.iter().filter(|s| s.is_rust() && s.path.starts_with("crates/"));
    let pairs: Vec<_> = rust.map(|s| (s.path.as_str(), s.text.as_str())).collect();
    house::assert_none(&dead_modules(&pairs));
}

#[test]
fn pure_crates_ban_the_same_and_what_the_root_bans() {
    let read = |path: &str| fs::read_to_string(house::root().join(path)).expect("a clippy.toml");
    let first = read("crates/model/clippy.toml");
    for name in PURE {
        assert_eq!(read(&format!("crates/{name}/clippy.toml")), first, "crates/{name}");
    }
    let root = read("clippy.toml");
    let missing = bans(&root).into_iter().filter(|ban| !bans(&first).contains(ban));
    let missing = missing.map(str::to_owned);
    house::assert_none(&missing.collect::<Vec<_>>());
    for ban in ["std::time::Instant::now", "std::collections::HashMap", "std::thread::spawn"] {
        assert!(bans(&first).contains(ban), "{ban}");
    }
}

// The rules, seen to bite.

fn source(text: &str) -> Source {
    Source { path: "a.rs".to_owned(), text: text.to_owned() }
}

#[test]
fn a_missing_or_empty_header_is_reported() {
    assert!(header(&source("use x;\n//! Too late to be read.\n")).is_some());
    assert!(header(&source("//!\n")).is_some());
    assert!(header(&source("//! placeholder\n")).is_none());
}

#[test]
fn a_wide_line_is_reported_in_characters() {
    let fits = "é".repeat(COLUMNS);
    let text = format!("{fits}\n{fits}!\n");
    assert_eq!(wide_lines(&source(&text)), ["a.rs:2: over 100 columns"]);
}

#[test]
fn functions_are_measured_from_signature_to_closing_brace() {
    let text = r##"
        //! Braces in strings, characters, lifetimes and comments do not count: }
        #[doc = "not part of it"]
        fn short<'a>(x: &'a str) -> char { '}' }
        impl X {
            fn method(&self) { // }
                let _ = r#"}"#;
                fn nested() {
                }
            }
        }
        trait T {
            fn required(&self);
            fn default(&self)
            where
                Self: Sized,
            {
            }
        }
    "##;
    let found = functions(text).expect("it parses");
    let expected = [("short", 1), ("method", 5), ("nested", 2), ("default", 5)];
    assert_eq!(found, expected.map(|(name, lines)| (name.to_owned(), lines)));
    assert!(functions("fn broken( {").is_err());
}

#[test]
fn the_ratchet_turns_one_way() {
    let entry = |name: &str, lines: usize| (name.to_owned(), lines);
    let measured = [entry("new", 71), entry("grown", 90), entry("same", 80), entry("short", 70)];
    let excused = [entry("grown", 85), entry("same", 80), entry("short", 75), entry("gone", 99)];
    let expected = [
        "new: 71 lines, the limit is 70",
        "grown: 90 lines, the list says 85",
        "short: needs no exception, take it off the list",
        "gone: needs no exception, take it off the list",
    ];
    assert_eq!(ratchet(&measured, &excused, 70), expected);
    assert_eq!(ratchet(&measured[3..], &[], 70), [""; 0]);
}

#[test]
fn machine_paths_and_promises_are_reported() {
    let slash = '/';
    let bad = format!("open(\"{slash}home{slash}me\")\nhttps://x.org/home/me\n./tmp/x\n");
    assert_eq!(machine_paths(&source(&bad)), ["a.rs:1: a path of one machine"]);
    let bad = format!("// {}: later\nlet {}S = 1;\n", WORDS[0], WORDS[0]);
    assert_eq!(promises(&source(&bad)).len(), 1);
}

#[test]
fn an_allow_without_a_reason_is_reported() {
    let hash = '#';
    let bad = format!("//! x\n{hash}[allow(dead_code)]\n{hash}![allow(a, reason = \"b\")]\n");
    assert_eq!(bare_allows(&source(&bad)), ["a.rs:1: an allow without a reason"]);
}

#[test]
fn gaps_twins_and_unlisted_decisions_are_reported() {
    let index = "[a](0001-a.md) [b](0002-b.md) [c](0002-c.md)";
    assert_eq!(decisions(&["0001-a.md", "0002-b.md"], index), [""; 0]);
    assert_eq!(decisions(&["0001-a.md", "0002-b.md", "0002-c.md"], index).len(), 1);
    let found = decisions(&["0001-a.md", "0003-d.md"], index);
    assert_eq!(found, ["0003-d.md: expected number 0002", "0003-d.md: not in the index"]);
}

#[test]
fn dead_paths_symbols_and_links_are_seen() {
    let read = |path: &str| (path == "crates/a/src/lib.rs").then(|| "pub fn run() {}".to_owned());
    let document =
        "`crates/a/src/lib.rs` `crates/a/src/lib.rs#run` `std::fs` `a -> b` `/v1/models`";
    assert_eq!(dead_paths(document, read), [""; 0]);
    let document = "`crates/a/src/lib.rs#ru` `crates/b` `main.rs`";
    let expected = [
        "`crates/a/src/lib.rs` defines no ru",
        "`crates/b` does not exist",
        "`main.rs` does not exist",
    ];
    assert_eq!(dead_paths(document, read), expected);
    let document = "[a](docs/A.md#part) [b](https://x.org/y) [c](#here)";
    assert_eq!(links(document), ["docs/A.md"]);
}

#[test]
fn a_module_that_nobody_declares_is_reported() {
    let sources = [
        ("crates/a/src/lib.rs", "mod b;\npub(crate) mod c;"),
        ("crates/a/src/b.rs", ""),
        ("crates/a/src/c/mod.rs", "mod e;"),
        ("crates/a/src/c/e.rs", "#[path = \"e_tests.rs\"]\nmod tests;"),
        ("crates/a/src/c/e_tests.rs", ""),
        ("crates/a/src/d.rs", ""),
        ("crates/b/src/lib.rs", "mod d;"),
    ];
    assert_eq!(dead_modules(&sources), ["crates/a/src/d.rs: no `mod d;` declares it"]);
}

#[test]
fn bans_are_read_by_path() {
    let text = "# { path\n    { path = \"std::fs::read\", reason = \"x\" },\n";
    assert_eq!(bans(text).into_iter().collect::<Vec<_>>(), ["std::fs::read"]);
}
