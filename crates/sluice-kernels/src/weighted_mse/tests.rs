use sluice_testkit::{Rng, assert_close, check_gradient};

use super::*;
use crate::row_chunks::on_one_and_three_threads;

fn of(weights: &[f32]) -> Tensor {
    Tensor::from_vec(weights.to_vec(), [weights.len()])
}

#[test]
fn gradient_agrees_with_finite_differences() {
    let mut rng = Rng::new(2);
    let (a, b) = (rng.normal_tensor([4, 17]), rng.normal_tensor([4, 17]));
    let weights = [1.0, 0.5, 0.0, 2.0];
    let (_, factors) = fwd(&a, &b, &of(&weights));
    let da = bwd(&Tensor::scalar(1.0), &a, &b, &factors);
    check_gradient("da", &a, &da, 1e-3, 1e-4, 68, |a| naive::loss(a, &b, &weights).0);
}

#[test]
fn error_is_relative_to_each_row() {
    let (a, b) = (Tensor::from_vec(vec![2.0, 0.0, 30.0, 0.0], [2, 2]), Tensor::from_vec(vec![1.0, 0.0, 10.0, 0.0], [2, 2]));
    let (loss, factors) = fwd(&a, &b, &of(&[1.0, 10.0]));
    assert_close("loss", loss.f32(), &[1.0 + 10.0 * 4.0], 1e-6);
    assert_close("factors", factors.f32(), &[2.0, 0.2], 1e-6);
}

#[test]
fn thread_count_does_not_change_a_bit() {
    let mut rng = Rng::new(4);
    let (a, b) = (rng.normal_tensor([300, 65]), rng.normal_tensor([300, 65]));
    let weights: Vec<f32> = (0..300).map(|_| rng.uniform()).collect();
    let (one, three) = on_one_and_three_threads(|| {
        let (loss, factors) = fwd(&a, &b, &of(&weights));
        (loss.item(), bwd(&loss, &a, &b, &factors))
    });
    assert_eq!((one.0, one.1.f32()), (three.0, three.1.f32()));
}

#[test]
#[should_panic(expected = "weighted_mse of [2, 3] and [3, 2] with 2 weights")]
fn another_shape_is_refused() {
    fwd(&Tensor::zeros([2, 3]), &Tensor::zeros([3, 2]), &of(&[1.0, 1.0]));
}
