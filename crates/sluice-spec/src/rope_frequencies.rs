//! Inverse rotary frequencies of a model, scaling included.

use std::f32::consts::TAU;

use crate::{ModelConfig, RopeScaling};

/// `[D / 2]` radians per position. Computed in f64: at position 100,000 an f32 power already drifts.
pub fn inverse_frequencies(config: &ModelConfig) -> Vec<f32> {
    let d = config.head_dim;
    (0..d / 2)
        .map(|i| {
            let frequency = (config.rope_theta as f64).powf(-2.0 * i as f64 / d as f64) as f32;
            match config.rope_scaling {
                None => frequency,
                Some(RopeScaling::Linear { factor }) => frequency / factor,
                Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_seq_len }) => {
                    let original = original_max_seq_len as f32;
                    let wavelength = TAU / frequency;
                    if wavelength < original / high_freq_factor {
                        frequency
                    } else if wavelength > original / low_freq_factor {
                        frequency / factor
                    } else {
                        let keep = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        keep * frequency + (1.0 - keep) * frequency / factor
                    }
                }
            }
        })
        .collect()
}
