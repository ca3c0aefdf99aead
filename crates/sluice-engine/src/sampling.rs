//! Choosing the next token from logits. Seeded, and reproducible: a draw depends on the seed and on how many were made before.

use std::cmp::Ordering;

/// How a token is chosen. The default takes the most likely one.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingConfig {
    /// 0 always takes the most likely token.
    pub temperature: f32,
    /// Sample from this many most likely tokens; 0 for all.
    pub top_k: usize,
    /// Sample from the most likely tokens that together have this probability.
    pub top_p: f32,
    /// Leave out tokens less likely than this share of the most likely one.
    pub min_p: f32,
    /// Logits of tokens that occurred, in the prompt too, are divided by this where positive, multiplied where negative; 1
    /// changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every token that was chosen before.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit for each time that it was chosen before.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 1,
        }
    }
}

/// A token and the logarithm of its probability before temperature and cuts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Its id.
    pub token: u32,
    /// Natural logarithm, under the logits after penalties and bias.
    pub logprob: f32,
}

/// Samples one sequence. All room is taken at the start.
pub struct Sampler {
    config: SamplingConfig,
    /// Times that each token was chosen.
    counts: Vec<u32>,
    /// Tokens of the prompt.
    in_prompt: Vec<bool>,
    /// Logits of the last choice, after penalties and bias.
    logits: Vec<f32>,
    /// Logarithm of the sum of their exponentials.
    log_sum: f32,
    order: Vec<u32>,
    drawn: u64,
}

impl Sampler {
    /// A sampler for a vocabulary.
    pub fn new(config: SamplingConfig, vocab_size: usize) -> Self {
        Self {
            config,
            counts: vec![0; vocab_size],
            in_prompt: vec![false; vocab_size],
            logits: vec![0.0; vocab_size],
            log_sum: 0.0,
            order: Vec::with_capacity(vocab_size),
            drawn: 0,
        }
    }

    /// Tokens that it chooses from.
    pub fn vocab_size(&self) -> usize {
        self.counts.len()
    }

    /// Note tokens of the prompt for the repetition penalty.
    pub fn observe(&mut self, prompt: &[u32]) {
        for &token in prompt {
            if let Some(seen) = self.in_prompt.get_mut(token as usize) {
                *seen = true;
            }
        }
    }

    /// Choose from logits `[V]`; equals go to the smaller id. Panics for another vocabulary.
    #[track_caller]
    pub fn sample(&mut self, logits: &[f32]) -> Choice {
        assert_eq!(logits.len(), self.logits.len(), "sample: logits of another vocabulary");
        self.logits.copy_from_slice(logits);
        self.adjust();
        let logits = &self.logits;
        let best = (0..logits.len()).reduce(|a, b| if logits[b] > logits[a] { b } else { a }).expect("a vocabulary is not empty");
        let largest = logits[best];
        self.log_sum = logits.iter().map(|l| (l - largest).exp()).sum::<f32>().ln() + largest;
        let token = if self.config.temperature <= 0.0 { None } else { self.draw(largest) };
        let token = token.unwrap_or(best as u32);
        self.counts[token as usize] += 1;
        self.choice(token)
    }

    /// The `n` tokens that were most likely at the last choice, most likely first.
    pub fn most_likely(&mut self, n: usize) -> Vec<Choice> {
        let (logits, n) = (&self.logits, n.min(self.logits.len()));
        if n == 0 {
            return Vec::new();
        }
        self.order.clear();
        self.order.extend(0..logits.len() as u32);
        self.order.select_nth_unstable_by(n - 1, by_likelihood(logits));
        self.order.truncate(n);
        self.order.sort_unstable_by(by_likelihood(logits));
        self.order.iter().map(|&token| self.choice(token)).collect()
    }

    fn choice(&self, token: u32) -> Choice {
        Choice { token, logprob: self.logits[token as usize] - self.log_sum }
    }

    fn adjust(&mut self) {
        let c = &self.config;
        if c.repetition_penalty != 1.0 || c.presence_penalty != 0.0 || c.frequency_penalty != 0.0 {
            for ((logit, &count), &in_prompt) in self.logits.iter_mut().zip(&self.counts).zip(&self.in_prompt) {
                if count > 0 || in_prompt {
                    *logit = if *logit > 0.0 { *logit / c.repetition_penalty } else { *logit * c.repetition_penalty };
                }
                if count > 0 {
                    *logit -= c.presence_penalty + c.frequency_penalty * count as f32;
                }
            }
        }
        for &(token, bias) in &c.logit_bias {
            if let Some(logit) = self.logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    /// None when there is no number to go by.
    fn draw(&mut self, largest: f32) -> Option<u32> {
        let (logits, c) = (&self.logits, &self.config);
        let weight = |token: u32| ((logits[token as usize] - largest) / c.temperature).exp();
        self.order.clear();
        self.order.extend((0..logits.len() as u32).filter(|&token| weight(token) >= c.min_p.max(f32::MIN_POSITIVE)));
        if c.top_k > 0 && c.top_k < self.order.len() {
            self.order.select_nth_unstable_by(c.top_k - 1, by_likelihood(logits));
            self.order.truncate(c.top_k);
        }
        self.order.sort_unstable_by(by_likelihood(logits));
        let total: f32 = self.order.iter().map(|&t| weight(t)).sum();
        let (mut kept, mut nucleus) = (0, 0.0);
        while kept < self.order.len() && (kept == 0 || nucleus < c.top_p * total) {
            nucleus += weight(self.order[kept]);
            kept += 1;
        }
        self.drawn += 1;
        let mut u = uniform(c.seed, self.drawn) * nucleus;
        for &token in &self.order[..kept] {
            u -= weight(token);
            if u < 0.0 {
                return Some(token);
            }
        }
        self.order[..kept].last().copied()
    }
}

/// Most likely first, equals by id.
fn by_likelihood(logits: &[f32]) -> impl Fn(&u32, &u32) -> Ordering + '_ {
    |a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
}

/// Uniform in [0, 1): a hash of the seed and the number of the draw (SplitMix64's finaliser).
fn uniform(seed: u64, draw: u64) -> f32 {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ draw.wrapping_mul(0xC2B2_AE3D_27D4_EB4F).wrapping_add(0x1656_67B1_9E37_79F9);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    (z >> 40) as f32 / (1u64 << 24) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(config: SamplingConfig, logits: &[f32], n: usize) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for seed in 0..n as u64 {
            let mut sampler = Sampler::new(SamplingConfig { seed, ..config.clone() }, logits.len());
            counts[sampler.sample(logits).token as usize] += 1;
        }
        counts
    }

