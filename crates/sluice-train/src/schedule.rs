//! Learning rate, budget and temperature as pure functions of the step, so that a resumed run needs no state for them.

use serde::{Deserialize, Serialize};

/// Linear warm-up, then a cosine from 1 to `floor`; multiplies a learning rate.
pub fn warm_up_cosine(step: u64, steps: u64, warm_up_share: f64, floor: f64) -> f32 {
    let (step, steps) = (step as f64, steps.max(1) as f64);
    let warm_up = (warm_up_share * steps).max(1.0);
    if step < warm_up {
        return ((step + 1.0) / warm_up).min(1.0) as f32;
    }
    let progress = ((step - warm_up) / (steps - warm_up).max(1.0)).min(1.0);
    (floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())) as f32
}

/// Total budget of a step: the compression `context / budget` grows linearly from 1 to its target over
/// `ramp_share` of the steps, so a gate first learns what it can do without when little is taken away.
pub fn ramped_budget(step: u64, steps: u64, ramp_share: f64, context: usize, target: usize) -> usize {
    let target_compression = context as f64 / target as f64;
    if target_compression <= 1.0 {
        return target;
    }
    let progress = (step as f64 / (ramp_share * steps as f64).max(1.0)).min(1.0);
    let compression = 1.0 + (target_compression - 1.0) * progress;
    ((context as f64 / compression).round() as usize).max(target)
}

/// Geometric interpolation between two positive values.
pub fn annealed(step: u64, steps: u64, from: f32, to: f32) -> f32 {
    let progress = step as f32 / (steps.saturating_sub(1)).max(1) as f32;
    from * (to / from).powf(progress.min(1.0))
}

/// Parts of the AdamW recipe that the stages share.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay of matrices; vectors are not decayed.
    pub weight_decay: f32,
    /// Share of the steps that warm up.
    pub warm_up: f64,
    /// Final learning rate as a share of the peak.
    pub lr_floor: f64,
    /// Limit of the global gradient norm.
    pub clip: f32,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.01, warm_up: 0.1, lr_floor: 0.0, clip: 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rate_rises_then_falls_to_the_floor() {
        let rates: Vec<f32> = (0..100).map(|s| warm_up_cosine(s, 100, 0.1, 0.1)).collect();
        assert!(rates[0] > 0.0 && rates[0] <= 0.1 + 1e-6);
        assert!(rates[..10].windows(2).all(|w| w[0] < w[1]) && rates[10..].windows(2).all(|w| w[0] >= w[1]));
        assert!((warm_up_cosine(100, 100, 0.1, 0.1) - 0.1).abs() < 1e-6);
    }

    #[test]
    fn budget_falls_from_the_context_to_the_target_and_stays() {
        assert_eq!(ramped_budget(0, 100, 0.6, 4096, 512), 4096);
        assert_eq!(ramped_budget(60, 100, 0.6, 4096, 512), 512);
        assert_eq!(ramped_budget(99, 100, 0.6, 4096, 512), 512);
        assert_eq!(ramped_budget(0, 100, 0.6, 256, 512), 512);
        let ramp: Vec<usize> = (0..60).map(|s| ramped_budget(s, 100, 0.6, 4096, 512)).collect();
        assert!(ramp.windows(2).all(|w| w[0] > w[1]));
    }
}
