//! HTTP in, tokens out: the OpenAI-compatible gateway.
//!
//! ```text
//! routes ─> api (parse, check) ─> face (tokenizer, template) ─> generate ─> way ─> leader
//!                                                            │
//! client <─ stream (SSE, or whole) <─ stop <─ detokenizer <──┘
//! ```
//! [`serve`] takes its listener, its configuration, a view of the cluster and its shutdown. Each
//! request becomes sequences; each sequence is one gRPC stream to the leader of the group that
//! serves (`way`), and keeps its token log. When the group is lost the sequence goes on from there
//! in the next one, with the same bytes: its client sees a pause.
//!
//! A gateway has a `face` for each of its models. The name in a request is looked up once, at its
//! start: an alias means a deployment, that is of a model, and its face is the request's from then
//! on, whatever the alias means later.
//!
//! Decisions worth knowing: unknown request fields are refused by name rather than ignored; raw
//! completions prompts may hold control tokens, texts in chats never become any; parameters that a
//! request leaves out come from the model's `generation_config.json` unless that says
//! `do_sample: false`; a body without `content-type: application/json` is refused, as pages of
//! other sites can make a browser send such bodies.
#![forbid(unsafe_code)]

mod api;
mod bounded;
mod clock;
mod config;
mod defaults;
mod detokenizer;
mod dialect;
mod error;
mod face;
mod gateway;
mod generate;
mod generators;
mod health;
mod idempotency;
mod json;
mod leader;
mod life;
mod load;
mod markup;
mod metrics;
mod patience;
#[cfg(test)]
mod published;
mod rehearse;
mod routes;
mod seats;
mod server;
mod specials;
mod stop;
mod stream;
mod template;
mod tokenizer;
mod view;
mod way;

#[cfg(test)]
mod http_tests;

use std::sync::Arc;

use identity::Tls;
use tokio::net::TcpListener;

pub use config::{GatewayConfig, GatewayError, ModelFiles, RequestLimits, ServedModel};
pub use life::Vitals;
pub use rehearse::{try_template, try_tokenizer};
pub use view::Sources;

/// Serves the API on `listener` until `shutdown` completes, then lets open answers end for at
/// most `config.limits.drain`. Group leaders are reached as the coordinator that `tls` is.
///
/// # Errors
/// The model's files cannot be used, or the listener failed for good.
pub async fn serve(
    listener: TcpListener,
    config: GatewayConfig,
    sources: Sources,
    tls: Tls,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), GatewayError> {
    let vitals = Arc::clone(&sources.vitals);
    let gateway = Arc::new(gateway::Gateway::new(config, Box::new(sources), vitals, tls)?);
    let limits = gateway.config.limits.clone();
    server::run(listener, routes::router(gateway), &limits, shutdown).await
}
