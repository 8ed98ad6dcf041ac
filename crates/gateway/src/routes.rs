//! The route table, and each route's few lines.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::rejection::PathRejection;
use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

use crate::api::chat::{ChatRequest, ChatWriter};
use crate::api::completions::{CompletionsRequest, CompletionsWriter};
use crate::api::fields::{Fields, Prompt};
use crate::api::models;
use crate::api::options::Options;
use crate::api::shape::{Identity, Usage};
use crate::api::tokens::{DetokenizeRequest, Input, TokenizeRequest};
use crate::clock::unix_seconds;
use crate::detokenizer::Detokenizer;
use crate::error::ApiError;
use crate::face::Meant;
use crate::gateway::{Gateway, kib};
use crate::idempotency::{Key, Part, Ticket};
use crate::stream::{Writer, collect, respond};
use crate::view::Named;

type Shared = State<Arc<Gateway>>;
type Answer = Result<Response, ApiError>;

/// The id of a request, in its headers, its answer's id and the logs.
#[derive(Debug, Clone)]
struct RequestId(String);

/// Every route there is.
pub(crate) fn router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*id}", get(one_model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/health", get(health))
        .route("/readyz", get(health))
        .route("/startupz", get(started))
        .route("/livez", get(alive))
        .route("/version", get(version))
        .route("/metrics", get(metrics))
        .fallback(async || ApiError::no_route())
        .method_not_allowed_fallback(async || ApiError::no_method())
        .layer(from_fn_with_state(Arc::clone(&gateway), identify))
        .with_state(gateway)
}

/// On answers that were given before.
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// Most bytes of a refused body that are read so that its sender sees the refusal.
const DISCARD_BYTES: usize = 64 << 20;
/// And how long that may take; below the time a whole body may take.
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// Gives every request an id and counts its answer.
async fn identify(State(gateway): Shared, mut request: Request, next: Next) -> Response {
    let id = Uuid::new_v4().simple().to_string();
    let matched = request.extensions().get::<MatchedPath>();
    let route = matched.map_or("none", MatchedPath::as_str).to_owned();
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    let status = response.status().as_u16();
    gateway.metrics.answered(&route, status);
    tracing::debug!(%id, %route, status, "answered");
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(HeaderName::from_static("x-request-id"), value);
    }
    response
}

/// Reads a JSON body within the limits of size and time. The room keeps its share until the
/// body's texts are tokens.
async fn read_body(gateway: &Gateway, request: Request) -> Result<(Bytes, Room), ApiError> {
    let limits = &gateway.config.limits;
    if let Err(refused) = check_head(request.headers(), limits.body_bytes) {
        // A client that asks first sends nothing after a refusal.
        if !request.headers().contains_key(header::EXPECT) {
            discard(&mut request.into_body().into_data_stream()).await;
        }
        return Err(refused);
    }
    let read = gather(gateway, request.into_body());
    let read = tokio::time::timeout(limits.receive_timeout, read).await;
    read.map_err(|_| ApiError::slow_body())?
}

/// The beginning of every body is free, so that large bodies which come slowly cannot keep out
/// ordinary requests. Over all connections it stays below what large bodies may take together.
const SMALL_BODY: usize = 64 << 10;

/// What a body takes of the room for all large bodies: as much as has arrived, so that clients
/// which announce much and send nothing hold nothing.
#[derive(Default)]
struct Room(Option<OwnedSemaphorePermit>);

impl Room {
    /// Grows to `bytes`, or says that there is no room.
    async fn grow(&mut self, gateway: &Gateway, bytes: usize) -> Result<(), ApiError> {
        let limits = &gateway.config.limits;
        let held = self.0.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let counted = bytes.saturating_sub(SMALL_BODY);
        let wanted = kib(counted.min(limits.bodies_bytes)) as usize;
        let more = u32::try_from(wanted.saturating_sub(held)).unwrap_or(u32::MAX);
        if more == 0 {
            return Ok(());
        }
        let more = Arc::clone(&gateway.bodies).acquire_many_owned(more);
        let more = tokio::time::timeout(limits.room_timeout, more).await;
        let more = more.map_err(|_| ApiError::no_room())?.map_err(|_| ApiError::no_room())?;
        match &mut self.0 {
            Some(room) => room.merge(more),
            None => self.0 = Some(more),
        }
        Ok(())
    }
}

/// Refuses by head what need not be read.
fn check_head(headers: &HeaderMap, limit: usize) -> Result<(), ApiError> {
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    // Browsers send other types, and bodies without one, to foreign sites without asking them
    // first; so a type that is missing or cannot be read is refused too.
    let kind = header(header::CONTENT_TYPE).unwrap_or("");
    let kind = kind.split(';').next().unwrap_or("").trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(ApiError::media_type());
    }
    let announced = header(header::CONTENT_LENGTH).and_then(|n| n.parse::<usize>().ok());
    if announced.is_some_and(|n| n > limit) {
        return Err(ApiError::too_large(limit));
    }
    Ok(())
}

