use sluice_tensor::Tensor;
use sluice_testkit::{Rng, assert_close};

use super::*;
use crate::dense_attention;

struct Case {
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    lens: Vec<usize>,
}

/// Random queries and keys with the `lse` of dense attention; sequences after the first are shorter.
fn case(batch: usize, t: usize, n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Case {
    let mut rng = Rng::new((t * 31 + n_heads) as u64);
    let q = rng.normal_tensor([batch, t, n_heads, head_dim]);
    let k = rng.normal_tensor([batch, t, n_kv_heads, head_dim]);
    let lens: Vec<usize> = (0..batch).map(|b| t - b * t / 3).collect();
    let (_, lse) = dense_attention::fwd(&q, &k, &k, 0, &lens);
    Case { q, k, lse, lens }
}

const CASES: [(usize, usize, usize, usize, usize); 5] =
    [(1, 1, 1, 1, 2), (2, 63, 4, 2, 8), (1, 100, 3, 3, 16), (3, 150, 6, 2, 4), (1, 400, 2, 1, 64)];

fn f32s(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&v| v as f32).collect()
}

#[track_caller]
fn check_future(c: &Case, positions: &[Vec<u32>], window: usize, horizon: usize, power: f32, weighted: bool) {
    let [batch, t, n_heads, _] = c.q.dims();
    let mut rng = Rng::new(3);
    let key_weight = weighted.then(|| rng.normal_tensor([batch, t, n_heads]));
    let query_weight: Option<Vec<f32>> = weighted.then(|| (0..batch * t).map(|i| if i % 7 == 0 { 0.0 } else { rng.uniform() }).collect());
    let got = future_mass(&c.q, &c.k, &c.lse, key_weight.as_ref(), query_weight.as_deref(), positions, window, horizon, power, &c.lens);
    let want =
        naive::future_mass(&c.q, &c.k, &c.lse, key_weight.as_ref(), query_weight.as_deref(), positions, window, horizon, power, &c.lens);
    for b in 0..batch {
        assert_eq!(got[b].shape(), [positions[b].len(), c.k.dims::<4>()[2]]);
        assert_close(
            &format!("window {window}, horizon {horizon}, power {power}, sequence {b} of {:?}", c.q.shape()),
            got[b].f32(),
            &f32s(&want[b]),
            2e-5,
        );
    }
}

#[test]
fn future_mass_equals_the_sum_over_single_weights() {
    for (batch, t, h, g, d) in CASES {
        let c = case(batch, t, h, g, d);
        let mut rng = Rng::new(9);
        // Unsorted, with repetitions, and positions in the padding too.
        let some: Vec<Vec<u32>> = (0..batch).map(|_| (0..rng.below(90)).map(|_| rng.below(t) as u32).collect()).collect();
        let all: Vec<Vec<u32>> = vec![(0..t as u32).collect(); batch];
        for (window, horizon) in [(0, t), (1, 1), (8, 20), (16, 1000), (64, 129), (3, 0)] {
            check_future(&c, &some, window, horizon, 1.0, false);
            check_future(&c, &all, window, horizon, 1.0, true);
            check_future(&c, &all, window, horizon, 2.0, true);
        }
        check_future(&c, &vec![vec![]; batch], 4, 16, 1.0, false);
    }
}

#[test]
fn all_of_the_future_is_all_of_the_attention() {
    let c = case(1, 300, 4, 2, 16);
    let mass = future_mass(&c.q, &c.k, &c.lse, None, None, &[(0..300).collect()], 0, 300, 1.0, &c.lens);
    for g in 0..2 {
        let total: f64 = mass[0].f32().iter().skip(g).step_by(2).map(|&m| m as f64).sum();
        assert!((total - 600.0).abs() < 0.01, "{total}, expected one per query and head");
    }
}

#[test]
fn block_mass_equals_the_sum_over_single_weights() {
    for (batch, t, h, g, d) in CASES {
        let c = case(batch, t, h, g, d);
        for (route_every, power) in [(1, 1.0), (7, 2.0), (64, 1.0), (64, 2.0), (200, 1.0), (1000, 1.0)] {
            let got = block_mass(&c.q, &c.k, &c.lse, route_every, power, &c.lens);
            assert_eq!(got.shape(), [batch, t.div_ceil(route_every), g, t]);
            let want = naive::block_mass(&c.q, &c.k, &c.lse, route_every, power, &c.lens);
            assert_close(&format!("blocks of {route_every}, power {power}, {:?}", c.q.shape()), got.f32(), &f32s(&want), 2e-5);
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let c = case(2, 257, 4, 2, 16);
    let positions: Vec<Vec<u32>> = vec![(0..257).step_by(3).collect(); 2];
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let future = future_mass(&c.q, &c.k, &c.lse, None, None, &positions, 8, 64, 1.0, &c.lens);
            (future[0].f32().to_vec(), future[1].f32().to_vec(), block_mass(&c.q, &c.k, &c.lse, 16, 1.0, &c.lens).f32().to_vec())
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
#[should_panic(expected = "position Some(10) is outside")]
fn a_position_outside_the_keys_is_refused() {
    let c = case(1, 10, 1, 1, 2);
    future_mass(&c.q, &c.k, &c.lse, None, None, &[vec![3, 10]], 1, 4, 1.0, &c.lens);
}
