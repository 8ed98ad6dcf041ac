//! What a model directory or GGUF file says about its licence. Said, not judged.

use std::path::Path;

use model::gguf::Gguf;
use serde_json::Value;

/// Bytes of a file that are looked at.
const LOOK: usize = 64 << 10;
/// Most characters of one value that are shown.
const SHOWN: usize = 120;

/// One statement, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Licence {
    /// File and field, or key of the metadata.
    pub(crate) place: String,
    pub(crate) text: String,
}

/// Every statement of a model directory and its config, in a fixed order.
pub(crate) fn find(directory: Option<&Path>, config: &Value) -> Vec<Licence> {
    let fields = ["license", "license_name", "license_link"];
    let of_config = |field: &&str| {
        let place = format!("config.json: {field}");
        Some(Licence { place, text: shown(config[*field].as_str()?) })
    };
    let mut found: Vec<Licence> = fields.iter().filter_map(of_config).collect();
    let Some(directory) = directory else { return found };
    for (field, text) in front_matter(&beginning(&directory.join("README.md"))) {
        if fields.contains(&field.as_str()) {
            found.push(Licence { place: format!("README.md: {field}"), text });
        }
    }
    for name in ["LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "COPYING", "NOTICE"] {
        let text = beginning(&directory.join(name));
        if let Some(line) = text.lines().map(str::trim).find(|line| !line.is_empty()) {
            found.push(Licence { place: name.to_owned(), text: shown(line) });
        }
    }
    found
}

/// The same of a GGUF file's metadata.
pub(crate) fn of_gguf(gguf: &Gguf<'_>) -> Vec<Licence> {
    let of_key = |key: &str| {
        let text = shown(gguf.value(key)?.text()?);
        Some(Licence { place: key.to_owned(), text })
    };
    let keys = ["general.license", "general.license.name", "general.license.link"];
    keys.into_iter().filter_map(of_key).collect()
}

/// The first bytes of a text file; nothing where there is none.
fn beginning(path: &Path) -> String {
    use std::io::Read;
    // A pipe would wait for a writer.
    if !path.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return String::new();
    }
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path)
        .and_then(|file| file.take(LOOK as u64).read_to_end(&mut bytes).map(drop));
    if read.is_err() { String::new() } else { String::from_utf8_lossy(&bytes).into_owned() }
}

/// `name: value` lines between the first two lines of dashes. Nested values are left out.
fn front_matter(text: &str) -> Vec<(String, String)> {
    let mut lines = text.lines().map(str::trim_end);
    if lines.next() != Some("---") {
        return Vec::new();
    }
    let within = lines.take_while(|line| *line != "---");
    let field = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let value = value.trim().trim_matches(['"', '\'']);
        (!value.is_empty()).then(|| (name.to_owned(), shown(value)))
    };
    within.filter_map(field).collect()
}

/// One line without control characters, not too long.
fn shown(text: &str) -> String {
    text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn statements_are_found_where_they_stand() {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| {
            std::fs::write(directory.path().join(name), text).expect("written");
        };
        write(
            "README.md",
            "---\nlicense: \"other\"\nlicense_name: deepseek\ntags:\n- x\n---\nlicense: no\n",
        );
        write("LICENSE", "\n   DEEPSEEK LICENSE AGREEMENT\nVersion 1.0\n");
        let found = find(Some(directory.path()), &json!({"license": "mit"}));
        let found: Vec<_> = found.iter().map(|l| (l.place.as_str(), l.text.as_str())).collect();
        assert_eq!(
            found,
            [
                ("config.json: license", "mit"),
                ("README.md: license", "other"),
                ("README.md: license_name", "deepseek"),
                ("LICENSE", "DEEPSEEK LICENSE AGREEMENT"),
            ]
        );
        assert_eq!(find(None, &Value::Null), []);
    }

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        assert_eq!(shown("a\u{1b}[31mb"), "a [31mb");
    }
}
