//! GET /v1/models: what is served.

use serde_json::{Value, json};

/// A model's card. `root`: the deployment that its name means.
pub(crate) fn card(name: &str, root: &str, created: u64, context: usize) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "phalanx",
        "root": root,
        "parent": null,
        "max_model_len": context,
    })
}

/// The list of cards.
pub(crate) fn list(cards: Vec<Value>) -> Value {
    json!({"object": "list", "data": cards})
}
