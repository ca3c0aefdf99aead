//! Batches for `sluice train`: windows of text and generated recall documents, each a function of seed and step.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use sluice_data::Tokenizer;
use sluice_data::embedded::{self, Split};
use sluice_data::recall::{Filler, RecallConfig, RecallGenerator};
use sluice_model::Decoder;
use sluice_model::checkpoint::export_hf;
use sluice_tensor::DType;
use sluice_train::documents::Documents;
use sluice_train::hash::mix;
use sluice_train::pretrain::{Batch, TrainConfig};

/// Tokenised texts, and generators of recall documents for every kind of phase of a recipe.
pub(crate) struct TrainingData {
    tokenizer: Tokenizer,
    documents: Documents,
    recall: BTreeMap<(usize, bool), RecallGenerator>,
}

impl TrainingData {
    /// Read and tokenise the embedded training texts and the recipe's own.
    pub(crate) fn new(config: &TrainConfig) -> Result<Self> {
        let tokenizer = embedded::tokenizer();
        tokenizer.check_fits(config.model.vocab_size)?;
        let embedded: Vec<_> = embedded::documents().into_iter().filter(|d| d.split == Split::Train).collect();
        let prose: Vec<&str> = embedded.iter().filter(|d| d.domain == "prose" || d.domain == "speech").map(|d| d.text.as_str()).collect();
        let filler = Filler::new(&tokenizer, &prose);
        let recall = config.phases.iter().map(|phase| {
            let len = phase.context + 1;
            let kind = if phase.drill { RecallConfig::drill(len) } else { RecallConfig::training(len) };
            ((len, phase.drill), RecallGenerator::new(kind, &tokenizer, filler.clone()))
        });
        let recall = recall.collect();
        let mut texts: Vec<String> = embedded.into_iter().map(|d| d.text).collect();
        for path in &config.data.text {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the training text {path} as UTF-8"))?;
            texts.extend(text.split('\u{c}').map(str::to_string));
        }
        let tokenised = tokenizer.encode_batch(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        Ok(Self { documents: Documents::new(tokenised, 64)?, recall, tokenizer })
    }

    /// Tokens of text, recall documents not counted.
    pub(crate) fn text_tokens(&self) -> u64 {
        self.documents.tokens()
    }

    /// The batch of a step.
    pub(crate) fn batch(&self, config: &TrainConfig, step: u64) -> Batch {
        let phase = config.phase(step);
        let len = phase.context + 1;
        let sequences: Vec<_> = (0..phase.batch as u64)
            .map(|row| {
                let hash = mix(config.seed ^ (step << 8), row);
                let drawn = (hash >> 11) as f64 / (1u64 << 53) as f64;
                if drawn < phase.copy_share {
                    return self.repetition(hash, len);
                }
                let (tokens, answers) = if drawn < phase.copy_share + config.data.recall_share * (1.0 - phase.copy_share) {
                    let document = self.recall[&(len, phase.drill)].document(hash);
                    (document.tokens, document.answers)
                } else {
                    (self.documents.window(hash, len).to_vec(), Vec::new())
                };
                let mut weights = vec![1.0; tokens.len()];
                for answer in answers {
                    weights[answer.start..answer.start + answer.len].fill(config.data.answer_weight);
                }
                (tokens, weights)
            })
            .collect();
        Batch::of(&sequences)
    }

    /// Random tokens, repeated; what cannot be predicted has no weight.
    fn repetition(&self, seed: u64, len: usize) -> (Vec<u32>, Vec<f32>) {
        let period = 8 + (mix(seed, 0) % (len as u64 / 3)) as usize;
        let n_special = embedded::SPECIAL_TOKENS.len() as u64;
        let token = |i: usize| (n_special + mix(seed, 1 + (i % period) as u64) % (self.tokenizer.vocab_size() as u64 - n_special)) as u32;
        ((0..len).map(token).collect(), (0..len).map(|i| if i < period { 0.0 } else { 1.0 }).collect())
    }

    /// Write the model as a Hugging Face folder in bf16.
    pub(crate) fn export(&self, model: &Decoder, out: &Path) -> Result<()> {
        let text = self.tokenizer.text_config();
        export_hf(out, &model.config, &model.base_tensors(), text, Some(&self.tokenizer.to_json()), None, DType::Bf16)?;
        Ok(())
    }
}
