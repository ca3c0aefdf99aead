//! Text on its way to and from token ids: tokenizers, chat templates, the embedded corpus, recall documents, and
//! downloads of models by name. Knows nothing about tensors.

pub mod chat;
pub mod embedded;
mod hash;
pub mod pull;
pub mod recall;
pub mod tokenizer;

pub use chat::{ChatError, ChatTemplate, Message};
pub use embedded::{Document, Split};
pub use pull::PullError;
pub use recall::{AnswerSpan, RecallConfig, RecallDocument, RecallGenerator};
pub use tokenizer::{StreamDecoder, Tokenizer, TokenizerError};
