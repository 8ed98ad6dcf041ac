//! A model's text files tried without serving them: for `phalanx model inspect`, and for the fuzz
//! targets, which must reach what [`crate::serve`] would.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Map, Value};

use crate::config::{GatewayError, ModelFiles, RequestLimits};
use crate::detokenizer::Detokenizer;
use crate::template::{ChatTemplate, Rendering};
use crate::tokenizer::Tokenizer;

/// Reads a `tokenizer.json` as [`crate::serve`] does and turns texts into ids, each as a prompt and
/// as what a user says in a chat. Gives the ids of the prompts.
///
/// # Errors
/// The file cannot be used, or not with one of the texts.
pub fn try_tokenizer(json: &[u8], texts: &[&str]) -> Result<Vec<Vec<u32>>, GatewayError> {
    let tokenizer = Arc::new(Tokenizer::new(json)?);
    texts.iter().map(|text| try_text(&tokenizer, text)).collect()
}

fn try_text(tokenizer: &Arc<Tokenizer>, text: &str) -> Result<Vec<u32>, GatewayError> {
    let failed = |e: crate::error::ApiError| GatewayError::Tokenizer { reason: e.message };
    // The library may panic on some texts; requests are guarded against it, too.
    let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let ids = tokenizer.encode(text, true).map_err(failed)?;
        let marker = tokenizer.marker();
        tokenizer.encode_chat(&tokenizer.guard(text, &marker), &marker).map_err(failed)?;
        Ok(ids)
    }));
    let ids = tried.unwrap_or_else(|_| {
        Err(GatewayError::Tokenizer { reason: "it breaks the library".to_owned() })
    })?;
    let _ = Detokenizer::all(tokenizer, &ids, false);
    Ok(ids)
}

/// Reads a chat template as [`crate::serve`] does and renders `messages`; `None` where the files
/// hold none.
///
/// # Errors
/// The template cannot be used, or refuses this chat.
pub fn try_template(
    files: &ModelFiles,
    limits: &RequestLimits,
    messages: &[Value],
) -> Result<Option<String>, GatewayError> {
    let Some(template) = ChatTemplate::new(files, limits)? else { return Ok(None) };
    let rendered = template.render(&Rendering {
        messages,
        tools: &[],
        add_generation_prompt: true,
        continue_final: false,
        variables: &Map::new(),
        now: SystemTime::UNIX_EPOCH,
    });
    let file =
        if files.chat_template.is_some() { "chat_template.jinja" } else { "tokenizer_config.json" };
    rendered.map(Some).map_err(|e| GatewayError::Template { file, reason: e.message })
}
