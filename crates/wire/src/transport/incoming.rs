//! The accepting side: connections come out of it only when their handshake is done.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use identity::{Admit, Peer, Tls};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;
use tonic::transport::server::{Connected, TcpIncoming};

use super::{PROBE_INTERVAL, PROTOCOL};

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes under way at a time; beyond it the oldest is dropped. A member is done within
/// milliseconds, so what has waited longest is a stray.
const HANDSHAKES: usize = 64;

/// Between two lines of the log about refused handshakes.
const QUIET: Duration = Duration::from_secs(10);

/// A connection whose peer has proved who it is. It breaks once that one was removed from the
/// cluster.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    tls: Tls,
}

/// Who is at the other end of a connection; part of every request that comes over it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// As the handshake has verified.
    pub peer: Peer,
    /// Where it calls from.
    pub address: SocketAddr,
}

impl Connection {
    /// Whether small writes are sent at once.
    ///
    /// # Errors
    /// The socket is gone.
    pub fn nodelay(&self) -> io::Result<bool> {
        self.stream.get_ref().0.nodelay()
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.tls.refuses(&self.caller.peer) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
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

/// What became of a listener's handshakes.
#[derive(Debug, Clone, Default)]
pub struct Handshakes {
    admitted: Arc<AtomicU64>,
    refused: Arc<AtomicU64>,
    /// When the log was told of a refusal, and how many there were until then.
    told: Arc<Mutex<Option<(Instant, u64)>>>,
}

impl Handshakes {
    /// Those that gave a connection.
    pub fn admitted(&self) -> u64 {
        self.admitted.load(Ordering::Relaxed)
    }

    /// Those that failed, or took too long.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Counts a refusal and says so, at most every [`QUIET`]: strangers must not fill the log.
    fn refuse(&self, address: Option<SocketAddr>, why: &str) {
        let refused = self.refused.fetch_add(1, Ordering::Relaxed) + 1;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_some_and(|(at, _)| at.elapsed() < QUIET) {
            tracing::debug!(?address, why, "a connection was refused");
            return;
        }
        let since = refused.saturating_sub(told.map_or(0, |(_, before)| before));
        *told = Some((Instant::now(), refused));
        let address = address.map(|address| address.to_string());
        tracing::warn!(address, why, since, "a connection was refused");
    }
}

/// The connections of a listener, for `serve_with_incoming`. A handshake that fails ends nothing
/// but its own connection.
pub struct Incoming {
    listener: TcpIncoming,
    acceptor: TlsAcceptor,
    tls: Tls,
    running: JoinSet<Option<Connection>>,
    /// The running ones by age; some may have ended.
    oldest: VecDeque<AbortHandle>,
    handshakes: Handshakes,
}

/// Takes connections from those whom `admit` admits.
///
/// # Errors
/// The cryptography cannot do TLS 1.3.
pub fn incoming(listener: TcpListener, tls: &Tls, admit: Admit) -> io::Result<Incoming> {
    let config = tls.server_config(admit, &[PROTOCOL]).map_err(io::Error::other)?;
    let listener = TcpIncoming::from(listener);
    Ok(Incoming {
        listener: listener.with_nodelay(Some(true)).with_keepalive(Some(PROBE_INTERVAL)),
        acceptor: TlsAcceptor::from(config),
        tls: tls.clone(),
        running: JoinSet::new(),
        oldest: VecDeque::new(),
        handshakes: Handshakes::default(),
    })
}

impl Incoming {
    /// Counts what became of handshakes; it goes on counting when the stream has been given away.
    pub fn handshakes(&self) -> Handshakes {
        self.handshakes.clone()
    }

    fn begin(&mut self, stream: TcpStream) {
        self.oldest.retain(|handshake| !handshake.is_finished());
        if self.oldest.len() >= HANDSHAKES
            && let Some(oldest) = self.oldest.pop_front()
        {
            oldest.abort();
            self.handshakes.refuse(None, "others came before it was done");
        }
        let (acceptor, handshakes) = (self.acceptor.clone(), self.handshakes.clone());
        let tls = self.tls.clone();
        let handshake = self.running.spawn(async move {
            let address = stream.peer_addr().ok();
            let result =
                tokio::time::timeout(HANDSHAKE_TIMEOUT, accept(&acceptor, stream, tls)).await;
            let why = match result {
                Ok(Ok(connection)) => {
                    handshakes.admitted.fetch_add(1, Ordering::Relaxed);
                    return Some(connection);
                }
                Ok(Err(error)) => identity::explain_io(&error).unwrap_or_else(|| error.to_string()),
                Err(_) => "it took too long".to_owned(),
            };
            handshakes.refuse(address, &why);
            None
        });
        self.oldest.push_back(handshake);
    }
}

async fn accept(acceptor: &TlsAcceptor, stream: TcpStream, tls: Tls) -> io::Result<Connection> {
    let address = stream.peer_addr()?;
    let stream = acceptor.accept(stream).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|shown| shown.first());
    // The handshake fails without one.
    let shown = shown.ok_or(io::ErrorKind::InvalidData)?;
    let (_, peer) = Peer::read(shown).map_err(io::Error::other)?;
    Ok(Connection { stream, caller: Caller { peer, address }, tls })
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let incoming = &mut *self;
        while let Poll::Ready(accepted) = Pin::new(&mut incoming.listener).poll_next(cx) {
            match accepted {
                Some(Ok(stream)) => incoming.begin(stream),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            }
        }
        loop {
            match ready!(incoming.running.poll_join_next(cx)) {
                Some(Ok(Some(connection))) => return Poll::Ready(Some(Ok(connection))),
                // Refused, or dropped for younger ones.
                Some(_) => {}
                // The listener wakes us.
                None => return Poll::Pending,
            }
        }
    }
}
