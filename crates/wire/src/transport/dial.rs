//! The connecting side: a TCP connection, a handshake, and the peer's word that it took us.

use std::error::Error;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use identity::{Expect, Tls};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::http::Uri;
use tower::Service;

use super::{CONNECT_TIMEOUT, PROTOCOL};

/// Bytes that are read to see whether the peer has taken us: an HTTP/2 server speaks first.
const GREETING: usize = 256;

/// Why a connection did not come about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// `host:port` was expected.
    #[error("the address is not one")]
    Address,
    /// Nobody listens there.
    #[error("{address} cannot be reached: {why}")]
    Unreachable {
        /// Where.
        address: String,
        /// What the operating system said.
        why: String,
    },
    /// Somebody does, but did not answer.
    #[error("{address} does not answer")]
    Silent {
        /// Where.
        address: String,
    },
    /// It is not the one that was expected, or we are not welcome.
    #[error("{address}: {why}")]
    Handshake {
        /// Where.
        address: String,
        /// In words.
        why: String,
    },
    /// The peer says that this node was removed from the cluster: there is no use in trying again.
    #[error("{address}: this node was removed from the cluster")]
    Removed {
        /// Where.
        address: String,
    },
    /// The connection ended as soon as it stood.
    #[error("the connection broke: {0}")]
    Broken(String),
}

/// The connection error within an error of tonic's.
pub(super) fn cause(error: &(dyn Error + 'static)) -> Option<ConnectError> {
    match error.downcast_ref::<ConnectError>() {
        Some(found) => Some(found.clone()),
        None => cause(error.source()?),
    }
}

type Dialled =
    Pin<Box<dyn Future<Output = Result<TokioIo<Opened>, ConnectError>> + Send + 'static>>;

/// What an opened connection is to tonic.
type Io = TokioIo<Opened>;

/// What a channel connects with, each time it has to.
pub(super) fn connector(
    expect: Expect,
    tls: &Tls,
) -> impl Service<Uri, Response = Io, Error = ConnectError, Future = Dialled> + Send + 'static {
    let tls = tls.clone();
    tower::service_fn(move |uri: Uri| -> Dialled {
        let tls = tls.clone();
        Box::pin(async move {
            let address = uri.authority().ok_or(ConnectError::Address)?.to_string();
            match tokio::time::timeout(CONNECT_TIMEOUT, dial(&address, expect, &tls)).await {
                Ok(dialled) => dialled.map(TokioIo::new),
                Err(_) => Err(ConnectError::Silent { address }),
            }
        })
    })
}

async fn dial(address: &str, expect: Expect, tls: &Tls) -> Result<Opened, ConnectError> {
    let unreachable = |error: io::Error| {
        let (address, why) = (address.to_owned(), error.to_string());
        ConnectError::Unreachable { address, why }
    };
    let stream = TcpStream::connect(address).await.map_err(unreachable)?;
    stream.set_nodelay(true).map_err(unreachable)?;
    greet(stream, expect, tls).await.map_err(|error| {
        let address = address.to_owned();
        if identity::says_removed(&error) {
            return ConnectError::Removed { address };
        }
        let why = identity::explain_io(&error).unwrap_or_else(|| match error.kind() {
            io::ErrorKind::UnexpectedEof => "it ended the handshake".to_owned(),
            _ => error.to_string(),
        });
        ConnectError::Handshake { address, why }
    })
}

/// The handshake. In TLS 1.3 a client has finished before the server has judged its certificate:
/// a refusal comes in place of the server's first words, so those are waited for.
async fn greet(stream: TcpStream, expect: Expect, tls: &Tls) -> io::Result<Opened> {
    let config = tls.client_config(expect, &[PROTOCOL]).map_err(io::Error::other)?;
    let name = tls.server_name(expect).map_err(io::Error::other)?;
    let mut stream = TlsConnector::from(config).connect(name, stream).await?;
    let mut first = Vec::with_capacity(GREETING);
    match stream.read_buf(&mut first).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(Opened { first, taken: 0, stream }),
    }
}

/// A connection of which the first bytes have been read already.
pub(super) struct Opened {
    first: Vec<u8>,
    taken: usize,
    stream: TlsStream<TcpStream>,
}

impl AsyncRead for Opened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let opened = &mut *self;
        let left = &opened.first[opened.taken..];
        if left.is_empty() {
            return Pin::new(&mut opened.stream).poll_read(cx, buffer);
        }
        let count = left.len().min(buffer.remaining());
        buffer.put_slice(&left[..count]);
        opened.taken += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Opened {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
