//! Tokenizers, corpora, document packing, the loader and the curriculum sampler.

pub mod chat;
pub mod embedded;
mod hash;
pub mod recall;
pub mod tokenizer;

pub use chat::{ChatError, ChatTemplate, Message};
pub use embedded::{Document, Split};
pub use recall::{AnswerSpan, RecallConfig, RecallDocument, RecallGenerator};
pub use tokenizer::{StreamDecoder, Tokenizer, TokenizerError};
