//! Trains the embedded tokenizer on the embedded training texts and writes `data/tiny-tokenizer.json`:
//! `cargo run -p sluice-data --example train_tokenizer`

use std::collections::HashSet;

use sluice_data::embedded::{SPECIAL_TOKENS, Split, documents};
use sluice_data::recall;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

/// So that every word of the recall documents occurs several hundred times, more than any merge of 2048 needs.
const RECALL_SENTENCES: usize = 24_000;

fn main() -> anyhow::Result<()> {
    let mut texts: Vec<String> = documents().into_iter().filter(|d| d.split == Split::Train).map(|d| d.text).collect();
    texts.extend(recall::sample_sentences(RECALL_SENTENCES));

    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()])));
    tokenizer.with_decoder(Some(ByteLevelDecoder::default()));
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .vocab_size(2048)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect::<HashSet<char>>())
        .special_tokens(SPECIAL_TOKENS.iter().map(|token| AddedToken::from(*token, true)).collect())
        .show_progress(false)
        .build()
        .into();
    tokenizer.train(&mut trainer, texts.iter().map(String::as_str)).map_err(|e| anyhow::anyhow!("training failed: {e}"))?;
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/tiny-tokenizer.json");
    tokenizer.save(path, false).map_err(|e| anyhow::anyhow!("cannot write {path}: {e}"))?;
    Ok(())
}
