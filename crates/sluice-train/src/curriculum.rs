//! Which tokens count in a step, and how much: the article's difficulty-aware sampler (row B4), annealed.
//!
//! Confident tokens always count. Of the others a share counts that grows from 0.3 to 1 over the first half of the
//! steps, so that easy tokens lead and none is left out for good. Tokens that far context made likelier count more:
//! only they tell the gate anything.

use crate::hash::uniform;

/// How hard one token is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Difficulty {
    /// Largest probability of the teacher's prediction.
    pub(crate) max_prob: f32,
    /// Nats that context beyond the window saves on this token.
    pub(crate) long_range_gain: f32,
}

/// Above this probability a prediction counts as confident.
const CONFIDENT: f32 = 0.7;

/// Share of the other tokens that counts at the first step.
const FIRST_SHARE: f32 = 0.3;

/// Nats from which a token counts as needing far context, and its weight then.
const LONG_RANGE: (f32, f32) = (2.0, 5.0);

/// Weight of a token in step `step` of `steps`; `hash` decides for tokens that count by chance.
pub(crate) fn weight(token: &Difficulty, step: u64, steps: u64, hash: u64) -> f32 {
    let progress = step as f32 / (0.5 * steps as f32).max(1.0);
    let share = FIRST_SHARE + (1.0 - FIRST_SHARE) * progress.min(1.0);
    if token.max_prob <= CONFIDENT && uniform(hash) >= share {
        return 0.0;
    }
    if token.long_range_gain > LONG_RANGE.0 { LONG_RANGE.1 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::mix;

    fn kept(max_prob: f32, step: u64) -> f32 {
        let token = Difficulty { max_prob, long_range_gain: 0.0 };
        (0..10_000).map(|i| weight(&token, step, 100, mix(9, i))).sum::<f32>() / 10_000.0
    }

    #[test]
    fn confident_tokens_always_count_and_the_rest_join_over_half_the_steps() {
        assert_eq!(kept(0.9, 0), 1.0);
        assert!((kept(0.2, 0) - 0.3).abs() < 0.02);
        assert!((kept(0.2, 25) - 0.65).abs() < 0.02);
        assert_eq!(kept(0.2, 50), 1.0);
        assert_eq!(kept(0.2, 99), 1.0);
    }

    #[test]
    fn tokens_that_need_far_context_weigh_five_times_as_much() {
        let token = Difficulty { max_prob: 0.9, long_range_gain: 2.5 };
        assert_eq!(weight(&token, 0, 100, 0), 5.0);
    }
}
