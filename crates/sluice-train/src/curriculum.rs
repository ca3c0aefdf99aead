//! Which tokens count in a step, and how much: the article's difficulty-aware sampler (row B4), annealed.
//!
//! Confident tokens always count. Of the others a share counts that grows from 0.3 to 1 over the first half of the
//! steps, so that easy tokens lead and none is left out for good. Tokens that far context made likelier count more:
//! only they tell the gate anything.

use sluice_kernels::token_weights::Terms;

/// Above this probability a prediction counts as confident.
const CONFIDENT: f32 = 0.7;

/// Share of the other tokens that counts at the first step.
const FIRST_SHARE: f32 = 0.3;

/// Nats from which a token counts as needing far context, and its weight then.
const LONG_RANGE: (f32, f32) = (2.0, 5.0);

/// Which tokens count in step `step` of `steps`.
pub(crate) fn terms(step: u64, steps: u64) -> Terms {
    let progress = step as f32 / (0.5 * steps as f32).max(1.0);
    let share = FIRST_SHARE + (1.0 - FIRST_SHARE) * progress.min(1.0);
    let (far_gain, far_weight) = LONG_RANGE;
    Terms { sure: CONFIDENT, share, far_gain, far_weight }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_uncertain_tokens_grows_over_half_the_steps() {
        let shares = [0, 25, 50, 99].map(|step| terms(step, 100).share);
        assert_eq!(shares, [0.3, 0.65, 1.0, 1.0]);
        assert_eq!(terms(0, 1).share, 0.3);
    }
}
