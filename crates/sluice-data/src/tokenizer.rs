//! Text to token ids and back: a byte-level BPE built from GGUF metadata, or any Hugging Face `tokenizer.json`.
//! Knows nothing about models beyond the size of their vocabulary, nor about chat templates.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sluice_spec::{GgufTokenizer, TextConfig, TokenizerSource};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, AddedVocabulary, Model, OffsetReferential, OffsetType, PreTokenizer, SplitDelimiterBehavior, Tokenizer as HfTokenizer,
};

/// Why a tokenizer cannot be built or used; the message says what was found and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The checkpoint carries no tokenizer.
    #[error("the checkpoint carries no tokenizer; expected a `tokenizer.json` beside the weights, or a GGUF file with one inside")]
    Missing,
    /// A `tokenizer.json` cannot be read.
    #[error("cannot load the tokenizer {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the parser or the system said.
        reason: String,
    },
    /// GGUF metadata that we do not implement; guessing would give other tokens than the model was trained on.
    #[error("GGUF tokenizer {what} `{found}` is not supported; expected one of {expected}. Use a checkpoint folder with a tokenizer.json")]
    Unsupported {
        /// `model` or `pre-tokenizer`.
        what: &'static str,
        /// The name in the file.
        found: String,
        /// Names that are known.
        expected: String,
    },
    /// GGUF metadata that contradicts itself.
    #[error("the tokenizer in the GGUF file is not valid: {0}")]
    Invalid(String),
    /// The tokenizer can produce ids that the model has no embedding for.
    #[error(
        "the tokenizer has {tokenizer} ids but the model's embedding has {model} rows; \
         expected a tokenizer that was made for this model"
    )]
    TooLarge {
        /// One more than the tokenizer's largest id.
        tokenizer: usize,
        /// Rows of the embedding.
        model: usize,
    },
}

/// A tokenizer with the special ids of its checkpoint.
pub struct Tokenizer {
    inner: HfTokenizer,
    /// The same added tokens, with special ones read as ordinary text.
    plain: AddedVocabulary,
    vocab_size: usize,
    prefix: Vec<u32>,
    text: TextConfig,
}

impl Tokenizer {
    /// Build the tokenizer of a checkpoint.
    pub fn from_source(source: &TokenizerSource, text: &TextConfig) -> Result<Self, TokenizerError> {
        match source {
            TokenizerSource::Json(path) => Self::from_file(path, text),
            TokenizerSource::Gguf(metadata) => Self::new(from_gguf(metadata, text)?, text),
            TokenizerSource::Missing => Err(TokenizerError::Missing),
        }
    }

    /// Load a `tokenizer.json`.
    pub fn from_file(path: &Path, text: &TextConfig) -> Result<Self, TokenizerError> {
        let fail = |reason: String| TokenizerError::File { path: path.to_path_buf(), reason };
        let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
        let inner = HfTokenizer::from_bytes(bytes).map_err(|e| fail(e.to_string()))?;
        Self::new(inner, text)
    }

    /// Parse the text of a `tokenizer.json`.
    pub fn from_json(json: &str, text: &TextConfig) -> Result<Self, TokenizerError> {
        let inner = HfTokenizer::from_bytes(json.as_bytes()).map_err(|e| TokenizerError::Invalid(e.to_string()))?;
        Self::new(inner, text)
    }

    fn new(mut inner: HfTokenizer, text: &TextConfig) -> Result<Self, TokenizerError> {
        // Some files store truncation and padding of their training run; applied silently they would cut texts.
        inner.with_truncation(None).map_err(|e| TokenizerError::Invalid(e.to_string()))?;
        inner.with_padding(None);
        let mut plain = inner.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let prefix = inner.encode_fast("", true).map_err(|e| TokenizerError::Invalid(e.to_string()))?.get_ids().to_vec();
        Ok(Self { inner, plain, vocab_size, prefix, text: text.clone() })
    }

