//! The JSON of `GET /v1/models`.

use serde::Serialize;

/// One entry.
#[derive(Serialize)]
pub(crate) struct ModelCard {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub owned_by: &'static str,
    /// vLLM's addition: tokens that prompt and completion may have together.
    pub max_model_len: u32,
}

#[derive(Serialize)]
pub(crate) struct ModelList {
    pub object: &'static str,
    pub data: Vec<ModelCard>,
}
