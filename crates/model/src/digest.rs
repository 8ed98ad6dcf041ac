//! Which weights these are: one digest over the names, lengths and contents of a model's files.

use std::fmt;
use std::str::FromStr;

/// The digest of a model directory. Two workers with the same digest hold the same weights.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelDigest(pub [u8; 32]);

/// Why a digest could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// Files have to come in ascending order, each once, so that the digest has one value.
    #[error("file {name:?} does not come after {before:?}")]
    Order {
        /// The file given.
        name: String,
        /// The file given before it.
        before: String,
    },
    /// Text that is no digest.
    #[error("a digest is 64 hexadecimal digits")]
    Malformed,
}

impl fmt::Display for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelDigest({self})")
    }
}

impl FromStr for ModelDigest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        // `from_str_radix` would take a sign.
        let hex = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !hex {
            return Err(DigestError::Malformed);
        }
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            let digits = &text[2 * at..2 * at + 2];
            *byte = u8::from_str_radix(digits, 16).map_err(|_| DigestError::Malformed)?;
        }
        Ok(ModelDigest(bytes))
    }
}

/// Collects a model's files in ascending order of their names.
#[derive(Debug, Clone)]
pub struct DigestBuilder {
    hasher: blake3::Hasher,
    last: Option<String>,
    files: u64,
}

impl Default for DigestBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl DigestBuilder {
    /// A digest of no files yet.
    pub fn new() -> Self {
        // A context of its own: no other hash in the system can be mistaken for this one.
        let hasher = blake3::Hasher::new_derive_key("phalanx 2026 model directory digest v1");
        Self { hasher, last: None, files: 0 }
    }

    /// Adds a file: its name within the directory, its length in bytes and the BLAKE3 hash of its
    /// content.
    ///
    /// # Errors
    /// The name does not come after the one before it in byte order.
    pub fn add(
        &mut self,
        name: &str,
        length: u64,
        content_hash: [u8; 32],
    ) -> Result<(), DigestError> {
        if let Some(before) = self.last.as_deref().filter(|before| *before >= name) {
            return Err(DigestError::Order { name: name.to_owned(), before: before.to_owned() });
        }
        // Every item has a length before it or is of fixed size, so no two lists coincide.
        self.hasher.update(&(name.len() as u64).to_le_bytes());
        self.hasher.update(name.as_bytes());
        self.hasher.update(&length.to_le_bytes());
        self.hasher.update(&content_hash);
        self.last = Some(name.to_owned());
        self.files += 1;
        Ok(())
    }

    /// The digest of the files added.
    pub fn finish(mut self) -> ModelDigest {
        self.hasher.update(&self.files.to_le_bytes());
        ModelDigest(*self.hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(files: &[(&str, u64, u8)]) -> ModelDigest {
        let mut builder = DigestBuilder::new();
        for &(name, length, fill) in files {
            builder.add(name, length, [fill; 32]).unwrap();
        }
        builder.finish()
    }

    #[test]
    fn every_property_counts() {
        let base = digest(&[("a", 1, 0), ("b", 2, 1)]);
        assert_eq!(base, digest(&[("a", 1, 0), ("b", 2, 1)]));
        for other in [
            digest(&[]),
            digest(&[("a", 1, 0)]),
            digest(&[("a", 2, 0), ("b", 2, 1)]),
            digest(&[("a", 1, 9), ("b", 2, 1)]),
            digest(&[("a", 1, 0), ("c", 2, 1)]),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn order_is_required() {
        let mut builder = DigestBuilder::new();
        builder.add("b", 0, [0; 32]).unwrap();
        for name in ["a", "b"] {
            let expected = DigestError::Order { name: name.to_owned(), before: "b".to_owned() };
            assert_eq!(builder.add(name, 0, [0; 32]), Err(expected));
        }
    }

    #[test]
    fn text_form_round_trips_and_is_strict() {
        let digest = digest(&[("a", 1, 0)]);
        let text = digest.to_string();
        assert_eq!(text.len(), 64);
        assert_eq!(text.parse(), Ok(digest));
        assert_eq!(text.to_uppercase().parse(), Ok(digest));
        for wrong in ["", &text[1..], &format!("+{}", &text[1..]), &"é".repeat(32)] {
            assert_eq!(wrong.parse::<ModelDigest>(), Err(DigestError::Malformed), "{wrong}");
        }
    }
}
