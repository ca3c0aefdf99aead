//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{fwd, naive};
use crate::selftest::Check;

pub(crate) fn run(check: &mut Check<'_>) {
    for (lens, t, m) in [(vec![1], 1, 1), (vec![63, 0, 7], 63, 100), (vec![128, 127], 128, 384), (vec![], 3, 4)] {
        for format in check.activations() {
            if !check.case("mean_pool", format!("{lens:?} of {t} by {m} {format:?}")) {
                continue;
            }
            let mut x = Rng::new(5).normal_tensor([lens.len(), t, m]);
            for (b, &len) in lens.iter().enumerate() {
                x.f32_mut()[(b * t + len) * m..(b + 1) * t * m].fill(f32::NAN);
            }
            let (x, x_there) = check.put_as(&x, format);
            check.compare("y", &fwd(&x_there, &lens), &naive::fwd(&x, &lens), 2e-6);
        }
    }
}
