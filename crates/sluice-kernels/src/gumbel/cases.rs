//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{add_noise, naive};
use crate::selftest::Check;

pub(crate) fn run(check: &mut Check<'_>) {
    for (n, seed, stream, scale) in [(0, 1, 0, 1.0), (1, 2, 29, 0.5), (63, u64::MAX, 3, 1.0), (100_000, 0x9A5E_0123_4567_89AB, 7, 0.1)] {
        if !check.case("gumbel", format!("[{n}], scale {scale}")) {
            continue;
        }
        let scores = Rng::new(n as u64).normal_tensor([n]);
        let noisy = add_noise(&check.put(&scores), seed, stream, scale);
        check.compare("scores with noise", &noisy, &naive::add_noise(&scores, seed, stream, scale), 2e-6);
    }
}
