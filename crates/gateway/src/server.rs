//! Connections: HTTP/1.1 with limits on heads, on time and on their number.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::config::{GatewayError, RequestLimits};
use crate::error::ApiError;
use crate::patience::Patient;
use crate::seats::{Kept, Seat, Seats};

/// Most bytes of a request's head.
const HEAD_BYTES: usize = 32 << 10;
/// Most headers of a request.
const HEADERS: usize = 64;
/// Errors of `accept` in a row that are taken for passing (no file handles, say).
const ACCEPT_ERRORS: u32 = 100;

/// Places above the limit for connections that are about to give way.
const SPARE: usize = 64;
/// Refusals that are told at once. Further connections wait to be accepted, each for a moment:
/// nobody is turned away without a word, and health is asked for among them.
const REFUSALS: usize = 512;
/// How long a refused connection may take to read why.
const REFUSAL_TIME: Duration = Duration::from_secs(1);

/// How long a connection that only asks for health may take where there is no place for it.
const HEALTH_TIME: Duration = Duration::from_secs(3);
/// How a request for health begins.
const HEALTH: [&[u8]; 4] = [b"GET /livez", b"GET /readyz", b"GET /startupz", b"GET /health"];

/// Serves until `shutdown`; then open answers have `limits.drain` to end.
pub(crate) async fn run(
    listener: TcpListener,
    router: Router,
    limits: &RequestLimits,
    shutdown: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    let (closing, closed) = watch::channel(false);
    let (mut connections, mut refusals) = (JoinSet::new(), JoinSet::new());
    let mut seats = Seats::default();
    let mut shutdown = std::pin::pin!(shutdown);
    let times = (limits.head_timeout, limits.send_timeout);
    let mut errors = 0;
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = connections.join_next(), if !connections.is_empty() => {
                ended.into_iter().for_each(|number| seats.free(number));
                continue;
            }
            Some(_) = refusals.join_next(), if !refusals.is_empty() => continue,
            accepted = listener.accept(), if refusals.len() < REFUSALS => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                errors += 1;
                if errors >= ACCEPT_ERRORS {
                    return Err(GatewayError::Listen(error));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        errors = 0;
        let limit = limits.connections.max(1);
        let full = connections.len() >= limit + SPARE;
        if full || (seats.taken() >= limit && !seats.give_way()) {
            refusals.spawn(refuse(stream, router.clone(), closed.clone()));
            continue;
        }
        let (number, seat) = seats.take();
        let served = serve(stream, router.clone(), times, seat, closed.clone());
        connections.spawn(async move {
            served.await;
            number
        });
    }
    drop(listener);
    // Nobody listens any more where no connection is open.
    let _ = closing.send(true);
    let drained = timeout(limits.drain, async { while connections.join_next().await.is_some() {} });
    if drained.await.is_err() {
        connections.shutdown().await;
    }
    Ok(())
}

/// Tells a connection that there is no place for it, or serves it if it asks for health: a process
/// that is busy would be taken for dead, and started again.
async fn refuse(mut stream: TcpStream, router: Router, closed: watch::Receiver<bool>) {
    let mut begin = [0; 16];
    let read = timeout(REFUSAL_TIME, stream.peek(&mut begin)).await;
    let read = read.ok().and_then(Result::ok).unwrap_or(0);
    if HEALTH.iter().any(|health| begin[..read].starts_with(health)) {
        // One request and no more: the head of another does not come in time.
        let (times, seat) = ((REFUSAL_TIME, HEALTH_TIME), Arc::new(Seat::default()));
        let _ = timeout(HEALTH_TIME, serve(stream, router, times, seat, closed)).await;
        return;
    }
    let body = ApiError::no_place().body().to_string();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let told = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        // A request left unread would reset the connection before the answer is seen.
        let mut request = [0; 4096];
        while stream.read(&mut request).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    if let Ok(Err(error)) = timeout(REFUSAL_TIME, told).await {
        tracing::debug!(%error, "a refused connection ended early");
    }
}

async fn serve(
    stream: TcpStream,
    router: Router,
    (head_timeout, send_timeout): (Duration, Duration),
    seat: Arc<Seat>,
    mut closing: watch::Receiver<bool>,
) {
    // Tokens are small; waiting to fill a packet would delay each.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection stays with delayed sending");
    }
    let service = tower_service(router, Arc::clone(&seat));
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(head_timeout);
    builder.max_headers(HEADERS).max_buf_size(HEAD_BYTES);
    let connection =
        builder.serve_connection(TokioIo::new(Patient::new(stream, send_timeout)), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = async { drop(closing.wait_for(|closing| *closing).await) } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        unused = seat.wanted() => {
            if unused {
                return;
            }
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}

fn tower_service(
    router: Router,
    seat: Arc<Seat>,
) -> impl hyper::service::Service<
    hyper::Request<Incoming>,
    Response = axum::response::Response,
    Error = std::convert::Infallible,
    Future: Send,
> {
    let router = TowerToHyperService::new(router);
    hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        let open = seat.begin();
        let answer = hyper::service::Service::call(&router, request.map(Body::new));
        async move { Ok(answer.await?.map(|body| Body::new(Kept { body, _open: open }))) }
    })
}
