//! Sentences in, one vector each out: an encoder with its tokenizer, batches of similar lengths.

use std::path::Path;

use anyhow::{Context, Result};
use sluice_data::Tokenizer;
use sluice_model::checkpoint::load_encoder;
use sluice_model::{Encoder, TextBatch};
use sluice_spec::TextConfig;
use sluice_tensor::Device;

/// Padded tokens of a batch: enough to fill a device, few enough for its memory.
const TOKENS_PER_BATCH: usize = 1 << 14;

/// An encoder for sentences.
pub(crate) struct SentenceEncoder {
    encoder: Encoder,
    tokenizer: Tokenizer,
    max_tokens: usize,
}

/// What became of some sentences.
pub(crate) struct Embedded {
    /// One vector of length 1 a sentence, in the order of the sentences.
    pub(crate) vectors: Vec<Vec<f32>>,
    /// Tokens of all sentences, special ones included.
    pub(crate) n_tokens: usize,
    /// Sentences that were cut because the model takes no more tokens.
    pub(crate) n_cut: usize,
}

impl SentenceEncoder {
    /// Load the folder of an encoder onto a device.
    pub(crate) fn load(folder: &Path, device: &Device) -> Result<Self> {
        let checkpoint = load_encoder(folder)?;
        let tokenizer = Tokenizer::from_file(&checkpoint.tokenizer, &TextConfig::default())?;
        tokenizer.check_fits(checkpoint.config.vocab_size).with_context(|| folder.display().to_string())?;
        let encoder = Encoder::from_checkpoint(&checkpoint).to(device);
        Ok(Self { encoder, tokenizer, max_tokens: checkpoint.max_tokens })
    }

    /// Width of a vector.
    pub(crate) fn width(&self) -> usize {
        self.encoder.config.d_model
    }

    /// Mean of the states of each sentence, scaled to length 1; `done` hears how many are.
    pub(crate) fn embed(&self, sentences: &[&str], mut done: impl FnMut(usize)) -> Embedded {
        let mut n_cut = 0;
        let ids: Vec<Vec<u32>> = sentences
            .iter()
            .map(|sentence| {
                let (ids, cut) = shortened(self.tokenizer.encode_with_special(sentence), self.max_tokens);
                n_cut += usize::from(cut);
                ids
            })
            .collect();
        // Neighbours in length share a batch, so that little of it is padding.
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|&i| ids[i].len());
        let mut vectors = vec![Vec::new(); ids.len()];
        let mut rest = order.as_slice();
        while !rest.is_empty() {
            // The last one is the longest.
            let fits = |n: &usize| *n == 1 || n * ids[rest[n - 1]].len() <= TOKENS_PER_BATCH;
            let n = (1..=rest.len()).take_while(fits).last().unwrap_or(1);
            let (batch, behind) = rest.split_at(n);
            let texts: Vec<&[u32]> = batch.iter().map(|&i| ids[i].as_slice()).collect();
            let means = self.encoder.mean_states(&TextBatch::of(&texts)).to(&Device::Cpu);
            for (&i, mean) in batch.iter().zip(means.f32().chunks_exact(self.width())) {
                vectors[i] = unit(mean);
            }
            rest = behind;
            done(ids.len() - rest.len());
        }
        Embedded { vectors, n_tokens: ids.iter().map(Vec::len).sum(), n_cut }
    }
}

/// At most `max` ids, the last one (which ends a text) kept; whether any was cut.
fn shortened(mut ids: Vec<u32>, max: usize) -> (Vec<u32>, bool) {
    let cut = ids.len() > max;
    if cut {
        let last = ids.len() - 1;
        ids.swap(max - 1, last);
        ids.truncate(max);
    }
    (ids, cut)
}

/// Scaled to length 1, as sentence-transformers does it: a vector of zeros stays.
fn unit(x: &[f32]) -> Vec<f32> {
    let length = x.iter().map(|x| (x * x) as f64).sum::<f64>().sqrt().max(1e-12);
    x.iter().map(|x| (*x as f64 / length) as f32).collect()
}

/// Cosine of the angle between vectors of length 1.
pub(crate) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_keeps_its_beginning_and_its_end_mark() {
        assert_eq!(shortened(vec![1, 5, 6, 7, 2], 4), (vec![1, 5, 6, 2], true));
        assert_eq!(shortened(vec![1, 5, 6, 2], 4), (vec![1, 5, 6, 2], false));
    }

    #[test]
    fn vectors_have_length_one_and_nothing_stays_nothing() {
        assert_eq!(unit(&[3.0, -4.0]), [0.6, -0.8]);
        assert_eq!(unit(&[0.0, 0.0]), [0.0, 0.0]);
    }
}
