//! Credential files: written whole or not at all, and private keys for their owner only.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustls_pki_types::pem::{PemObject, SectionKind};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use crate::error::{FileFlaw, IdentityError};

/// The roots that a node trusts; beside a CA key also that authority's certificate.
pub const CA_FILE: &str = "ca.pem";
/// The authority's private key.
pub const CA_KEY_FILE: &str = "ca-key.pem";
/// A node's certificate.
pub const CERTIFICATE_FILE: &str = "node.pem";
/// A node's private key.
pub const KEY_FILE: &str = "node-key.pem";
/// An operator's certificate, key and roots.
pub const OPERATOR_FILE: &str = "operator.pem";

/// Bytes of a credential file; far more than there ever are.
const SIZE_MAX: u64 = 1 << 20;

/// Permission bits that give anybody but the owner anything.
const OTHERS: u32 = 0o077;

pub(crate) fn flaw(path: &Path, why: impl Into<FileFlaw>) -> IdentityError {
    IdentityError::File { path: path.to_owned(), why: why.into() }
}

/// Makes a directory that only its owner can enter, and those above it. One that exists is taken as
/// it is, but must not be open to others' changes.
///
/// # Errors
/// The operating system refused, or others may write to it.
pub fn private_dir(path: &Path) -> Result<(), IdentityError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| flaw(path, error))?;
    let metadata = fs::metadata(path).map_err(|error| flaw(path, error))?;
    let mode = metadata.permissions().mode() & 0o777;
    match mode & 0o022 {
        0 => Ok(()),
        _ => Err(flaw(path, FileFlaw::Exposed { mode })),
    }
}

/// What a file is for, which decides its mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Secrecy {
    /// Certificates: 0644.
    Public,
    /// Private keys: 0600, refused on reading where others have any access.
    Private,
}

/// Writes a file whole: into a new one beside it, synced, then renamed over it.
pub(crate) fn write(path: &Path, bytes: &[u8], secrecy: Secrecy) -> Result<(), IdentityError> {
    let mode = match secrecy {
        Secrecy::Public => 0o644,
        Secrecy::Private => 0o600,
    };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let beside = path.with_file_name(name);
    let put = || -> io::Result<()> {
        // One left behind by a crash would keep its own mode.
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        // Whatever the umask took away.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        let directory = path.parent().filter(|above| !above.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    };
    put().map_err(|error| flaw(path, error))
}

/// Refuses to replace what is there.
pub(crate) fn absent(path: &Path) -> Result<(), IdentityError> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(flaw(path, error)),
        Ok(_) => Err(flaw(path, FileFlaw::Exists)),
    }
}

/// Reads a credential file, a private one only where it is.
pub(crate) fn read(path: &Path, secrecy: Secrecy) -> Result<Vec<u8>, IdentityError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(flaw(path, FileFlaw::Missing));
        }
        opened => opened.map_err(|error| flaw(path, error))?,
    };
    // Of the file that is open, not of whatever the name stands for by now.
    let metadata = file.metadata().map_err(|error| flaw(path, error))?;
    if !metadata.is_file() || metadata.len() > SIZE_MAX {
        return Err(flaw(path, FileFlaw::NotOne));
    }
    let mode = metadata.permissions().mode() & 0o777;
    if secrecy == Secrecy::Private && mode & OTHERS != 0 {
        return Err(flaw(path, FileFlaw::Exposed { mode }));
    }
    let mut bytes = Vec::new();
    let read = file.take(SIZE_MAX).read_to_end(&mut bytes);
    read.map_err(|error| flaw(path, error))?;
    Ok(bytes)
}

/// Every certificate of a PEM file; at least one.
pub(crate) fn certificates(
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let none = || flaw(path, FileFlaw::NoPem { what: "certificate" });
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    found.ok().filter(|found| !found.is_empty()).ok_or_else(none)
}

/// The private key of a PEM file.
pub(crate) fn key(path: &Path, pem: &[u8]) -> Result<PrivatePkcs8KeyDer<'static>, IdentityError> {
    let key = PrivatePkcs8KeyDer::from_pem_slice(pem);
    key.map_err(|_| flaw(path, FileFlaw::NoPem { what: "private key (PKCS #8)" }))
}

/// A PEM block.
pub(crate) fn pem(kind: SectionKind, der: &[u8]) -> String {
    use base64::Engine as _;
    let label = match kind {
        SectionKind::PrivateKey => "PRIVATE KEY",
        _ => "CERTIFICATE",
    };
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(64) {
        text.extend(line.iter().map(|byte| char::from(*byte)));
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

/// A file in a directory.
pub(crate) fn within(directory: &Path, name: &str) -> PathBuf {
    directory.join(name)
}
