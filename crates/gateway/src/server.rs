//! Connections: HTTP/1.1 with limits on heads, on time and on their number.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::config::{GatewayError, RequestLimits};
use crate::patience::Patient;

/// Most bytes of a request's head.
const HEAD_BYTES: usize = 32 << 10;
/// Most headers of a request.
const HEADERS: usize = 64;
/// Errors of `accept` in a row that are taken for passing (no file handles, say).
const ACCEPT_ERRORS: u32 = 100;

/// Serves until `shutdown`; then open answers have `limits.drain` to end.
pub(crate) async fn run(
    listener: TcpListener,
    router: Router,
    limits: &RequestLimits,
    shutdown: impl Future<Output = ()>,
) -> Result<(), GatewayError> {
    let places = Arc::new(Semaphore::new(limits.connections.max(1)));
    let (closing, closed) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    let times = (limits.receive_timeout, limits.send_timeout);
    let mut errors = 0;
    loop {
        let accepted = tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = accept(&listener, &places) => accepted,
        };
        let Some((stream, place)) = (match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                errors += 1;
                if errors >= ACCEPT_ERRORS {
                    return Err(GatewayError::Listen(error));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        }) else {
            break;
        };
        errors = 0;
        let served = serve(stream, router.clone(), times, closed.clone());
        connections.spawn(async move {
            served.await;
            drop(place);
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

type Accepted = Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)>;

/// The next connection, once there is a place for it.
async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> std::io::Result<Accepted> {
    let Ok(place) = Arc::clone(places).acquire_owned().await else { return Ok(None) };
    let (stream, _) = listener.accept().await?;
    Ok(Some((stream, place)))
}

async fn serve(
    stream: TcpStream,
    router: Router,
    (head_timeout, send_timeout): (Duration, Duration),
    mut closing: watch::Receiver<bool>,
) {
    // Tokens are small; waiting to fill a packet would delay each.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection stays with delayed sending");
    }
    let service = tower_service(router);
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
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection ended early");
    }
}

fn tower_service(
    router: Router,
) -> impl hyper::service::Service<
    hyper::Request<Incoming>,
    Response = axum::response::Response,
    Error = std::convert::Infallible,
    Future: Send,
> {
    let router = TowerToHyperService::new(router);
    hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        hyper::service::Service::call(&router, request.map(Body::new))
    })
}
