//! Bodies of answers.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

/// Answer of `/v1/models`.
#[derive(Serialize, ToSchema)]
pub(crate) struct ModelList {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<ModelEntry>,
}

/// A model.
#[derive(Serialize, ToSchema)]
pub(crate) struct ModelEntry {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) owned_by: &'static str,
    /// Tokens of a prompt and its answer at most.
    pub(crate) max_context: usize,
    /// Layers, for the strip of kept tokens.
    pub(crate) n_layers: usize,
    /// Local keys, the query's own included.
    pub(crate) window: usize,
    /// Routed keys per KV head.
    pub(crate) top_k: usize,
    /// Whether it has a chat template.
    pub(crate) chat: bool,
}

/// Counts of tokens.
#[derive(Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
    pub(crate) prompt_tokens_details: PromptDetails,
}

/// More about the prompt.
#[derive(Clone, Copy, Default, Serialize, ToSchema)]
pub(crate) struct PromptDetails {
    /// Tokens that a stored prefix saved from being read.
    pub(crate) cached_tokens: usize,
}

/// A completion, or a piece of one, of either kind.
#[derive(Serialize, ToSchema)]
pub(crate) struct Completion {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) system_fingerprint: String,
    pub(crate) choices: Vec<CompletionChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Usage>,
    /// Which prompt tokens are still kept, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) kept: Option<Kept>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) session_id: Option<String>,
}

/// In how many layers each prompt token is kept by some KV head.
#[derive(Clone, Serialize, ToSchema)]
pub(crate) struct Kept {
    /// Which answer.
    pub(crate) index: usize,
    /// Layers of the model.
    pub(crate) n_layers: usize,
    /// For every token of the prompt; with a session, of all that it has read.
    pub(crate) layers: Vec<u16>,
    /// The tokens' texts, the first time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tokens: Option<Vec<String>>,
}

/// One answer or a piece of it: `text` for completions, `message` for chats, `delta` for pieces of chats.
#[derive(Default, Serialize, ToSchema)]
pub(crate) struct CompletionChoice {
    pub(crate) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) message: Option<AnswerMessage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) delta: Option<AnswerMessage>,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) finish_reason: Option<&'static str>,
}

/// What the model says.
#[derive(Default, Serialize, ToSchema)]
pub(crate) struct AnswerMessage {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
}

/// Probabilities of tokens, in the form of the endpoint.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Logprobs {
    Chat {
        content: Vec<ChatLogprob>,
    },
    Completion {
        tokens: Vec<String>,
        token_logprobs: Vec<f32>,
        top_logprobs: Vec<BTreeMap<String, f32>>,
        /// Where each token begins in the answer, in characters.
        text_offset: Vec<usize>,
    },
}

/// A token of a chat.
#[derive(Clone, Serialize, ToSchema)]
pub(crate) struct ChatLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    /// UTF-8 of the token, none where it is a part of a character.
    pub(crate) bytes: Option<Vec<u8>>,
    pub(crate) top_logprobs: Vec<TopLogprob>,
}

/// An alternative.
#[derive(Clone, Serialize, ToSchema)]
pub(crate) struct TopLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Option<Vec<u8>>,
}

/// A session.
#[derive(Clone, Serialize, ToSchema)]
pub(crate) struct SessionEntry {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    /// Tokens that it has read.
    pub(crate) tokens: usize,
    /// Bytes of its keys and values, however long the text.
    pub(crate) cache_bytes: usize,
}

/// Answer of `GET /v1/sessions`.
#[derive(Serialize, ToSchema)]
pub(crate) struct SessionList {
    pub(crate) object: &'static str,
    pub(crate) data: Vec<SessionEntry>,
}

/// Answer of `DELETE /v1/sessions/ID`.
#[derive(Serialize, ToSchema)]
pub(crate) struct Deleted {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) deleted: bool,
}
