//! The case list of [`selftest`](crate::selftest). The twin is the sum itself.

use sluice_testkit::Rng;

use super::{assign, fwd};
use crate::selftest::Check;

const SIZES: &[usize] = &[0, 1, 63, 100, 1000, 50_000];

pub(crate) fn run(check: &mut Check<'_>) {
    for &n in SIZES {
        let (a, b) = (Rng::new(1).normal_tensor([n]), Rng::new(2).normal_tensor([n]));
        if check.case("add", format!("[{n}]")) {
            let want: Vec<f64> = a.f32().iter().zip(b.f32()).map(|(a, b)| (a + b) as f64).collect();
            let (mut a_there, b_there) = (check.put(&a), check.put(&b));
            check.compare("a + b", &fwd(&a_there, &b_there), &want, 0.0);
            let kept = a_there.clone();
            assign(&mut a_there, &b_there);
            check.compare("a += b", &a_there, &want, 0.0);
            let old: Vec<f64> = a.f32().iter().map(|&a| a as f64).collect();
            check.compare("a clone of a stays", &kept, &old, 0.0);
        }
        for format in check.activations() {
            if !check.case("add", format!("[{n}], {format:?} added")) {
                continue;
            }
            let (b, b_there) = check.put_as(&b, format);
            let want: Vec<f64> = a.f32().iter().zip(b.f32()).map(|(a, b)| (a + b) as f64).collect();
            check.compare("a + b", &fwd(&check.put(&a), &b_there), &want, 0.0);
            let mut sum = check.put(&a);
            assign(&mut sum, &b_there);
            check.compare("a += b", &sum, &want, 0.0);
            let (a, mut sum) = check.put_as(&a, format);
            assign(&mut sum, &b_there);
            let want: Vec<f64> = a.f32().iter().zip(b.f32()).map(|(a, b)| (a + b) as f64).collect();
            check.compare("a += b in the format of both", &sum, &want, check.rounding(format));
        }
    }
}
