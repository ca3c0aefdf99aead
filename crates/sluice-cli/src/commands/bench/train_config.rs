//! The two decoders whose training step is measured, the same as in `benches/peers`, and a batch for them.

use anyhow::{Result, bail};
use sluice_spec::{Architecture, ModelConfig};
use sluice_train::hash::mix;
use sluice_train::pretrain::{Batch, DataConfig, Phase, Pretrainer, TrainConfig};

/// A decoder and the batch of its step.
pub(super) struct Setup {
    pub(super) model: ModelConfig,
    pub(super) batch: usize,
    pub(super) context: usize,
}

impl Setup {
    /// `tiny` or `135m`, at its usual context or another.
    pub(super) fn named(name: &str, context: Option<usize>) -> Result<Self> {
        let decoder = |n_layers, d_model, n_heads, n_kv_heads, head_dim, d_ff, vocab_size| ModelConfig {
            architecture: Architecture::Llama,
            n_layers,
            d_model,
            d_ff,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab_size,
            max_seq_len: 8192,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: None,
            tie_embeddings: true,
            qkv_bias: false,
            qk_norm: false,
        };
        let (model, usual, batch) = match name {
            "tiny" => (decoder(6, 128, 4, 2, 32, 384, 2048), 2048, 2),
            "135m" => (decoder(30, 576, 9, 3, 64, 1536, 49152), 512, 1),
            other => bail!("unknown config `{other}`; expected tiny or 135m"),
        };
        Ok(Self { model, batch, context: context.unwrap_or(usual) })
    }

    /// A run from random weights, ready for its first step.
    pub(super) fn trainer(&self, checkpoint: bool) -> Pretrainer {
        Pretrainer::new(TrainConfig {
            seed: 1,
            model: self.model.clone(),
            optimizer: Default::default(),
            data: DataConfig { recall_share: 0.0, answer_weight: 1.0, text: Vec::new() },
            phases: vec![Phase { steps: 1000, context: self.context, batch: self.batch, copy_share: 0.0, drill: false }],
            checkpoint,
        })
    }

    /// Random tokens.
    pub(super) fn tokens(&self) -> Batch {
        let vocab = self.model.vocab_size as u64;
        let weights = vec![1.0; self.context + 1];
        let sequence = |row: u64| ((0..=self.context as u64).map(|i| (mix(row, i) % vocab) as u32).collect(), weights.clone());
        Batch::of(&(0..self.batch as u64).map(sequence).collect::<Vec<_>>())
    }
}
