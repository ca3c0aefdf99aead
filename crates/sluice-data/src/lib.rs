//! Tokenizers, corpora, document packing, the loader and the curriculum sampler.

pub mod tokenizer;

pub use tokenizer::{StreamDecoder, Tokenizer, TokenizerError};
