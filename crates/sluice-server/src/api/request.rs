//! Bodies of requests. Unknown fields are refused: a setting that is ignored in silence would be worse.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::ToSchema;

use crate::error::ApiError;

/// Parse a body; the error names the field.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // Serde would also read a struct's fields from an array, in their order.
    if body.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err(ApiError::malformed(None, "the body is not valid JSON, or no JSON object"));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        // A path means that the text was JSON up to a value that does not fit.
        let param = (inner.is_data() && path != ".").then_some(path);
        let what = if inner.is_data() { "the request does not fit" } else { "the body is not valid JSON" };
        let at = param.as_ref().map_or_else(String::new, |param| format!(" at `{param}`"));
        ApiError::malformed(param, format!("{what}{at}: {inner}"))
    })?;
    json.end().map_err(|error| ApiError::malformed(None, format!("the body is not valid JSON: {error}")))?;
    Ok(value)
}

/// Fields that all generating requests share.
macro_rules! generating {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Deserialize, ToSchema)]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $kind,)*
            /// Name of the model, as `/v1/models` lists it.
            pub model: String,
            /// 0 takes the most likely token; up to 2.
            #[serde(default)]
            pub temperature: Option<f64>,
            /// Sample from the most likely tokens that together have this probability.
            #[serde(default)]
            pub top_p: Option<f64>,
            /// Sample from this many most likely tokens; 0 for all.
            #[serde(default)]
            pub top_k: Option<usize>,
            /// Leave out tokens less likely than this share of the most likely one.
            #[serde(default)]
            pub min_p: Option<f64>,
            /// Subtracted from the logit of tokens that were chosen before.
            #[serde(default)]
            pub presence_penalty: Option<f64>,
            /// Subtracted from the logit of a token for each time that it was chosen before.
            #[serde(default)]
            pub frequency_penalty: Option<f64>,
            /// Positive logits of tokens that occurred are divided by this, negative ones multiplied.
            #[serde(default)]
            pub repetition_penalty: Option<f64>,
            /// Added to the logits of these token ids.
            #[serde(default)]
            pub logit_bias: Option<BTreeMap<String, f64>>,
            /// The same seed gives the same answer.
            #[serde(default)]
            pub seed: Option<i64>,
            /// Answers to the same prompt.
            #[serde(default)]
            pub n: Option<usize>,
            /// Texts that end an answer and do not belong to it: one, or up to four.
            #[serde(default)]
            pub stop: Option<Stop>,
            /// Token ids that end an answer, besides the model's own.
            #[serde(default)]
            pub stop_token_ids: Option<Vec<u32>>,
            /// Send the answer as it comes, as server-sent events.
            #[serde(default)]
            pub stream: Option<bool>,
            /// Only with `stream`.
            #[serde(default)]
            pub stream_options: Option<StreamOptions>,
            /// Name of the end user; it is written to the log.
            #[serde(default)]
            pub user: Option<String>,
            /// Session to continue; it then holds this prompt and the answer too.
            #[serde(default)]
            pub session_id: Option<String>,
            /// Report in how many layers each prompt token is still kept.
            #[serde(default)]
            pub report_kept: Option<bool>,
        }

        impl $name {
            /// The fields that all generating requests share.
            pub(crate) fn shared(&self) -> Shared<'_> {
                Shared {
                    model: &self.model,
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    repetition_penalty: self.repetition_penalty,
                    logit_bias: self.logit_bias.as_ref(),
                    seed: self.seed,
                    n: self.n,
                    stop: self.stop.as_ref(),
                    stop_token_ids: self.stop_token_ids.as_deref(),
                    stream: self.stream,
                    stream_options: self.stream_options.as_ref(),
                    report_kept: self.report_kept,
                }
            }
        }
    };
}

generating! {
    /// Body of `/v1/completions`.
    CompletionRequest {
        /// Text to continue, or its token ids.
        prompt: Prompt,
        /// Tokens of the answer at most; 16 when nothing is said.
        #[serde(default)]
        max_tokens: Option<usize>,
        /// Report the logarithm of each token's probability and of this many others.
        #[serde(default)]
        logprobs: Option<usize>,
    }
}

generating! {
    /// Body of `/v1/chat/completions`.
    ChatRequest {
        /// The conversation so far; with a session, what is new.
        messages: Vec<ChatMessage>,
        /// Tokens of the answer at most; what the context has room for when nothing is said.
        #[serde(default)]
        max_tokens: Option<usize>,
        /// The newer name of `max_tokens`.
        #[serde(default)]
        max_completion_tokens: Option<usize>,
        /// Report the logarithm of each token's probability.
        #[serde(default)]
        logprobs: Option<bool>,
        /// And of this many others.
        #[serde(default)]
        top_logprobs: Option<usize>,
    }
}

/// Body of `POST /v1/sessions`: what the session reads first, a prompt or a conversation.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SessionRequest {
    /// Name of the model, as `/v1/models` lists it.
    pub model: String,
    /// Text to read.
    #[serde(default)]
    pub prompt: Option<Prompt>,
    /// Conversation to read.
    #[serde(default)]
    pub messages: Option<Vec<ChatMessage>>,
}

/// The shared fields, borrowed.
pub(crate) struct Shared<'a> {
    pub(crate) model: &'a str,
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) top_k: Option<usize>,
    pub(crate) min_p: Option<f64>,
    pub(crate) presence_penalty: Option<f64>,
    pub(crate) frequency_penalty: Option<f64>,
    pub(crate) repetition_penalty: Option<f64>,
    pub(crate) logit_bias: Option<&'a BTreeMap<String, f64>>,
    pub(crate) seed: Option<i64>,
    pub(crate) n: Option<usize>,
    pub(crate) stop: Option<&'a Stop>,
    pub(crate) stop_token_ids: Option<&'a [u32]>,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<&'a StreamOptions>,
    pub(crate) report_kept: Option<bool>,
}

/// A prompt.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, an array with one text, or an array of token ids")]
pub enum Prompt {
    /// A text; special tokens spelled out in it are parsed.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// Texts, of which one is taken.
    Texts(Vec<String>),
}

/// Texts that end an answer.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or an array of texts")]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// What a stream tells besides the answer.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// Counts of tokens at the end.
    #[serde(default)]
    pub include_usage: Option<bool>,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`, or another one that the model's template knows.
    pub role: String,
    /// What was said.
    pub content: Content,
}

/// What was said, as a text or in parts.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or an array of {\"type\": \"text\", \"text\": ...}")]
pub enum Content {
    /// A text.
    Text(String),
    /// Texts, joined.
    Parts(Vec<ContentPart>),
}

/// A part of what was said.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum ContentPart {
    /// Text, the only kind that these models read.
    Text {
        /// The text.
        text: String,
    },
}

impl Content {
    /// The whole text.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts(parts) => parts.iter().map(|ContentPart::Text { text }| text.as_str()).collect(),
        }
    }
}
