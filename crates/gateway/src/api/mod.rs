//! Requests and responses of the OpenAI-compatible routes.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod fields;
pub(crate) mod messages;
pub(crate) mod models;
pub(crate) mod options;
pub(crate) mod shape;
pub(crate) mod tokens;
