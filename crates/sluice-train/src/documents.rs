//! Tokenised documents to draw training windows from.

use anyhow::{Result, ensure};

use crate::hash::mix;

/// Documents with a random access to windows: document by length, offset uniform, both from a hash.
#[derive(Clone)]
pub struct Documents {
    documents: Vec<Vec<u32>>,
    /// Sum of the lengths up to and including each document.
    ends: Vec<u64>,
}

impl Documents {
    /// Keep the documents of at least `min_len` tokens.
    pub fn new(documents: Vec<Vec<u32>>, min_len: usize) -> Result<Self> {
        let (n, longest) = (documents.len(), documents.iter().map(Vec::len).max().unwrap_or(0));
        let documents: Vec<Vec<u32>> = documents.into_iter().filter(|d| d.len() >= min_len).collect();
        ensure!(
            !documents.is_empty(),
            "none of the {n} documents has {min_len} tokens (the longest has {longest}); give longer texts or a shorter context"
        );
        let mut end = 0;
        let ends = documents.iter().map(|d| {
            end += d.len() as u64;
            end
        });
        let ends = ends.collect();
        Ok(Self { documents, ends })
    }

    /// Tokens in all.
    pub fn tokens(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Up to `len` consecutive tokens of one document, chosen by `hash`.
    pub fn window(&self, hash: u64, len: usize) -> &[u32] {
        let at = mix(hash, 1) % self.tokens();
        let document = &self.documents[self.ends.partition_point(|&end| end <= at)];
        let offsets = document.len().saturating_sub(len) as u64 + 1;
        let offset = (mix(hash, 2) % offsets) as usize;
        &document[offset..document.len().min(offset + len)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_stay_inside_one_document_and_repeat_for_the_same_hash() {
        let documents = Documents::new(vec![vec![1; 50], vec![2; 5], vec![3; 200]], 10).unwrap();
        assert_eq!(documents.tokens(), 250);
        let mut seen = [0; 4];
        for hash in 0..400 {
            let window = documents.window(hash, 80);
            assert!(window.len() == 80 || (window.len() == 50 && window[0] == 1));
            assert!(window.iter().all(|t| *t == window[0]));
            assert_eq!(window, documents.window(hash, 80));
            seen[window[0] as usize] += 1;
        }
        assert!(seen[2] == 0 && seen[3] > 2 * seen[1] && seen[1] > 20, "{seen:?}");
        assert!(Documents::new(vec![vec![1; 5]], 10).is_err());
    }
}
