//! Answers as they come (server-sent events), or whole.
//!
//! Nothing here runs ahead of its reader: the response body asks the sequences, those ask the
//! group leader. A client that leaves drops the body and with it every sequence.

use std::convert::Infallible;
use std::pin::Pin;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use futures::stream::{SelectAll, Stream, StreamExt, select_all};
use serde_json::{Map, Value};

use crate::api::chat::ChatWriter;
use crate::api::completions::CompletionsWriter;
use crate::api::options::StreamOptions;
use crate::api::shape::Usage;
use crate::error::ApiError;
use crate::generate::{Piece, Sequence};

type Pieces = Pin<Box<dyn Stream<Item = Result<Piece, ApiError>> + Send>>;

/// All sequences of a request as one stream of pieces; it ends with the first error.
fn merge(sequences: Vec<Sequence>) -> SelectAll<Pieces> {
    select_all(sequences.into_iter().map(|mut sequence| -> Pieces {
        Box::pin(async_stream::stream! {
            loop {
                match sequence.next().await {
                    Ok(None) => break,
                    Ok(Some(piece)) => yield Ok(piece),
                    Err(error) => {
                        yield Err(error);
                        break;
                    }
                }
            }
        })
    }))
}

/// Runs all sequences to their end; one whole piece per choice, in order.
pub(crate) async fn collect(sequences: Vec<Sequence>) -> Result<Vec<Piece>, ApiError> {
    let index = |i| Piece { index: i, ..Piece::default() };
    let mut whole: Vec<Piece> = (0..sequences.len()).map(index).collect();
    let mut pieces = merge(sequences);
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        let Some(choice) = whole.get_mut(piece.index) else { continue };
        choice.text.push_str(&piece.text);
        choice.prompt.extend(piece.prompt);
        choice.tokens.extend(piece.tokens);
        choice.finish = piece.finish.or(choice.finish.take());
    }
    if whole.iter().any(|choice| choice.finish.is_none()) {
        return Err(ApiError::interrupted());
    }
    Ok(whole)
}

/// How the chunks of a stream are written.
#[derive(Clone)]
pub(crate) enum Writer {
    Completions(CompletionsWriter),
    Chat(ChatWriter),
}

impl Writer {
    /// Chunks before the first token.
    fn opening(&self, choices: usize) -> Vec<Map<String, Value>> {
        match self {
            Self::Completions(_) => Vec::new(),
            Self::Chat(writer) => (0..choices).map(|index| writer.role(index)).collect(),
        }
    }

    /// Chunks for a piece. Text may be held back; a piece without any then gives no chunk unless
    /// it was asked for by token.
    fn chunks(&self, piece: &Piece, first: bool) -> Vec<Map<String, Value>> {
        match self {
            Self::Completions(writer) => {
                let by_token = writer.logprobs || writer.prompt_ids.is_some();
                let tokens = by_token && !(piece.tokens.is_empty() && piece.prompt.is_empty());
                if piece.text.is_empty() && !tokens && piece.finish.is_none() {
                    return Vec::new();
                }
                vec![writer.chunk(piece, first)]
            }
            Self::Chat(writer) => {
                let by_token = writer.logprobs || writer.prompt_ids.is_some();
                let tokens = by_token && !piece.tokens.is_empty();
                let mut chunks = Vec::new();
                if !piece.text.is_empty() || tokens {
                    chunks.push(writer.delta(piece));
                }
                if piece.finish.is_some() {
                    chunks.push(writer.finish(piece));
                }
                chunks
            }
        }
    }

    fn usage(&self) -> Map<String, Value> {
        match self {
            Self::Completions(writer) => writer.usage(),
            Self::Chat(writer) => writer.usage(),
        }
    }
}

fn event(mut chunk: Map<String, Value>, options: StreamOptions, usage: Usage) -> Bytes {
    // Clients that asked for usage find the field in every chunk, null until the last.
    if options.usage {
        let counts = if options.continuous { usage.json() } else { Value::Null };
        chunk.insert("usage".into(), counts);
    }
    data(&Value::Object(chunk))
}

fn data(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

/// Streams the answer: opening chunks, pieces, counts where asked for, `[DONE]`. After an error
/// there is no `[DONE]`.
pub(crate) fn respond(
    writer: Writer,
    sequences: Vec<Sequence>,
    options: StreamOptions,
    prompt_tokens: usize,
) -> Response {
    let body = Body::from_stream(events(writer, sequences, options, prompt_tokens));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that buffer would hold tokens back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn events(
    writer: Writer,
    sequences: Vec<Sequence>,
    options: StreamOptions,
    prompt_tokens: usize,
) -> impl Stream<Item = Result<Bytes, Infallible>> {
    async_stream::stream! {
        let mut usage = Usage { prompt: prompt_tokens, completion: 0 };
        let mut begun = vec![false; sequences.len()];
        for chunk in writer.opening(sequences.len()) {
            yield Ok(event(chunk, options, usage));
        }
        let mut pieces = merge(sequences);
        while let Some(piece) = pieces.next().await {
            let piece = match piece {
                Ok(piece) => piece,
                Err(error) => {
                    yield Ok(data(&error.body()));
                    return;
                }
            };
            usage.completion += piece.tokens.len();
            let first = begun.get(piece.index) == Some(&false);
            for chunk in writer.chunks(&piece, first) {
                if let Some(begun) = begun.get_mut(piece.index) {
                    *begun = true;
                }
                yield Ok(event(chunk, options, usage));
            }
        }
        if options.usage {
            let mut chunk = writer.usage();
            chunk.insert("usage".into(), usage.json());
            yield Ok(data(&Value::Object(chunk)));
        }
        yield Ok(Bytes::from_static(b"data: [DONE]\n\n"));
    }
}