    /// Ids of a raw text. Special tokens spelled out in it are ordinary text; nothing is added.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut pieces = self.plain.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces).expect("the pre-tokenizer accepts any text");
        }
        let model = self.inner.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get())).expect("the model accepts any text");
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.iter().flat_map(|(_, _, tokens)| tokens.iter().flatten().map(|t| t.id)).collect()
    }

    /// [`Self::encode`] of many texts, in parallel.
    pub fn encode_batch(&self, texts: &[&str]) -> Vec<Vec<u32>> {
        texts.par_iter().map(|text| self.encode(text)).collect()
    }

    /// Ids of a rendered chat: special tokens in the text are parsed, nothing is added (the template wrote its own BOS).
    pub fn encode_chat(&self, text: &str) -> Vec<u32> {
        self.parse(text, false)
    }

    /// Ids of a prompt: special tokens in the text are parsed and [`Self::prefix`] comes first.
    pub fn encode_with_special(&self, text: &str) -> Vec<u32> {
        self.parse(text, true)
    }

    fn parse(&self, text: &str, add_prefix: bool) -> Vec<u32> {
        self.inner.encode_fast(text, add_prefix).expect("the tokenizer accepts any text").get_ids().to_vec()
    }

    /// Text of these ids without special tokens. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).expect("the decoder accepts any tokens")
    }

    /// Text of these ids, special tokens spelled out.
    pub fn decode_with_special(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, false).expect("the decoder accepts any tokens")
    }

    /// A decoder for ids that arrive one by one.
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, ids: Vec::new(), emitted: 0 }
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Check against the rows of a model's embedding. Fewer ids than rows is usual: embeddings are padded.
    pub fn check_fits(&self, embedding_rows: usize) -> Result<(), TokenizerError> {
        if self.vocab_size > embedding_rows {
            return Err(TokenizerError::TooLarge { tokenizer: self.vocab_size, model: embedding_rows });
        }
        Ok(())
    }

    /// Ids that the model expects before any text, usually nothing or its BOS.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// Begin-of-sequence id of the checkpoint.
    pub fn bos(&self) -> Option<u32> {
        self.text.bos
    }

    /// Ids that end a generation.
    pub fn eos(&self) -> &[u32] {
        &self.text.eos
    }

    /// Special ids and the chat template, as the checkpoint gave them.
    pub fn text_config(&self) -> &TextConfig {
        &self.text
    }

    /// Id of a token by its exact string, special ones included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of a `tokenizer.json` that gives the same ids.
    pub fn to_json(&self) -> String {
        self.inner.to_string(false).expect("a tokenizer is always serialisable")
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

/// Turns ids into text as they come. A character whose bytes are spread over several tokens is held back
/// until it is whole, so what was given out is always valid and never taken back.
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Bytes of `decode(ids)` that were given out.
    emitted: usize,
}

impl StreamDecoder<'_> {
    /// The text that became certain with this id; often one word, sometimes empty.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids);
        // An unfinished character decodes to one U+FFFD at the end.
        let certain = text.strip_suffix('\u{FFFD}').unwrap_or(&text).len();
        let new = text.get(self.emitted..certain).unwrap_or("").to_string();
        self.emitted = self.emitted.max(certain);
        if certain == text.len() && self.ids.len() > 8 {
            // Keep the cost per token constant. One id of context stays: some decoders strip a text's first space.
            self.ids.drain(..self.ids.len() - 1);
            self.emitted = self.tokenizer.decode(&self.ids).len();
        }
        new
    }

    /// What is still held back when no more ids come.
    pub fn finish(self) -> String {
        let text = self.tokenizer.decode(&self.ids);
        text.get(self.emitted..).unwrap_or("").to_string()
    }
}

/// `tokenizer.ggml.token_type` values that matter here.
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

const PRE_TOKENIZERS: &str = "smollm, qwen2, gpt-2, llama-bpe";

