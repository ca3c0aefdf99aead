//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{bwd, fwd, naive};
use crate::selftest::Check;

const SIZES: &[usize] = &[0, 1, 63, 100, 1000, 40_000];

pub(crate) fn run(check: &mut Check<'_>) {
    for &n in SIZES {
        for format in check.activations() {
            if !check.case("swiglu", format!("[{n}] {format:?}")) {
                continue;
            }
            let mut rng = Rng::new(1);
            let (mut gate, up, dy) = (rng.normal_tensor([n]), rng.normal_tensor([n]), rng.normal_tensor([n]));
            // Gates up to +-30: both saturated ends.
            gate.f32_mut().iter_mut().enumerate().for_each(|(i, g)| *g *= 1.0 + (i % 10) as f32);
            let [(gate, gate_there), (up, up_there), (dy, dy_there)] = [&gate, &up, &dy].map(|t| check.put_as(t, format));
            let allowed = 1e-6 + check.rounding(format);
            check.compare("y", &fwd(&gate_there, &up_there), &naive::fwd(gate.f32(), up.f32()), allowed);
            let (dgate, dup) = bwd(&dy_there, &gate_there, &up_there);
            let (want_dgate, want_dup) = naive::bwd(dy.f32(), gate.f32(), up.f32());
            check.compare("dgate", &dgate, &want_dgate, allowed);
            check.compare("dup", &dup, &want_dup, allowed);
        }
    }
}