    const LOGITS: [f32; 4] = [0.0, 1.1, -2.0, 0.7]; // odds 1 : 3 : 0.135 : 2

    #[test]
    fn greedy_takes_the_first_of_equals_and_knows_its_probability() {
        let choice = Sampler::new(SamplingConfig::default(), 3).sample(&[0.5, 2.0, 2.0]);
        assert_eq!(choice.token, 1);
        assert!((choice.logprob - -(2.0 + (-1.5f32).exp()).ln()).abs() < 1e-6, "{choice:?}");
    }

    #[test]
    fn draws_follow_the_probabilities_and_every_cut_holds() {
        let warm = SamplingConfig { temperature: 1.0, ..SamplingConfig::default() };
        let counts = draws(warm.clone(), &LOGITS, 6000);
        let share = |i: usize| counts[i] as f32 / counts[0] as f32;
        assert!((share(1) - 3.0).abs() < 0.4 && (share(3) - 2.0).abs() < 0.3 && counts[2] > 60, "{counts:?}");
        for (config, allowed) in [
            (SamplingConfig { top_k: 2, ..warm.clone() }, [false, true, false, true]),
            (SamplingConfig { top_p: 0.6, ..warm.clone() }, [false, true, false, true]),
            (SamplingConfig { min_p: 0.5, ..warm.clone() }, [false, true, false, true]),
            (SamplingConfig { logit_bias: vec![(1, -100.0)], ..warm.clone() }, [true, false, true, true]),
            (SamplingConfig { top_p: 0.0, ..warm.clone() }, [false, true, false, false]),
        ] {
            let counts = draws(config.clone(), &LOGITS, 1000);
            assert!(counts.iter().zip(allowed).all(|(&n, allowed)| (n > 0) == allowed), "{config:?}: {counts:?}");
        }
    }

    #[test]
    fn the_most_likely_tokens_come_with_their_probabilities() {
        let mut sampler = Sampler::new(SamplingConfig { logit_bias: vec![(2, 9.0)], ..SamplingConfig::default() }, 4);
        let choice = sampler.sample(&LOGITS);
        let top = sampler.most_likely(3);
        assert_eq!(top.iter().map(|choice| choice.token).collect::<Vec<_>>(), [2, 1, 3]);
        assert_eq!(top[0], choice);
        let all: f32 = sampler.most_likely(9).iter().map(|choice| choice.logprob.exp()).sum();
        assert!((all - 1.0).abs() < 1e-6 && sampler.most_likely(0).is_empty(), "{all}");
    }

    #[test]
    fn logits_that_are_no_numbers_still_give_a_token() {
        for temperature in [0.0, 1.0] {
            let mut sampler = Sampler::new(SamplingConfig { temperature, ..SamplingConfig::default() }, 3);
            assert!(sampler.sample(&[f32::NAN; 3]).token < 3);
            assert!(sampler.sample(&[f32::NEG_INFINITY; 3]).token < 3);
            assert_eq!(sampler.sample(&[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY]).token, 1);
        }
    }

    #[test]
    fn penalties_push_away_what_occurred() {
        for config in [
            SamplingConfig { repetition_penalty: 3.0, ..SamplingConfig::default() },
            SamplingConfig { presence_penalty: 0.6, ..SamplingConfig::default() },
            SamplingConfig { frequency_penalty: 0.6, ..SamplingConfig::default() },
        ] {
            let mut sampler = Sampler::new(config.clone(), 4);
            assert_eq!(sampler.sample(&LOGITS).token, 1);
            assert_eq!(sampler.sample(&LOGITS).token, 3, "{config:?}");
        }
        let mut sampler = Sampler::new(SamplingConfig { repetition_penalty: 2.0, ..SamplingConfig::default() }, 2);
        sampler.observe(&[1]);
        assert_eq!(sampler.sample(&[-1.5, -1.0]).token, 0, "a negative logit is multiplied");
        let mut sampler = Sampler::new(SamplingConfig { presence_penalty: 2.0, ..SamplingConfig::default() }, 2);
        sampler.observe(&[1]);
        assert_eq!(sampler.sample(&[-1.5, -1.0]).token, 1, "presence is presence in the answer");
    }
}
