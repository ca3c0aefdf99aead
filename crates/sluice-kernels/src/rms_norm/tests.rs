use sluice_testkit::{Rng, assert_close, check_gradient, probe_weights};

use super::*;
use crate::row_chunks::on_one_and_three_threads;

const EPS: f32 = 1e-5;
#[test]
fn a_row_gets_the_bits_of_the_tensor() {
    for (rows, m) in [(1, 1), (63, 100), (3, 1000), (1000, 33)] {
        let mut rng = Rng::new(1);
        let (x, w) = (rng.normal_tensor([rows, m]), rng.normal_tensor([m]));
        let (y, _) = fwd(&x, Some(&w), EPS);
        let mut one = vec![f32::NAN; m];
        for (x, y) in x.f32().chunks_exact(m).zip(y.f32().chunks_exact(m)) {
            row(x, w.f32(), EPS, &mut one);
            assert_eq!(one, y, "[{rows}, {m}]");
            one.copy_from_slice(x);
            row_in_place(&mut one, w.f32(), EPS);
            assert_eq!(one, y, "[{rows}, {m}]");
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let mut rng = Rng::new(2);
    let (x, w) = (rng.normal_tensor([2, 3, 37]), rng.normal_tensor([37]));
    let dy = Tensor::from_vec(probe_weights(x.len(), 3), x.shape());
    let (_, inv_rms) = fwd(&x, Some(&w), EPS);
    let (dx, dw) = bwd(&dy, &x, Some(&w), &inv_rms);
    let loss = |x: &Tensor, w: &Tensor| naive::fwd(x, Some(w), EPS).0.iter().zip(dy.f32()).map(|(y, &d)| y * d as f64).sum();
    check_gradient("dx", &x, &dx, 1e-3, 1e-4, 40, |x| loss(x, &w));
    check_gradient("dw", &w, &dw.unwrap(), 1e-2, 1e-4, 40, |w| loss(&x, w));
}

#[test]
fn a_row_of_zeros_stays_zero_with_finite_gradients() {
    let x = Tensor::zeros([2, 8]);
    let (y, inv_rms) = fwd(&x, None, EPS);
    assert_eq!(y.f32(), [0.0; 16]);
    let (dx, _) = bwd(&Tensor::full(1.0, [2, 8]), &x, None, &inv_rms);
    assert_close("dx", dx.f32(), &[1.0 / EPS.sqrt(); 16], 1e-5);
}

#[test]
fn thread_count_and_number_of_rows_do_not_change_a_bit() {
    let mut rng = Rng::new(4);
    let (x, w, dy) = (rng.normal_tensor([700, 100]), rng.normal_tensor([100]), rng.normal_tensor([700, 100]));
    let (one, three) = on_one_and_three_threads(|| {
        let (y, inv_rms) = fwd(&x, Some(&w), EPS);
        let (dx, dw) = bwd(&dy, &x, Some(&w), &inv_rms);
        [y, dx, dw.unwrap()]
    });
    one.iter().zip(&three).for_each(|(a, b)| assert_eq!(a.f32(), b.f32()));
    let row = Tensor::from_vec(x.f32()[69_900..].to_vec(), [1, 100]);
    assert_eq!(fwd(&row, Some(&w), EPS).0.f32(), &one[0].f32()[69_900..]);
}

#[test]
#[should_panic(expected = "rms_norm of x [2, 3] with weight [4]")]
fn wrong_weight_is_refused() {
    fwd(&Tensor::zeros([2, 3]), Some(&Tensor::zeros([4])), EPS);
}
