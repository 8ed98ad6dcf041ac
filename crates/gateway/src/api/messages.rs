//! The messages of a chat: roles from a closed list, text content only.

use serde_json::{Map, Value, json};

use crate::error::ApiError;

/// A role is put into templates as it is, so only these are taken: `<|` + role + `|>` spells a
/// control token for others.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Checks messages and brings their content to plain text.
pub(crate) fn take(list: Vec<Value>, most: usize) -> Result<Vec<Value>, ApiError> {
    if list.is_empty() {
        return Err(ApiError::invalid("messages", "the list of messages is empty"));
    }
    if list.len() > most {
        let message = format!("a chat may hold at most {most} messages");
        return Err(ApiError::invalid("messages", message));
    }
    list.into_iter().enumerate().map(|(i, message)| one(message, i)).collect()
}

fn one(message: Value, index: usize) -> Result<Value, ApiError> {
    let place = format!("messages[{index}]");
    let Value::Object(fields) = message else {
        return Err(ApiError::invalid(&place, format!("'{place}' must be an object")));
    };
    let mut kept = Map::new();
    for (name, value) in fields {
        let field = format!("{place}.{name}");
        match (name.as_str(), value) {
            (_, Value::Null) => {}
            ("role", Value::String(role)) if ROLES.contains(&role.as_str()) => {
                kept.insert(name, json!(role));
            }
            ("role", _) => {
                let message = format!("'{field}' must be one of {}", ROLES.join(", "));
                return Err(ApiError::invalid(&field, message));
            }
            ("content", value) => {
                kept.insert(name, Value::String(text(value, &field)?));
            }
            ("name" | "tool_call_id" | "reasoning_content", Value::String(text)) => {
                kept.insert(name, Value::String(text));
            }
            ("name" | "tool_call_id" | "reasoning_content", _) => {
                return Err(ApiError::invalid(&field, format!("'{field}' must be a string")));
            }
            ("tool_calls", Value::Array(calls)) if calls.is_empty() => {}
            ("tool_calls" | "function_call" | "audio" | "refusal", _) => {
                return Err(ApiError::unsupported(&field));
            }
            _ => return Err(ApiError::unknown_field(&field)),
        }
    }
    for required in ["role", "content"] {
        if !kept.contains_key(required) {
            return Err(ApiError::missing(&format!("{place}.{required}")));
        }
    }
    Ok(Value::Object(kept))
}

/// Text, or text parts, which are joined with line ends.
fn text(content: Value, field: &str) -> Result<String, ApiError> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        _ => {
            let message = format!("'{field}' must be a string or a list of text parts");
            return Err(ApiError::invalid(field, message));
        }
    };
    let part = |part: Value| {
        if part["type"] != "text" {
            let message = format!("'{field}' may hold parts of the type 'text' only");
            return Err(ApiError::invalid(field, message));
        }
        let text = part["text"].as_str().map(str::to_owned);
        text.ok_or_else(|| ApiError::invalid(field, format!("a part of '{field}' has no text")))
    };
    let texts: Vec<String> = parts.into_iter().map(part).collect::<Result<_, _>>()?;
    Ok(texts.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn param(messages: Value) -> Option<String> {
        let Value::Array(list) = messages else { panic!("a list") };
        take(list, 2).expect_err("is refused").param
    }

    #[test]
    fn text_parts_are_joined_and_the_rest_refused() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let taken = take(vec![json!({"role": "user", "content": parts})], 2);
        assert_eq!(taken, Ok(vec![json!({"role": "user", "content": "a\nb"})]));
        let at = |field: &str| Some(format!("messages[0].{field}"));
        assert_eq!(param(json!([])), Some("messages".into()));
        assert_eq!(param(json!([1])), Some("messages[0]".into()));
        assert_eq!(param(json!([{"role": "end", "content": "x"}])), at("role"));
        assert_eq!(param(json!([{"role": "user"}])), at("content"));
        assert_eq!(param(json!([{"role": "user", "content": 1}])), at("content"));
        let image = json!([{"type": "image_url", "image_url": {"url": "http://x/"}}]);
        assert_eq!(param(json!([{"role": "user", "content": image}])), at("content"));
        assert_eq!(param(json!([{"role": "user", "content": "x", "tool_calls": [1]}])), {
            at("tool_calls")
        });
        assert_eq!(param(json!([{"role": "user", "content": "x", "mood": 1}])), at("mood"));
        let one = json!({"role": "user", "content": "x"});
        assert_eq!(param(json!([one, one, one])), Some("messages".into()));
    }
}
