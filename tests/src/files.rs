//! Golden checkpoints as files in memory, to be changed and written elsewhere.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use model::safetensors::parse_header;

/// A checkpoint's files, tokenizers and references aside: their contents by name.
pub struct Files(pub BTreeMap<String, Vec<u8>>);

impl Files {
    /// The files of a golden checkpoint.
    ///
    /// # Panics
    /// Where they cannot be read: this is for tests.
    pub fn read(directory: &Path) -> Self {
        let entries = fs::read_dir(directory).expect("a directory");
        let names = entries.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8"));
        let read = |name: String| {
            let bytes = fs::read(directory.join(&name)).expect("a file");
            (name, bytes)
        };
        Self(names.filter(|name| name.starts_with("model")).map(read).collect())
    }

    /// Writes them into another directory.
    ///
    /// # Panics
    /// Where they cannot be written.
    pub fn write(&self, directory: &Path) {
        for (name, bytes) in &self.0 {
            fs::write(directory.join(name), bytes).expect("written");
        }
    }

    /// The bytes of a tensor, in whichever file it stands.
    ///
    /// # Panics
    /// Where no file has it.
    pub fn tensor(&mut self, tensor: &str) -> &mut [u8] {
        let place = |(name, bytes): (&String, &Vec<u8>)| -> Option<(String, Range<usize>)> {
            let header = parse_header(name, bytes).ok()?;
            Some((name.clone(), header.get(tensor)?.range.clone()))
        };
        let (name, range) = self.0.iter().find_map(place).expect("a stored tensor");
        &mut self.0.get_mut(&name).expect("its file")[range]
    }

    /// Replaces text of a file's header by text of the same length.
    ///
    /// # Panics
    /// Where it is not there.
    pub fn rewrite(&mut self, file: &str, from: &str, to: &str) {
        assert_eq!(from.len(), to.len(), "offsets stay");
        let bytes = self.0.get_mut(file).expect("a file");
        let found = bytes.windows(from.len()).position(|text| text == from.as_bytes());
        let at = found.unwrap_or_else(|| panic!("{from} is not in {file}"));
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    }
}
