//! GET /v1/models: what is served.

use serde_json::{Value, json};

/// A model's card.
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

/// The list of cards, one per name.
pub(crate) fn list(names: &[String], created: u64, context: usize) -> Value {
    let root = names.first().map_or("", String::as_str);
    let data: Vec<Value> = names.iter().map(|name| card(name, root, created, context)).collect();
    json!({"object": "list", "data": data})
}
