//! When a certificate is to be replaced: by its age, or because the cluster has said so.

use std::path::Path;
use std::time::SystemTime;

use crate::files::{self, Secrecy};
use crate::{Credential, IdentityError};

/// Beside the certificate: the generation it is of.
const GENERATION_FILE: &str = "generation";

impl Credential {
    /// Whether two thirds of its life have passed. One whose dates cannot be read is due as well.
    pub fn is_due(&self, now: SystemTime) -> bool {
        let Ok((from, until)) = self.validity() else { return true };
        let life = until.duration_since(from).unwrap_or_default();
        now >= from + life / 3 * 2
    }
}

/// The generation that the certificate in `directory` is of; 0 where nothing says so.
pub fn generation(directory: &Path) -> u64 {
    let text = std::fs::read_to_string(directory.join(GENERATION_FILE));
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Takes note of the generation that the certificate in `directory` is of.
///
/// # Errors
/// The file cannot be written; the error names it.
pub fn set_generation(directory: &Path, generation: u64) -> Result<(), IdentityError> {
    let path = directory.join(GENERATION_FILE);
    files::write(&path, format!("{generation}\n").as_bytes(), Secrecy::Public)
}
