//! The case list of [`selftest`](crate::selftest).

use sluice_testkit::Rng;

use super::{kept_share, naive};
use crate::selftest::Check;
use crate::top_k_routing::{Budget, route, route_in_place};

/// `(B, T, G, window, top_k, route_every)`.
const CASES: &[(usize, usize, usize, usize, usize, usize)] = &[
    (1, 1, 1, 4, 4, 4),
    (2, 100, 3, 8, 16, 8),
    (1, 63, 2, 100, 4, 8),
    (1, 700, 1, 30, 0, 64),
    (1, 900, 2, 1, 33, 1),
    (2, 300, 2, 16, 400, 50),
];

pub(crate) fn run(check: &mut Check<'_>) {
    for &(b, t, g, window, top_k, route_every) in CASES {
        if !check.case("kept_mass", format!("[{b}, {t}, {g}], w {window}, k {top_k}, r {route_every}")) {
            continue;
        }
        let mut rng = Rng::new(t as u64);
        let mut mass = rng.normal_tensor([b, t.div_ceil(route_every), g, t]);
        mass.f32_mut().iter_mut().for_each(|m| *m = *m * *m);
        let scores = rng.normal_tensor([b, t, g]);
        let (lens, budget) = (vec![t; b], Budget { window, top_k, route_every, n_sink: 2.min(top_k) });
        let want = naive::kept_share(&mass, &route(&scores, &lens, &budget));
        let (mass_there, scores_there) = (check.put(&mass), check.put(&scores));
        check.compare("share", &kept_share(&mass_there, &route_in_place(&scores_there, &lens, &budget)), &want, 2e-6);
        check.compare("share of a routing from the host", &kept_share(&mass_there, &route(&scores, &lens, &budget).into()), &want, 2e-6);
    }
}