fn from_gguf(metadata: &GgufTokenizer, text: &TextConfig) -> Result<HfTokenizer, TokenizerError> {
    let invalid = TokenizerError::Invalid;
    if metadata.model != "gpt2" {
        let found = metadata.model.clone();
        return Err(TokenizerError::Unsupported { what: "model", found, expected: "gpt2 (byte-level BPE)".into() });
    }
    let tokens = &metadata.tokens;
    if tokens.is_empty() {
        return Err(invalid("it has no tokens".into()));
    }
    if !metadata.token_types.is_empty() && metadata.token_types.len() != tokens.len() {
        return Err(invalid(format!("{} token types for {} tokens; expected as many", metadata.token_types.len(), tokens.len())));
    }
    let kind = |id: usize| metadata.token_types.get(id).copied().unwrap_or(1);
    // Unused ids only pad the embedding; without them the exported file equals the model's original one.
    let vocab: Vec<(String, u32)> =
        tokens.iter().enumerate().filter(|(id, _)| kind(*id) != UNUSED).map(|(id, token)| (token.clone(), id as u32)).collect();
    let n_tokens = vocab.len();
    let vocab: Vocab = vocab.into_iter().collect();
    if vocab.len() != n_tokens {
        return Err(invalid(format!("{} of its {n_tokens} tokens occur twice", n_tokens - vocab.len())));
    }
    let merges = metadata
        .merges
        .iter()
        .enumerate()
        .map(|(i, merge)| match merge.split_once(' ') {
            // The byte-level alphabet spells a space as another letter, so there is exactly one.
            Some((left, right)) if !left.is_empty() && !right.is_empty() && !right.contains(' ') => {
                Ok((left.to_string(), right.to_string()))
            }
            _ => Err(invalid(format!("merge {i} is `{merge}`; expected two tokens with one space between"))),
        })
        .collect::<Result<Vec<_>, _>>()?;

    let pre = pre_tokenizer(&metadata.pre)?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(|e| invalid(format!("its merges do not fit its tokens: {e}")))?;
    let mut inner = HfTokenizer::new(bpe);
    inner.with_pre_tokenizer(Some(pre.pre_tokenizer));
    inner.with_decoder(Some(ByteLevel::default()));
    if pre.nfc {
        inner.with_normalizer(Some(NFC)).map_err(|e| invalid(e.to_string()))?;
    }
    let added = tokens.iter().enumerate().filter_map(|(id, token)| match kind(id) {
        UNKNOWN | CONTROL => Some(AddedToken::from(token.clone(), true)),
        USER_DEFINED => Some(AddedToken::from(token.clone(), false).normalized(false)),
        _ => None,
    });
    inner.add_tokens(added).map_err(|e| invalid(e.to_string()))?;

    if metadata.add_bos {
        let bos = text.bos.ok_or_else(|| invalid("it asks for a BOS token in front of every text but names none".into()))?;
        let token = tokens.get(bos as usize).ok_or_else(|| invalid(format!("BOS is id {bos} but there are {} tokens", tokens.len())))?;
        let template = TemplateProcessing::builder()
            .try_single(vec![token.clone(), "$A".into()])
            .and_then(|b| b.try_pair(vec![token.clone(), "$A".into(), "$B".into()]))
            .map(|b| b.special_tokens(vec![(token.clone(), bos)]).build());
        match template {
            Ok(Ok(template)) => inner.with_post_processor(Some(template)),
            Ok(Err(e)) => return Err(invalid(format!("BOS token `{token}`: {e}"))),
            Err(e) => return Err(invalid(format!("BOS token `{token}`: {e}"))),
        };
    }
    Ok(inner)
}

struct PreTokenization {
    pre_tokenizer: PreTokenizerWrapper,
    nfc: bool,
    ignore_merges: bool,
}

/// The pre-tokenizers of the original `tokenizer.json` files that GGUF only names.
fn pre_tokenizer(name: &str) -> Result<PreTokenization, TokenizerError> {
    let byte_level = |use_regex| PreTokenizerWrapper::from(tokenizers::pre_tokenizers::byte_level::ByteLevel::new(false, true, use_regex));
    let split_then_bytes = |regex: String| {
        let split = Split::new(SplitPattern::Regex(regex), SplitDelimiterBehavior::Isolated, false).expect("our regex is valid");
        PreTokenizerWrapper::from(Sequence::new(vec![split.into(), byte_level(false)]))
    };
    // Qwen and Llama 3 differ in how many digits make one piece.
    let cl100k = |digits: &str| {
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    let (pre_tokenizer, nfc, ignore_merges) = match name {
        "gpt-2" => (byte_level(true), false, false),
        "smollm" => (Sequence::new(vec![Digits::new(true).into(), byte_level(true)]).into(), false, false),
        "qwen2" => (split_then_bytes(cl100k(r"\p{N}")), true, false),
        "llama-bpe" => (split_then_bytes(cl100k(r"\p{N}{1,3}")), false, true),
        _ => {
            return Err(TokenizerError::Unsupported { what: "pre-tokenizer", found: name.into(), expected: PRE_TOKENIZERS.into() });
        }
    };
    Ok(PreTokenization { pre_tokenizer, nfc, ignore_merges })
}

#[cfg(test)]
mod tests;
