//! Where a checkpoint's tokenizer comes from, as plain data: the reader of weights fills it, the tokenizer code builds from it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Tokenizer found beside, or inside, a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenizerSource {
    /// A Hugging Face `tokenizer.json`.
    Json(PathBuf),
    /// Vocabulary and merges from GGUF metadata.
    Gguf(GgufTokenizer),
    /// The checkpoint carries none.
    Missing,
}

/// `tokenizer.ggml.*` metadata of a byte-level BPE tokenizer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufTokenizer {
    /// `tokenizer.ggml.model`, for instance `gpt2`.
    pub model: String,
    /// `tokenizer.ggml.pre`, the pre-tokenizer: `smollm`, `qwen2`, `gpt-2`, `llama-bpe`.
    pub pre: String,
    /// Token strings in the byte-level alphabet; index = id.
    pub tokens: Vec<String>,
    /// Merges, best first, each two tokens with a space between.
    pub merges: Vec<String>,
    /// 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte; empty when the file has none.
    pub token_types: Vec<i32>,
    /// Whether encoding a text begins with the BOS token.
    pub add_bos: bool,
}

/// Special tokens and the chat template, which belong to the checkpoint as much as its weights.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextConfig {
    /// Begin-of-sequence id.
    pub bos: Option<u32>,
    /// Ids that end a generation.
    pub eos: Vec<u32>,
    /// Jinja template of `tokenizer_config.json` or `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}
