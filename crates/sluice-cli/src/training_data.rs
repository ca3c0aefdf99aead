//! Batches for `sluice train`: windows of text and generated recall documents, each a function of seed and step.

use std::path::Path;

use anyhow::{Context, Result};
use sluice_data::recall::{self, RecallConfig};
use sluice_data::{Tokenizer, embedded};
use sluice_model::Decoder;
use sluice_model::checkpoint::export_hf;
use sluice_spec::TextConfig;
use sluice_tensor::DType;
use sluice_train::documents::Documents;
use sluice_train::hash::mix;
use sluice_train::pretrain::{Batch, TrainConfig};

/// Tokenised texts and what is needed to make more.
pub(crate) struct TrainingData {
    tokenizer: Tokenizer,
    documents: Documents,
    prose: Documents,
}

impl TrainingData {
    /// Read and tokenise the embedded training texts and the recipe's own.
    pub(crate) fn new(config: &TrainConfig) -> Result<Self> {
        let tokenizer = embedded::tokenizer();
        tokenizer.check_fits(config.model.vocab_size)?;
        let mut texts: Vec<String> = embedded::training_documents().map(|d| d.text.to_string()).collect();
        for path in &config.data.text {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the training text {path} as UTF-8"))?;
            texts.extend(text.split('\u{c}').map(str::to_string));
        }
        let tokenised = tokenizer.encode_batch(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        let prose: Vec<String> = embedded::training_documents().filter(|d| d.domain == "prose" || d.domain == "speech").map(|d| d.text.to_string()).collect();
        let prose = tokenizer.encode_batch(&prose.iter().map(String::as_str).collect::<Vec<_>>());
        Ok(Self { documents: Documents::new(tokenised, 64)?, prose: Documents::new(prose, 64)?, tokenizer })
    }

    /// Tokens of text, recall documents not counted.
    pub(crate) fn text_tokens(&self) -> u64 {
        self.documents.tokens()
    }

    /// The batch of a step.
    pub(crate) fn batch(&self, config: &TrainConfig, step: u64) -> Batch {
        let phase = config.phase(step);
        let sequences: Vec<_> = (0..phase.batch as u64)
            .map(|row| {
                let hash = mix(config.seed ^ (step << 8), row);
                if ((hash >> 11) as f64) < config.data.recall_share * (1u64 << 53) as f64 {
                    let document = self.recall(hash, phase.context + 1);
                    let mut weights = vec![1.0; document.tokens.len()];
                    for answer in &document.answers {
                        weights[answer.start..answer.start + answer.len].fill(config.data.answer_weight);
                    }
                    (document.tokens, weights)
                } else {
                    let tokens = self.documents.window(hash, phase.context + 1).to_vec();
                    let weights = vec![1.0; tokens.len()];
                    (tokens, weights)
                }
            })
            .collect();
        Batch::of(&sequences)
    }

    fn recall(&self, seed: u64, len: usize) -> recall::RecallDocument {
        let filler = self.prose.window(mix(seed, 7), len);
        recall::document(seed, &RecallConfig::training(len), &self.tokenizer, filler)
    }

    /// Write the model as a Hugging Face folder in bf16.
    pub(crate) fn export(&self, model: &Decoder, out: &Path) -> Result<()> {
        let text: &TextConfig = self.tokenizer.text_config();
        export_hf(out, &model.config, &model.base_tensors(), text, Some(&self.tokenizer.to_json()), None, DType::Bf16)?;
        Ok(())
    }
}
