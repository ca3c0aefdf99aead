//! Choosing the next token from logits.

/// Sampling options of `generate` and `chat`.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct SamplingArgs {
    /// 0 always takes the most likely token
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    temperature: f32,
    /// Sample from the most likely tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Seed of the sampling
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// A seeded sampler.
pub(crate) struct Sampler {
    temperature: f32,
    top_p: f32,
    seed: u64,
    drawn: u64,
}

impl Sampler {
    pub(crate) fn new(args: &SamplingArgs) -> Self {
        Self { temperature: args.temperature, top_p: args.top_p, seed: args.seed, drawn: 0 }
    }

    /// Token for logits `[V]`; ties of the greedy choice go to the smaller id.
    pub(crate) fn sample(&mut self, logits: &[f32]) -> u32 {
        let best = (0..logits.len()).reduce(|a, b| if logits[b] > logits[a] { b } else { a }).expect("a vocabulary is not empty");
        if self.temperature <= 0.0 {
            return best as u32;
        }
        let mut candidates: Vec<(f32, u32)> =
            logits.iter().enumerate().map(|(i, l)| (((l - logits[best]) / self.temperature).exp(), i as u32)).collect();
        candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let total: f32 = candidates.iter().map(|c| c.0).sum();
        let mut nucleus = 0.0;
        let kept = candidates.iter().take_while(|c| {
            let inside = nucleus < self.top_p * total;
            nucleus += if inside { c.0 } else { 0.0 };
            inside
        });
        let kept = kept.count().max(1);
        let sum: f32 = candidates[..kept].iter().map(|c| c.0).sum();
        let mut u = self.uniform() * sum;
        for &(p, id) in &candidates[..kept] {
            u -= p;
            if u < 0.0 {
                return id;
            }
        }
        candidates[kept - 1].1
    }

    fn uniform(&mut self) -> f32 {
        self.drawn += 1;
        (sluice_train::hash::mix(self.seed, self.drawn) >> 40) as f32 / (1u64 << 24) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_p: f32) -> Sampler {
        Sampler { temperature, top_p, seed: 3, drawn: 0 }
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(sampler(0.0, 1.0).sample(&[0.5, 2.0, 2.0]), 1);
    }

    #[test]
    fn sampling_follows_the_probabilities_and_top_p_cuts_the_tail() {
        let logits = [0.0, (3.0f32).ln(), -2.0];
        let mut all = sampler(1.0, 1.0);
        let counts = (0..4000).fold([0; 3], |mut c, _| {
            c[all.sample(&logits) as usize] += 1;
            c
        });
        let share = counts[1] as f32 / counts[0] as f32;
        assert!((share - 3.0).abs() < 0.4 && counts[2] > 50, "{counts:?}");
        let mut cut = sampler(1.0, 0.9);
        assert!((0..1000).all(|_| cut.sample(&logits) != 2));
    }
}
