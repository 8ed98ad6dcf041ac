//! The one error shape that clients see: OpenAI's. Texts never hold paths, addresses or prompts.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// OpenAI's error types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    InvalidRequest,
    NotFound,
    RateLimit,
    Server,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::InvalidRequest => "invalid_request_error",
            Self::NotFound => "not_found_error",
            Self::RateLimit => "rate_limit_error",
            Self::Server => "server_error",
        }
    }
}

/// A refused or failed request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    kind: Kind,
    pub(crate) message: String,
    pub(crate) param: Option<String>,
    pub(crate) code: &'static str,
}

impl ApiError {
    fn new(status: StatusCode, kind: Kind, code: &'static str, message: String) -> Self {
        Self { status, kind, message, param: None, code }
    }

    /// 400: a field has a value that cannot be used.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self::new(StatusCode::BAD_REQUEST, Kind::InvalidRequest, "invalid_value", message).at(param)
    }

    /// 400: a field is required and absent.
    pub(crate) fn missing(param: &str) -> Self {
        let message = format!("'{param}' is required");
        Self::new(
            StatusCode::BAD_REQUEST,
            Kind::InvalidRequest,
            "missing_required_parameter",
            message,
        )
        .at(param)
    }

    /// 400: a field that this server does not act on, and that would change the answer.
    pub(crate) fn unsupported(param: &str) -> Self {
        let message = format!("'{param}' is not supported by this server");
        Self::new(StatusCode::BAD_REQUEST, Kind::InvalidRequest, "unsupported_parameter", message)
            .at(param)
    }

    /// 400: a field that nobody knows.
    pub(crate) fn unknown_field(param: &str) -> Self {
        // The name is the client's own text, so it is cut before it goes into a message.
        let param: String = param.chars().filter(|c| !c.is_control()).take(64).collect();
        let message = format!("unknown field '{param}'");
        Self::new(StatusCode::BAD_REQUEST, Kind::InvalidRequest, "unknown_parameter", message)
            .at(&param)
    }

    /// 400: the body is not the JSON that it should be.
    pub(crate) fn malformed(message: String, param: Option<String>) -> Self {
        let mut error =
            Self::new(StatusCode::BAD_REQUEST, Kind::InvalidRequest, "invalid_json", message);
        error.param = param;
        error
    }

    /// 400: prompt and answer do not fit the model.
    pub(crate) fn too_long(param: &str, message: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Kind::InvalidRequest, "context_length_exceeded", message)
            .at(param)
    }

    /// 400: the engine cannot take the sequence; `message` is its own text.
    pub(crate) fn rejected(message: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Kind::InvalidRequest, "rejected_by_engine", message)
    }

    /// 404: no such model.
    pub(crate) fn no_model() -> Self {
        let message = "the model does not exist here; GET /v1/models lists what does".to_owned();
        Self::new(StatusCode::NOT_FOUND, Kind::InvalidRequest, "model_not_found", message)
            .at("model")
    }

    /// 404: no such path.
    pub(crate) fn no_route() -> Self {
        let message = "no such path".to_owned();
        Self::new(StatusCode::NOT_FOUND, Kind::NotFound, "not_found", message)
    }

    /// 405: the path exists, for another method.
    pub(crate) fn no_method() -> Self {
        let message = "this path does not take that method".to_owned();
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            Kind::InvalidRequest,
            "method_not_allowed",
            message,
        )
    }

    /// 413: the body is over the limit.
    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the request body is over the limit of {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, Kind::InvalidRequest, "request_too_large", message)
    }

    /// 415: the body does not claim to be JSON.
    pub(crate) fn media_type() -> Self {
        let message = "the header 'content-type: application/json' is required".to_owned();
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Kind::InvalidRequest,
            "unsupported_media_type",
            message,
        )
    }

    /// 408: the client took too long to send its body.
    pub(crate) fn slow_body() -> Self {
        let message = "the request body did not arrive in time".to_owned();
        Self::new(StatusCode::REQUEST_TIMEOUT, Kind::InvalidRequest, "request_timeout", message)
    }

    /// 422: the idempotency key came with another request before.
    pub(crate) fn other_key() -> Self {
        let message = "the idempotency key was used for another request".to_owned();
        let status = StatusCode::UNPROCESSABLE_ENTITY;
        Self::new(status, Kind::InvalidRequest, "idempotency_key_reused", message)
            .at(crate::idempotency::HEADER)
    }

    /// 429: the waiting queue is full.
    pub(crate) fn full() -> Self {
        let message = "too many requests are waiting; try again later".to_owned();
        Self::new(StatusCode::TOO_MANY_REQUESTS, Kind::RateLimit, "queue_full", message)
    }

    /// 503: every connection has a request at work.
    pub(crate) fn no_place() -> Self {
        let message = "all connections of this server are in use".to_owned();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Kind::Server, "too_many_connections", message)
    }

    /// 503: the bodies of other requests take all the room there is.
    pub(crate) fn no_room() -> Self {
        let message = "there is no room for the request body at the moment".to_owned();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Kind::Server, "no_room_for_body", message)
    }

    /// 503: nothing serves the model at the moment.
    pub(crate) fn unavailable(message: String) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Kind::Server, "model_not_ready", message)
    }

    /// 503: this process does not get on; starting it again would help.
    pub(crate) fn stalled(message: String) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Kind::Server, "stalled", message)
    }

    /// 503: the group went away under a running answer, and no other came in time.
    pub(crate) fn interrupted() -> Self {
        let message = "the group that computed this answer is gone; try again".to_owned();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Kind::Server, "group_lost", message)
    }

    /// 500: whatever group computed this request ended over it, again and again.
    pub(crate) fn quarantined() -> Self {
        let message = "every group that computed this request failed over it".to_owned();
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, Kind::Server, "request_quarantined", message)
    }

    /// 500: a fault of this server or of the model's files.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, Kind::Server, "internal_error", message.into())
    }

    fn at(mut self, param: &str) -> Self {
        self.param = Some(param.to_owned());
        self
    }

    /// The JSON body, which is also what an event in a running stream carries.
    pub(crate) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind.name(),
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let retry =
            matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        if retry {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