/// Reads the rest of a refused body, bounded in size and time, without keeping it: most clients
/// look for the answer only once they have sent all, and would see a broken connection instead.
async fn discard(chunks: &mut BodyDataStream) {
    let read = async {
        let mut left = DISCARD_BYTES;
        while let Some(Ok(chunk)) = chunks.next().await {
            let Some(rest) = left.checked_sub(chunk.len()) else { return };
            left = rest;
        }
    };
    // However it ends, the answer is the refusal.
    let _ = tokio::time::timeout(DISCARD_TIME, read).await;
}

async fn gather(gateway: &Gateway, body: Body) -> Result<(Bytes, Room), ApiError> {
    let limit = gateway.config.limits.body_bytes;
    let (mut bytes, mut room) = (BytesMut::new(), Room::default());
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk
            .map_err(|_| ApiError::malformed("the request body ended early".to_owned(), None))?;
        let grown = if chunk.len() > limit - bytes.len() {
            Err(ApiError::too_large(limit))
        } else {
            room.grow(gateway, bytes.len() + chunk.len()).await
        };
        if let Err(refused) = grown {
            drop((bytes, room));
            discard(&mut chunks).await;
            return Err(refused);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok((bytes.freeze(), room))
}

/// The card of a model.
fn card(gateway: &Gateway, name: &str) -> Result<Value, ApiError> {
    let Named { deployment, context, .. } = gateway.meant(name)?.named;
    Ok(models::card(name, &deployment, gateway.created, context))
}

async fn list_models(State(gateway): Shared) -> Json<Value> {
    let names = gateway.names();
    Json(models::list(names.iter().filter_map(|name| card(&gateway, name).ok()).collect()))
}

async fn one_model(State(gateway): Shared, id: Result<Path<String>, PathRejection>) -> Answer {
    let Path(id) = id.map_err(|_| ApiError::no_model())?;
    Ok(Json(card(&gateway, &id)?).into_response())
}

fn identity(prefix: &str, id: &RequestId, options: &Options) -> Identity {
    Identity {
        id: format!("{prefix}-{}", id.0),
        created: unix_seconds(std::time::SystemTime::now()),
        model: options.model.clone(),
    }
}

/// The fields of a request to generate, and what the model that it names means. `batch`: most
/// prompts of a list.
fn begin(
    gateway: &Gateway,
    body: &[u8],
    batch: usize,
) -> Result<(Fields, String, Meant), ApiError> {
    let mut fields = Fields::parse(body, batch)?;
    let model = fields.text("model")?.ok_or_else(|| ApiError::missing("model"))?;
    let meant = gateway.meant(&model)?.fresh()?;
    Ok((fields, model, meant))
}

/// The same of a request that only needs the model's tokenizer, and need not name it.
fn begin_text(gateway: &Gateway, body: &[u8], batch: usize) -> Result<(Fields, Meant), ApiError> {
    let mut fields = Fields::parse(body, batch)?;
    let meant = match fields.text("model")? {
        Some(model) => gateway.meant(&model)?,
        None => gateway.default(),
    };
    Ok((fields, meant))
}

/// Of a request with a key: the right to answer it, or what was said to it before. Streams are not
/// kept; who asks again gets the same bytes computed again.
async fn first(
    gateway: &Gateway,
    key: Option<Key>,
    (path, body): (&str, &[u8]),
    options: &Options,
) -> Result<Result<Option<Ticket>, Response>, ApiError> {
    let Some(key) = key else { return Ok(Ok(None)) };
    if options.stream.is_some() {
        return Ok(Ok(gateway.answers.stream(&key, path, body)?));
    }
    Ok(match gateway.answers.begin(&key, path, body).await? {
        Part::First(ticket) => Ok(Some(ticket)),
        Part::Again(bytes) => {
            let headers = [(REPLAYED, "true"), (header::CONTENT_TYPE, "application/json")];
            Err((headers, bytes).into_response())
        }
    })
}

/// An answer in one body, remembered where there is a key.
fn whole(answer: &Value, ticket: Option<Ticket>) -> Response {
    let bytes = Bytes::from(answer.to_string());
    if let Some(ticket) = ticket {
        ticket.answered(&bytes);
    }
    ([(header::CONTENT_TYPE, "application/json")], bytes).into_response()
}

async fn completions(
    State(gateway): Shared,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Answer {
    let key = Key::read(request.headers())?;
    let (body, room) = read_body(&gateway, request).await?;
    let limits = &gateway.config.limits;
    let (fields, model, meant) = begin(&gateway, &body, limits.batch)?;
    // With a key it is drawn from the same seed each time.
    let rules = meant.rules(limits, key.as_ref().map(|key| key.seed(&body)));
    let request = CompletionsRequest::take(fields, model, &rules)?;
    let ticket = match first(&gateway, key, ("/v1/completions", &body), &request.options).await? {
        Ok(ticket) => ticket,
        Err(again) => return Ok(again),
    };
    drop(body);
    let ids = meant.prompt_ids(&gateway, request.prompts.clone(), request.add_special).await?;
    drop(room);
    let jobs = meant.completion_jobs(&request, &ids)?;
    let options = &request.options;
    let prompts = jobs.iter().map(|job| Arc::clone(&ids[job.index / options.choices])).collect();
    let writer = CompletionsWriter {
        identity: identity("cmpl", &id, options),
        tokenizer: Arc::clone(&meant.face.tokenizer),
        as_ids: options.tokens_as_ids,
        logprobs: request.logprobs.is_some(),
        prompt_ids: options.return_ids.then_some(prompts),
    };
    let sequences = gateway.open(&meant, &id.0, jobs).await?;
    let prompt = ids.iter().map(|ids| ids.len()).sum();
    if let Some(stream) = options.stream {
        ticket.into_iter().for_each(Ticket::streams);
        return Ok(respond(Writer::Completions(writer), sequences, stream, prompt));
    }
    let pieces = collect(sequences).await?;
    let completion = pieces.iter().map(|piece| piece.tokens.len()).sum();
    Ok(whole(&writer.whole(&pieces, Usage { prompt, completion }), ticket))
}

async fn chat(
    State(gateway): Shared,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Answer {
    let key = Key::read(request.headers())?;
    let (body, room) = read_body(&gateway, request).await?;
    let (fields, model, meant) = begin(&gateway, &body, 0)?;
    let seed = key.as_ref().map(|key| key.seed(&body));
    let rules = meant.rules(&gateway.config.limits, seed);
    let request = ChatRequest::take(fields, model, &rules)?;
    let path = "/v1/chat/completions";
    let ticket = match first(&gateway, key, (path, &body), &request.options).await? {
        Ok(ticket) => ticket,
        Err(again) => return Ok(again),
    };
    drop(body);
    let ids = meant.chat_ids(&gateway, request.conversation.clone()).await?;
    drop(room);
    let jobs = meant.chat_jobs(&request, &ids)?;
    let options = &request.options;
    let writer = ChatWriter {
        identity: identity("chatcmpl", &id, options),
        tokenizer: Arc::clone(&meant.face.tokenizer),
        as_ids: options.tokens_as_ids,
        logprobs: request.logprobs.is_some(),
        prompt_ids: options.return_ids.then(|| Arc::clone(&ids)),
    };
    let sequences = gateway.open(&meant, &id.0, jobs).await?;
    let prompt = ids.len();
    if let Some(stream) = options.stream {
        ticket.into_iter().for_each(Ticket::streams);
        return Ok(respond(Writer::Chat(writer), sequences, stream, prompt));
    }
    let pieces = collect(sequences).await?;
    let completion = pieces.iter().map(|piece| piece.tokens.len()).sum();
    Ok(whole(&writer.whole(&pieces, Usage { prompt, completion }), ticket))
}

async fn tokenize(State(gateway): Shared, request: Request) -> Answer {
    let (body, room) = read_body(&gateway, request).await?;
    let (fields, meant) = begin_text(&gateway, &body, 1)?;
    let mut request = TokenizeRequest::take(fields, &meant.rules(&gateway.config.limits, None))?;
    drop(body);
    let empty = Input::Text { text: String::new(), add_special: false };
    let ids = match std::mem::replace(&mut request.input, empty) {
        Input::Chat(chat) => meant.chat_ids(&gateway, chat).await?,
        Input::Text { text, add_special } => {
            let ids = meant.prompt_ids(&gateway, vec![Prompt::Text(text)], add_special).await?;
            ids.into_iter().next().unwrap_or_default()
        }
    };
    let (tokenizer, context) = (Arc::clone(&meant.face.tokenizer), meant.named.context);
    // Writing down many tokens takes as long as counting them.
    let answer = move || Ok(request.answer(&ids, &tokenizer, context).to_string());
    let answer = gateway.tokenizing(answer).await?;
    drop(room);
    Ok(([(header::CONTENT_TYPE, "application/json")], answer).into_response())
}

async fn detokenize(State(gateway): Shared, request: Request) -> Answer {
    let (body, room) = read_body(&gateway, request).await?;
    let (fields, meant) = begin_text(&gateway, &body, 0)?;
    let request = DetokenizeRequest::take(fields, &meant.rules(&gateway.config.limits, None))?;
    let tokenizer = Arc::clone(&meant.face.tokenizer);
    let answer = move || {
        let text = Detokenizer::all(&tokenizer, &request.ids, false);
        Ok(json!({"prompt": text}).to_string())
    };
    let answer = gateway.tokenizing(answer).await?;
    drop(room);
    Ok(([(header::CONTENT_TYPE, "application/json")], answer).into_response())
}

/// Healthy means that a request would be served.
async fn health(State(gateway): Shared) -> Answer {
    gateway.healthy().await?;
    Ok(Json(json!({"status": "ok"})).into_response())
}

/// Started means that a group has served: what was loaded once is repaired from then on.
async fn started(State(gateway): Shared) -> Answer {
    gateway.started()?;
    Ok(Json(json!({"status": "ok"})).into_response())
}

/// The process gets on, whatever the cluster does.
async fn alive(State(gateway): Shared) -> Answer {
    gateway.alive()?;
    Ok(Json(json!({"status": "ok"})).into_response())
}

async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

async fn metrics(State(gateway): Shared) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], gateway.scrape().await).into_response()
}
