//! The text and the small tokenizer that are compiled into Sluice; `data/README.md` says where they come from.
//! Knows nothing about token budgets or sampling.

use std::io::{Cursor, Read};

use sluice_spec::TextConfig;

use crate::Tokenizer;

const CORPUS: &[u8] = include_bytes!("../../../data/corpus.zip");
const TOKENIZER: &str = include_str!("../../../data/tiny-tokenizer.json");

/// Special tokens of the embedded tokenizer: ids 0, 1 and 2.
pub const SPECIAL_TOKENS: [&str; 3] = ["<|bos|>", "<|eos|>", "<|pad|>"];

/// Whether a document may be trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Split {
    /// Training.
    Train,
    /// Held out for evaluation.
    Held,
}

/// One text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// For instance `rust-book/ch04.md`.
    pub name: String,
    /// `prose`, `speech`, `code` or `docs`; for a file of the user's, its stem.
    pub domain: String,
    /// Training or held out.
    pub split: Split,
    /// The text.
    pub text: String,
}

/// All embedded documents, held-out ones first, each split in the order of domain and name.
pub fn documents() -> Vec<Document> {
    let mut archive = zip::ZipArchive::new(Cursor::new(CORPUS)).expect("the embedded archive is valid");
    (0..archive.len())
        .map(|i| {
            let mut entry = archive.by_index(i).expect("the embedded archive is valid");
            let path = entry.name().expect("paths are UTF-8").to_string();
            let mut text = String::new();
            entry.read_to_string(&mut text).expect("embedded texts are UTF-8");
            let (split, rest) = path.split_once('/').expect("paths are SPLIT/DOMAIN/NAME");
            let (domain, name) = rest.split_once('/').expect("paths are SPLIT/DOMAIN/NAME");
            let split = match split {
                "train" => Split::Train,
                "held" => Split::Held,
                other => unreachable!("embedded document {path} has split {other}"),
            };
            Document { name: name.into(), domain: domain.into(), split, text }
        })
        .collect()
}

/// The small byte-level BPE of the tiny teacher: 2048 tokens, digits single.
pub fn tokenizer() -> Tokenizer {
    let text = TextConfig { bos: Some(0), eos: vec![1], chat_template: None };
    Tokenizer::from_json(TOKENIZER, &text).expect("the embedded tokenizer is valid")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recall;

    #[test]
    fn every_domain_has_long_documents_in_both_splits() {
        let documents = documents();
        assert_eq!(documents.len(), 76);
        for domain in ["prose", "speech", "code", "docs"] {
            for split in [Split::Train, Split::Held] {
                let longest = documents.iter().filter(|d| d.domain == domain && d.split == split).map(|d| d.text.len()).max();
                assert!(longest.unwrap() > 30_000, "{domain} {split:?}");
            }
        }
    }

    #[test]
    fn held_out_text_does_not_occur_in_training_text() {
        let documents = documents();
        let train: String = documents.iter().filter(|d| d.split == Split::Train).map(|d| d.text.as_str()).collect();
        for held in documents.iter().filter(|d| d.split == Split::Held && d.domain != "code") {
            let mut middle = held.text.len() / 2;
            while !held.text.is_char_boundary(middle) || !held.text.is_char_boundary(middle + 200) {
                middle += 1;
            }
            assert!(!train.contains(&held.text[middle..middle + 200]), "{}", held.name);
        }
    }

    #[test]
    fn tokenizer_has_2048_ids_and_single_digits_and_is_lossless() {
        let tokenizer = tokenizer();
        assert_eq!(tokenizer.vocab_size(), 2048);
        for (id, token) in SPECIAL_TOKENS.iter().enumerate() {
            assert_eq!(tokenizer.token_id(token), Some(id as u32));
        }
        assert_eq!(tokenizer.encode("1818").len(), 4);
        for document in documents().iter().filter(|d| d.split == Split::Held).take(4) {
            let ids = tokenizer.encode(&document.text);
            assert_eq!(tokenizer.decode(&ids), document.text);
            let bytes_per_token = document.text.len() as f64 / ids.len() as f64;
            assert!(bytes_per_token > 2.5, "{}: {bytes_per_token}", document.name);
        }
    }

    #[test]
    fn recall_words_are_single_tokens_of_the_tokenizer() {
        let tokenizer = tokenizer();
        for word in recall::words() {
            assert_eq!(tokenizer.encode(&format!(" {word}")).len(), 1, "{word}");
        }
    }
}
