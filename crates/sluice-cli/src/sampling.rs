//! Sampling options of `generate` and `chat`.

use sluice_engine::SamplingConfig;

/// How the next token is chosen.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct SamplingArgs {
    /// 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    temperature: f32,
    /// Sample from the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Leave out tokens less likely than this share of the most likely one
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Divide the positive logits of tokens that occurred by this, multiply the negative ones
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Seed of the sampling
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl SamplingArgs {
    /// The same as a sampler takes it.
    pub(crate) fn config(&self) -> SamplingConfig {
        SamplingConfig {
            temperature: self.temperature,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            ..SamplingConfig::default()
        }
    }
}
