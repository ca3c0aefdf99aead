//! Tokenizers, corpora, document packing, the loader and the curriculum sampler.

pub mod chat;
pub mod tokenizer;

pub use chat::{ChatError, ChatTemplate, Message};
pub use tokenizer::{StreamDecoder, Tokenizer, TokenizerError};
