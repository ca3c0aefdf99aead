//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{fwd_in_chunks, naive};
use crate::selftest::Check;

/// `(rows, M, F)`; the last one is several chunks, of which one is short.
const CASES: &[(usize, usize, usize)] = &[(0, 8, 16), (1, 3, 5), (37, 64, 256), (100, 63, 200), (600, 16, 100)];

/// Bytes of a chunk.
const CHUNK: usize = 1 << 16;

pub(crate) fn run(check: &mut Check<'_>) {
    for &(rows, m, f) in CASES {
        for format in check.activations() {
            if !check.case("gelu_mlp", format!("[{rows}, {m}] {format:?} by {f}")) {
                continue;
            }
            let mut rng = Rng::new(6);
            let x = rng.normal_tensor([rows, m]);
            let mut scaled = |shape: [usize; 2]| {
                let mut w = rng.normal_tensor(shape);
                w.f32_mut().iter_mut().for_each(|w| *w /= (shape[1] as f32).sqrt());
                w
            };
            let (up, down) = (scaled([f, m]), scaled([m, f]));
            let bias = rng.normal_tensor([f]);
            let (x, x_there) = check.put_as(&x, format);
            let [up_there, bias_there, down_there] = [&up, &bias, &down].map(|t| check.put(t));
            let y = fwd_in_chunks(&x_there, &up_there, &bias_there, &down_there, CHUNK);
            let want = naive::fwd(&x, &up, &bias, &down, |t| t.clone());
            let rounded = naive::fwd(&x, &up, &bias, &down, |t| check.factor(t));
            let allowed = check.allowed(2e-7 * f.max(16) as f64, &want, &rounded, 2.0);
            // The hidden activations are rounded before and after GELU where activations are narrow.
            check.compare("y", &y, &want, allowed + 2.0 * check.rounding(y.dtype()));
        }
    }
}
