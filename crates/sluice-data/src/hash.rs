//! Seeded numbers for sampling: a hash of a few words starts a SplitMix64 stream.
//! Stateless on purpose: what is drawn for (seed, step, row) depends on nothing else, so resuming a run and changing
//! the number of ranks leave the data as they were.

/// A stream of random bits.
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    /// The stream of these words; another order of the same words is another stream.
    pub(crate) fn of(words: &[u64]) -> Self {
        Self(words.iter().fold(0x005E_EDED_5EED, |state, &word| mix(state.wrapping_add(0x9E37_79B9_7F4A_7C15) ^ mix(word))))
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// Uniform in [0, 1).
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..n. The bias of the multiplication is below n / 2^64.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "drawing from nothing");
        ((self.bits() as u128 * n as u128) >> 64) as usize
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// SplitMix64's finaliser: a bijection in which every input bit moves every output bit.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_words_give_unrelated_streams() {
        let firsts: std::collections::HashSet<u64> =
            (0..100).flat_map(|step| (0..100).map(move |row| Rng::of(&[7, step, row]).bits())).collect();
        assert_eq!(firsts.len(), 10_000);
        let mean = (0..10_000).map(|step| Rng::of(&[7, step]).uniform()).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert_ne!(Rng::of(&[1, 2]).bits(), Rng::of(&[2, 1]).bits());
    }
}
