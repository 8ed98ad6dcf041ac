//! Who the ranks of a group are, and the encryption between them.
//!
//! Both directions of a TLS connection share one state, but a link reads and writes at the same
//! time. So the state stands behind a lock that is held for the arithmetic only: ciphertext is read
//! and written outside it, and neither direction ever waits for the other's socket.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard};

use rustls::pki_types::CertificateDer;
use rustls::{ClientConnection, Connection, ServerConnection};

/// Ciphertext that is read at a time.
const READ_BYTES: usize = 128 << 10;

/// How the ranks of one group know each other. What a handshake can decide it must decide: whom
/// these connections take for their peer is never asked for less than a certificate.
pub trait Secure: Send + Sync {
    /// A connection to rank `peer`, which only the node that holds it can answer.
    ///
    /// # Errors
    /// There is no such rank, or no identity to show.
    fn dial(&self, peer: usize) -> Result<ClientConnection, rustls::Error>;

    /// A connection from any node of the group, and from nobody else.
    ///
    /// # Errors
    /// There is no identity to show.
    fn accept(&self) -> Result<ServerConnection, rustls::Error>;

    /// Whether a certificate, which the handshake has verified, is that of the node which holds
    /// rank `rank`.
    fn holds(&self, certificate: &CertificateDer<'_>, rank: usize) -> bool;
}

/// An established connection, its handshake done.
pub(super) struct Secured {
    pub(super) stream: TcpStream,
    pub(super) tls: Connection,
}

impl fmt::Debug for Secured {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Secured").field("stream", &self.stream).finish_non_exhaustive()
    }
}

/// The state of one TLS connection, for its reader and its writer.
pub(super) struct Cipher {
    tls: Mutex<Connection>,
}

impl Cipher {
    pub(super) fn new(tls: Connection) -> Arc<Self> {
        Arc::new(Self { tls: Mutex::new(tls) })
    }

    /// A state that a panic may have left half changed is not used again.
    fn lock(&self) -> io::Result<MutexGuard<'_, Connection>> {
        self.tls.lock().map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Appends the ciphertext of `plain`, and of whatever else has to be sent before it.
    pub(super) fn seal(&self, plain: &[u8], sealed: &mut Vec<u8>) -> io::Result<()> {
        let mut tls = self.lock()?;
        let mut rest = plain;
        while !rest.is_empty() {
            let taken = tls.writer().write(rest)?;
            rest = &rest[taken..];
            drain(&mut tls, sealed)?;
        }
        Ok(())
    }

    /// Appends the ciphertext of `plain` and of the word that nothing follows.
    pub(super) fn seal_last(&self, plain: &[u8], sealed: &mut Vec<u8>) -> io::Result<()> {
        self.seal(plain, sealed)?;
        let mut tls = self.lock()?;
        tls.send_close_notify();
        drain(&mut tls, sealed)
    }
}

fn drain(tls: &mut Connection, sealed: &mut Vec<u8>) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(sealed)?;
    }
    Ok(())
}

/// The reading side of a connection.
pub(super) struct Reader {
    pub(super) stream: TcpStream,
    cipher: Arc<Cipher>,
    /// Ciphertext that has been read and not been opened yet.
    sealed: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Reader {
    pub(super) fn new(stream: TcpStream, cipher: Arc<Cipher>) -> Self {
        let sealed = vec![0; READ_BYTES].into_boxed_slice();
        Self { stream, cipher, sealed, start: 0, end: 0 }
    }

    /// Reads at least a byte; 0 once the peer has said that nothing follows. An end without that
    /// word is `UnexpectedEof`. Blocks no longer than the stream does.
    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(count) = self.open(into)? {
                return Ok(count);
            }
            match self.stream.read(&mut self.sealed)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => (self.start, self.end) = (0, count),
            }
        }
    }

    /// Opens what has been read; `None` if that is not enough for a byte.
    fn open(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let mut tls = self.cipher.lock()?;
        let mut filled = 0;
        loop {
            match tls.reader().read(&mut into[filled..]) {
                Ok(0) => return Ok(Some(filled)),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.start == self.end {
                        return Ok((filled > 0).then_some(filled));
                    }
                    let mut rest = &self.sealed[self.start..self.end];
                    tls.read_tls(&mut rest)?;
                    self.start = self.end - rest.len();
                    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
                    tls.process_new_packets().map_err(invalid)?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}
