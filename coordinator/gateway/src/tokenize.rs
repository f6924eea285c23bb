//! `POST /tokenize` and `POST /detokenize`, as vLLM's: text or a conversation to token ids, and back. Nothing is generated,
//! so nothing is billed.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::Response;
use baton_proto::limits::PROMPT_TOKENS_MAX;
use serde_json::json;

use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::body::Body;
use crate::gateway::Gateway;
use crate::generation::answer;
use crate::generation::intake::{Origin, receive};
use crate::generation::prepare;
use crate::generation::request::{Chat, Prompt};
use crate::generation::start::on_body;
use crate::messages;
use crate::trace::RequestNames;

/// `POST /tokenize`.
pub(crate) async fn tokenize<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = receive(&gateway, "/tokenize", names, caller, request).await?;
    on_body(&gateway, received, tokens)
        .await
        .map(|(body, _)| answer::json(body))
}

/// `POST /detokenize`.
pub(crate) async fn detokenize<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = receive(&gateway, "/detokenize", names, caller, request).await?;
    on_body(&gateway, received, text)
        .await
        .map(|(body, _)| answer::json(body))
}

fn tokens<B: Backend>(gateway: &Gateway<B>, origin: &Origin, bytes: &[u8]) -> Result<Vec<u8>, ApiError> {
    let mut body = Body::parse(bytes)?;
    let name = gateway.named(body.text("model")?, &origin.caller)?;
    let model = gateway.served(&name, &origin.caller)?;
    let spelled = body.flag("return_token_strs", false)?;
    let (prompt, conversation) = (body.text("prompt")?, body.take("messages"));
    let ids = match (prompt, conversation) {
        (Some(_), Some(_)) => return Err(body.wrong("messages", "cannot be sent along with `prompt`")),
        (None, None) => return Err(body.wrong("prompt", "is missing: send it, or `messages`")),
        (Some(text), None) => {
            let special = body.flag("add_special_tokens", true)?;
            body.finish()?;
            let encoded = model.encode_plain(&text, special);
            encoded.map_err(|error| {
                tracing::warn!(request_id = %origin.names.request_id, error, "a tokenizer failed");
                ApiError::field("prompt", "The prompt cannot be tokenised.")
            })?
        }
        (None, messages) => {
            let chat = Chat {
                messages: messages::parse(messages, gateway.config.messages_max)?,
                closed: !body.flag("add_generation_prompt", true)?,
                ..Chat::default()
            };
            let asks_nothing = |value: &serde_json::Value| value == &json!(false);
            body.refuse("add_special_tokens", "the chat template adds them", asks_nothing)?;
            body.refuse("continue_final_message", "an answer always begins anew", asks_nothing)?;
            body.finish()?;
            let salt = origin.caller.cache_salt();
            prepare::tokens(model, Prompt::Chat(chat), &[], &salt, &origin.names)?.0
        }
    };
    let strings: Option<Vec<String>> = spelled.then(|| {
        let spelling = |id: &u32| model.spelling(*id).unwrap_or_default();
        ids.iter().map(spelling).collect()
    });
    let answer = json!({"count": ids.len(), "max_model_len": gateway.context_length(model), "tokens": ids,
        "token_strs": strings});
    Ok(answer.to_string().into_bytes())
}

fn text<B: Backend>(gateway: &Gateway<B>, origin: &Origin, bytes: &[u8]) -> Result<Vec<u8>, ApiError> {
    let mut body = Body::parse(bytes)?;
    let name = gateway.named(body.text("model")?, &origin.caller)?;
    let model = gateway.served(&name, &origin.caller)?;
    let tokens = body.token_ids("tokens", PROMPT_TOKENS_MAX)?;
    let tokens = tokens.ok_or_else(|| body.missing("tokens"))?;
    let vocabulary = model.vocabulary_size();
    if let Some(id) = tokens.iter().find(|id| **id >= vocabulary) {
        let last = vocabulary.saturating_sub(1);
        return Err(body.wrong(
            "tokens",
            format_args!("holds {id}; this model's tokens are 0 to {last}"),
        ));
    }
    body.finish()?;
    // As vLLM: special tokens are shown.
    Ok(json!({"prompt": model.decode(&tokens, true)}).to_string().into_bytes())
}
