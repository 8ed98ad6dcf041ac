//! What `architecture.rs` and `tidy.rs` share: where the workspace is, and its files.

use std::fs;
use std::path::{Path, PathBuf};

/// Folders that hold no source of ours.
const SKIPPED: [&str; 4] = [".git", "target", "__pycache__", "node_modules"];

/// The root folder of the workspace.
pub(crate) fn root() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().expect("the package stands in the workspace's root").to_owned()
}

/// Every file below `root`, tracked or not, as `/`-separated paths relative to it, in order.
/// Build output and version control are left out; links are not followed.
///
/// # Errors
/// A folder that cannot be read.
pub(crate) fn files(root: &Path) -> std::io::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder))? {
            let entry = entry?;
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
            let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            let kind = entry.file_type()?;
            if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
                folders.push(path);
            } else if kind.is_file() {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Fails with one line per violation.
///
/// # Panics
/// Where there is any; that is the failing test.
#[track_caller]
pub(crate) fn assert_none(violations: &[String]) {
    assert!(violations.is_empty(), "{} violations:\n{}", violations.len(), violations.join("\n"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_walk_finds_sources_and_leaves_build_output_out() {
        let folder = tempfile::tempdir().unwrap();
        for path in ["a/b.rs", "a/c/d.md", "target/x.rs", ".git/config", ".ci/run"] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        assert_eq!(files(folder.path()).unwrap(), [".ci/run", "a/b.rs", "a/c/d.md"]);
        assert!(root().join("Cargo.lock").is_file());
    }

    #[test]
    #[should_panic(expected = "1 violations:\na is wrong")]
    fn a_violation_fails() {
        assert_none(&["a is wrong".to_owned()]);
    }
}
