//! The case list of [`selftest`](crate::selftest). Every case takes the `lse` of dense attention, so that weights are at most 1.

use sluice_tensor::{DType, Tensor};
use sluice_testkit::Rng;

use super::{block_mass, future_mass, naive};
use crate::dense_attention;
use crate::selftest::Check;

/// `(B, T, H, G, D)`.
const CASES: [(usize, usize, usize, usize, usize); 6] =
    [(1, 1, 1, 1, 2), (2, 63, 4, 2, 8), (1, 100, 3, 3, 16), (3, 150, 6, 2, 4), (1, 300, 2, 1, 100), (1, 400, 3, 1, 64)];

/// `(window, horizon)`.
const SPANS: [(usize, usize); 6] = [(0, 1 << 40), (1, 1), (8, 20), (16, 1000), (64, 129), (3, 0)];

pub(crate) fn run(check: &mut Check<'_>) {
    for (batch, t, n_heads, n_kv_heads, d) in CASES {
        let shape = format!("[{batch}, {t}, {n_heads} of {n_kv_heads}, {d}]");
        let mut rng = Rng::new((t * 31 + n_heads) as u64);
        let (q, k) = (rng.normal_tensor([batch, t, n_heads, d]), rng.normal_tensor([batch, t, n_kv_heads, d]));
        // Sequences after the first are shorter.
        let lens: Vec<usize> = (0..batch).map(|b| t - b * t / 3).collect();
        let (_, lse) = dense_attention::fwd(&q, &k, &k, 0, &lens);
        let key_weight = rng.normal_tensor([batch, t, n_heads]);
        let query_weight = (0..batch * t).map(|i| if i % 7 == 0 { 0.0 } else { rng.uniform() }).collect();
        let query_weight = Tensor::from_vec(query_weight, [batch, t]);
        let [q_there, k_there, lse_there, kw_there, qw_there] = [&q, &k, &lse, &key_weight, &query_weight].map(|t| check.put(t));
        // Unsorted, with repetitions, and positions in the padding too.
        let some: Vec<Vec<u32>> = (0..batch).map(|_| (0..rng.below(90)).map(|_| rng.below(t) as u32).collect()).collect();
        let all: Vec<Vec<u32>> = vec![(0..t as u32).collect(); batch];
        for (window, horizon) in SPANS {
            for (positions, power, weighted) in [(&some, 1.0, false), (&all, 1.0, true), (&all, 2.0, true)] {
                if !check.case("attention_mass", format!("{shape}, w {window}, horizon {horizon}, power {power}")) {
                    continue;
                }
                let (there, here) = if weighted {
                    ((Some(&kw_there), Some(&qw_there)), (Some(&key_weight), Some(&query_weight)))
                } else {
                    ((None, None), (None, None))
                };
                let got = future_mass(&q_there, &k_there, &lse_there, there.0, there.1, positions, window, horizon, power, &lens);
                let want = naive::future_mass(&q, &k, &lse, here.0, here.1, positions, window, horizon, power, &lens);
                for (b, (got, want)) in got.iter().zip(&want).enumerate() {
                    check.compare("future mass", got, want, 2e-5);
                    check.require("a row per position", got.shape() == [positions[b].len(), n_kv_heads]);
                }
            }
        }
        for (route_every, power) in [(1, 1.0), (7, 2.0), (64, 1.0), (64, 2.0), (200, 1.0), (1000, 1.0)] {
            if !check.case("attention_mass", format!("{shape}, blocks of {route_every}, power {power}")) {
                continue;
            }
            let got = block_mass(&q_there, &k_there, &lse_there, route_every, power, &lens);
            check.compare("block mass", &got, &naive::block_mass(&q, &k, &lse, route_every, power, &lens), 2e-5);
            check.require("a row per block", got.shape() == [batch, t.div_ceil(route_every), n_kv_heads, t]);
        }
    }
    if check.case("attention_mass", "bf16 queries and keys") {
        let mut rng = Rng::new(8);
        let [q, k] = [4, 2].map(|heads| rng.normal_tensor([1, 90, heads, 16]).to_dtype(DType::Bf16));
        let [wide_q, wide_k] = [&q, &k].map(|x| x.to_dtype(DType::F32));
        let (_, lse) = dense_attention::fwd(&wide_q, &wide_k, &wide_k, 0, &[90]);
        let positions = [(0..90).collect()];
        let (q, k, lse_there) = (check.put(&q), check.put(&k), check.put(&lse));
        let got = future_mass(&q, &k, &lse_there, None, None, &positions, 8, 32, 2.0, &[90]);
        check.compare(
            "future mass",
            &got[0],
            &naive::future_mass(&wide_q, &wide_k, &lse, None, None, &positions, 8, 32, 2.0, &[90])[0],
            2e-5,
        );
        let got = block_mass(&q, &k, &lse_there, 16, 1.0, &[90]);
        check.compare("block mass", &got, &naive::block_mass(&wide_q, &wide_k, &lse, 16, 1.0, &[90]), 2e-5);
    }
    if !check.case("attention_mass", "no positions") {
        return;
    }
    let x = check.put(&Tensor::zeros([1, 4, 1, 2]));
    let mass = future_mass(&x, &x, &check.put(&Tensor::zeros([1, 4, 1])), None, None, &[vec![]], 4, 16, 1.0, &[4]);
    check.require("no rows", mass[0].shape() == [0, 1]);
}
