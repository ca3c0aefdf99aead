use sluice_tensor::Tensor;
use sluice_testkit::Rng;

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
