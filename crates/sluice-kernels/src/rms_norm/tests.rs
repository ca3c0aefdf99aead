use sluice_testkit::{Rng, assert_close, check_gradient, probe_weights};

use super::*;
use crate::row_chunks::on_one_and_three_threads;

const EPS: f32 = 1e-5;
/// `(rows, width)`.
const CASES: &[(usize, usize)] = &[(0, 63), (1, 1), (63, 100), (100, 63), (3, 1000), (1000, 33), (4, 0)];

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn check(rows: usize, m: usize, with_weight: bool) {
    let what = format!("[{rows}, {m}], weight: {with_weight}");
    let mut rng = Rng::new(1);
    let (x, w, dy) = (rng.normal_tensor([rows, m]), rng.normal_tensor([m]), rng.normal_tensor([rows, m]));
    let weight = with_weight.then_some(&w);
    let (y, inv_rms) = fwd(&x, weight, EPS);
    let (dx, dw) = bwd(&dy, &x, weight, &inv_rms);
    let (want_y, want_inv) = naive::fwd(&x, weight, EPS);
    let (want_dx, want_dw) = naive::bwd(&dy, &x, weight, EPS);
    assert_close(&what, y.f32(), &to_f32(&want_y), 2e-6);
    if with_weight {
        let mut one = vec![f32::NAN; m];
        for (x, y) in x.f32().chunks_exact(m.max(1)).zip(y.f32().chunks_exact(m.max(1))) {
            row(x, w.f32(), EPS, &mut one);
            assert_eq!(one, y, "{what}");
            one.copy_from_slice(x);
            row_in_place(&mut one, w.f32(), EPS);
            assert_eq!(one, y, "{what}");
        }
    }
    assert_close(&what, inv_rms.f32(), &to_f32(&want_inv), 2e-6);
    assert_close(&what, dx.f32(), &to_f32(&want_dx), 1e-5);
    assert_eq!(dw.is_some(), with_weight);
    if let Some(dw) = dw {
        assert_close(&what, dw.f32(), &to_f32(&want_dw), 2e-5);
    }
}

#[test]
fn agrees_with_the_naive_twin() {
    for &(rows, m) in CASES {
        check(rows, m, false);
        check(rows, m, true);
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
