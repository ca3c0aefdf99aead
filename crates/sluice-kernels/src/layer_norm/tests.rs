use sluice_testkit::{Rng, assert_close, check_gradient, probe_weights};

use super::*;
use crate::row_chunks::on_one_and_three_threads;

const EPS: f32 = 1e-5;

#[test]
fn a_large_mean_costs_no_digits_of_the_variance() {
    let x = Tensor::from_vec((0..64).map(|i| 1000.0 + (i % 2) as f32).collect(), [1, 64]);
    let (y, ..) = fwd(&x, &Tensor::full(1.0, [64]), &Tensor::zeros([64]), 0.0);
    let want: Vec<f32> = (0..64).map(|i| if i % 2 == 0 { -1.0 } else { 1.0 }).collect();
    assert_close("y", y.f32(), &want, 1e-5);
}

#[test]
fn gradients_match_finite_differences() {
    let mut rng = Rng::new(2);
    let (x, w, b) = (rng.normal_tensor([2, 3, 37]), rng.normal_tensor([37]), rng.normal_tensor([37]));
    let dy = Tensor::from_vec(probe_weights(x.len(), 3), x.shape());
    let (_, mean, inv_std) = fwd(&x, &w, &b, EPS);
    let (dx, dw, db) = bwd(&dy, &x, &w, &mean, &inv_std);
    let loss = |x: &Tensor, w: &Tensor, b: &Tensor| naive::fwd(x, w, b, EPS).0.iter().zip(dy.f32()).map(|(y, &d)| y * d as f64).sum();
    check_gradient("dx", &x, &dx, 1e-3, 1e-4, 40, |x| loss(x, &w, &b));
    check_gradient("dw", &w, &dw, 1e-2, 1e-4, 40, |w| loss(&x, w, &b));
    check_gradient("db", &b, &db, 1e-2, 1e-4, 40, |b| loss(&x, &w, b));
}

#[test]
fn thread_count_does_not_change_a_bit() {
    let mut rng = Rng::new(4);
    let (x, w, dy) = (rng.normal_tensor([700, 100]), rng.normal_tensor([100]), rng.normal_tensor([700, 100]));
    let (one, three) = on_one_and_three_threads(|| {
        let (y, mean, inv_std) = fwd(&x, &w, &w, EPS);
        let (dx, dw, db) = bwd(&dy, &x, &w, &mean, &inv_std);
        [y, dx, dw, db]
    });
    one.iter().zip(&three).for_each(|(a, b)| assert_eq!(a.f32(), b.f32()));
}
