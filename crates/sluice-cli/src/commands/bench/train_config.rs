//! The two decoders whose training step is measured, the same as in `benches/peers`, and batches for them.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use sluice_model::{AttentionPlan, Policy};
use sluice_spec::{Architecture, ModelConfig, RoutingConfig};
use sluice_tensor::Tensor;
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

    /// The same with random gates and routed attention, in which everything learns: the gates through the bias of the keys that they
    /// keep. Random scores scatter the routed keys over the whole past, the worst case for a gather.
    pub(super) fn routed_trainer(&self, checkpoint: bool, routing: RoutingConfig) -> Pretrainer {
        let mut trainer = self.trainer(checkpoint);
        trainer.model.add_gates(routing.gate_heads);
        let m = self.model.d_model;
        for (index, layer) in trainer.model.layers.iter_mut().enumerate() {
            let gate = Arc::make_mut(layer).gate.as_mut().expect("gates were added");
            let n = gate.weight.value.len();
            // Uniform with variance 1 / M, so that scores of normed rows have variance 1.
            let uniform = |i: usize| (mix(0x6A7E + index as u64, i as u64) >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            gate.weight.value = Tensor::from_vec((0..n).map(|i| uniform(i) * (12.0 / m as f32).sqrt()).collect(), [n / m, m]);
        }
        trainer.model.set_trainable(|_| true);
        trainer.attention = AttentionPlan::new(Policy::Gate, RoutingConfig { gate_temperature: 1.0, ..routing });
        trainer
    }

    /// Random tokens.
    pub(super) fn tokens(&self) -> Batch {
        let vocab = self.model.vocab_size as u64;
        let weights = vec![1.0; self.context + 1];
        let sequence = |row: u64| ((0..=self.context as u64).map(|i| (mix(row, i) % vocab) as u32).collect(), weights.clone());
        Batch::of(&(0..self.batch as u64).map(sequence).collect::<Vec<_>>())
    }
}

/// A stream of tokens in a file, little-endian u16, that gives every step the next ones.
pub(super) struct TokenFile {
    tokens: Vec<u32>,
}

impl TokenFile {
    /// Read a stream that `steps` batches of `setup` fit in.
    pub(super) fn read(path: &Path, setup: &Setup, steps: usize) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(bytes.len().is_multiple_of(2), "{} has {} bytes; expected tokens of two bytes each", path.display(), bytes.len());
        let tokens: Vec<u32> = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]).into()).collect();
        let needed = steps * setup.batch * setup.context + 1;
        ensure!(
            tokens.len() >= needed,
            "{} holds {} tokens and {steps} steps read {needed}; give a longer file, fewer --steps, or a smaller --batch or --context",
            path.display(),
            tokens.len()
        );
        if let Some(token) = tokens.iter().find(|token| **token as usize >= setup.model.vocab_size) {
            bail!("{} holds token {token}; the vocabulary has {}", path.display(), setup.model.vocab_size);
        }
        Ok(Self { tokens })
    }

    /// Batch of a step: sequences that follow each other; the last target of one is the first token of the next.
    pub(super) fn batch(&self, setup: &Setup, step: usize) -> Batch {
        let window = |row: usize| {
            let begin = (step * setup.batch + row) * setup.context;
            (self.tokens[begin..=begin + setup.context].to_vec(), vec![1.0; setup.context + 1])
        };
        Batch::of(&(0..setup.batch).map(window).collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_of_a_routed_step_learn_beside_everything_else() {
        let setup = Setup { batch: 1, ..Setup::named("tiny", Some(96)).unwrap() };
        let routing = RoutingConfig { window: 8, top_k: 16, route_every: 8, ..RoutingConfig::default() };
        let mut trainer = setup.routed_trainer(false, routing);
        // Without this the gates move by weight decay alone.
        trainer.config.optimizer.weight_decay = 0.0;
        let weights =
            |trainer: &Pretrainer| trainer.model.params().iter().map(|p| (p.name.clone(), p.value.f32().to_vec())).collect::<Vec<_>>();
        let before = weights(&trainer);
        trainer.step(&setup.tokens()).unwrap();
        for ((name, before), (_, after)) in before.iter().zip(weights(&trainer)) {
            // A recency slope of 0 stays there while its gradient points below; a bias moves all scores alike and changes nothing.
            let may_stay = name.ends_with("gate.recency") || name.ends_with("gate.bias");
            assert!(may_stay || *before != after, "{name} did not learn");
        }
    }

    #[test]
    fn a_token_file_gives_every_step_the_next_tokens_and_refuses_what_does_not_fit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.u16");
        let setup = Setup { batch: 2, ..Setup::named("tiny", Some(4)).unwrap() };
        std::fs::write(&path, (100u16..117).flat_map(u16::to_le_bytes).collect::<Vec<_>>()).unwrap();
        let file = TokenFile::read(&path, &setup, 2).unwrap();
        let second = file.batch(&setup, 1);
        assert_eq!(second.tokens, (108..116).collect::<Vec<u32>>());
        assert_eq!(second.targets, (109..117).collect::<Vec<u32>>());

        let refusal = |steps| TokenFile::read(&path, &setup, steps).err().unwrap().to_string();
        assert!(refusal(3).contains("holds 17 tokens and 3 steps read 25"), "{}", refusal(3));
        std::fs::write(&path, [0, 8]).unwrap();
        assert!(refusal(0).contains("token 2048; the vocabulary has 2048"), "{}", refusal(0));
        std::fs::write(&path, [0, 0, 1]).unwrap();
        assert!(refusal(0).contains("3 bytes"), "{}", refusal(0));
    }
}
