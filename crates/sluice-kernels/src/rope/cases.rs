//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{RopeStyle, bwd, fwd, naive};
use crate::selftest::Check;

/// `[B, T, H, D]`.
const CASES: &[[usize; 4]] = &[[1, 1, 1, 2], [2, 63, 3, 10], [1, 100, 2, 64], [1, 1000, 1, 6], [3, 0, 2, 4]];

pub(crate) fn run(check: &mut Check<'_>) {
    for &shape in CASES {
        let in_order: Vec<u32> = (0..shape[1] as u32).collect();
        let far_and_scattered: Vec<u32> = in_order.iter().map(|t| 1_000_000 - 77 * t).collect();
        let freq: Vec<f32> = (0..shape[3] / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / shape[3] as f32)).collect();
        let x = Rng::new(1).normal_tensor(shape);
        for format in check.activations() {
            let (x, there) = check.put_as(&x, format);
            for style in [RopeStyle::Interleaved, RopeStyle::HalfSplit] {
                for (positions, where_) in [(&in_order, "in order"), (&far_and_scattered, "far out")] {
                    if !check.case("rope", format!("{shape:?} {style:?} {where_} {format:?}")) {
                        continue;
                    }
                    let allowed = 1e-6 + check.rounding(format);
                    check.compare("y", &fwd(&there, positions, &freq, style), &naive::rotate(&x, positions, &freq, style, 1.0), allowed);
                    check.compare("dx", &bwd(&there, positions, &freq, style), &naive::rotate(&x, positions, &freq, style, -1.0), allowed);
                }
            }
        }
    }
}
