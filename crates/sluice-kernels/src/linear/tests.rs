use half::bf16;
use sluice_tensor::{DType, Tensor};
use sluice_testkit::{Rng, assert_close, check_gradient, probe_weights};

use super::*;
use crate::row_chunks::on_one_and_three_threads;

#[test]
fn no_inputs_leave_the_bias_and_no_outputs_leave_a_zero_gradient() {
    let bias = Tensor::from_vec(vec![1.0, -2.0], [2]);
    let y = fwd(&Tensor::zeros([3, 0]), &Tensor::zeros([2, 0]), Some(&bias));
    assert_eq!(y.f32(), [1.0, -2.0, 1.0, -2.0, 1.0, -2.0]);
    assert_eq!(bwd_input(&Tensor::zeros([3, 0]), &Tensor::zeros([0, 2])).f32(), [0.0; 6]);
}

#[test]
fn gradients_match_finite_differences() {
    let mut rng = Rng::new(3);
    let (x, w, bias) = (rng.normal_tensor([3, 21]), rng.normal_tensor([17, 21]), rng.normal_tensor([17]));
    let dy = Tensor::from_vec(probe_weights(51, 1), [3, 17]);
    let loss = |x: &Tensor, w: &Tensor, b: &Tensor| naive::fwd(x, w, Some(b)).iter().zip(dy.f32()).map(|(y, &d)| y * d as f64).sum();
    check_gradient("dx", &x, &bwd_input(&dy, &w), 1e-2, 1e-4, 20, |x| loss(x, &w, &bias));
    check_gradient("dw", &w, &bwd_weight(&dy, &x), 1e-2, 1e-4, 20, |w| loss(&x, w, &bias));
    check_gradient("db", &bias, &bwd_bias(&dy), 1e-2, 1e-4, 20, |b| loss(&x, &w, b));
}

#[test]
fn poisoned_outputs_are_overwritten() {
    let mut rng = Rng::new(5);
    for dtype in [DType::F32, DType::Bf16] {
        let (x, w) = (rng.normal_tensor([5, 300]), rng.normal_tensor([2000, 300]).to_dtype(dtype));
        let mut y = vec![f32::NAN; 5 * 2000];
        project(x.f32(), 5, &w, &mut y);
        assert_eq!(y, fwd(&x, &w, None).f32());
        let mut dx = vec![f32::NAN; 5 * 300];
        project_back(&y, 5, &w, &mut dx);
        assert!(dx.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn bf16_weights_equal_their_f32_values() {
    let mut rng = Rng::new(6);
    let (x, w) = (rng.normal_tensor([9, 200]), rng.normal_tensor([1500, 200]).to_dtype(DType::Bf16));
    let widened = Tensor::from_vec(w.bf16().iter().map(|w: &bf16| w.to_f32()).collect(), [1500, 200]);
    assert_close("y", fwd(&x, &w, None).f32(), fwd(&x, &widened, None).f32(), 1e-5);
}

#[test]
fn thread_count_does_not_change_a_bit() {
    let mut rng = Rng::new(8);
    let (x, w, dy) = (rng.normal_tensor([300, 576]), rng.normal_tensor([500, 576]), rng.normal_tensor([300, 500]));
    let w16 = w.to_dtype(DType::Bf16);
    let (one, three) = on_one_and_three_threads(|| {
        [fwd(&x, &w, None), fwd(&x, &w16, None), bwd_input(&dy, &w), bwd_input(&dy, &w16), bwd_weight(&dy, &x), bwd_bias(&dy)]
    });
    for (i, (a, b)) in one.iter().zip(&three).enumerate() {
        assert_eq!(a.f32(), b.f32(), "product {i}");
    }
}

#[test]
#[should_panic(expected = "linear of x [2, 3] and w [4, 5]")]
fn wrong_width_is_refused() {
    fwd(&Tensor::zeros([2, 3]), &Tensor::zeros([4, 5]), None);
}

#[test]
fn a_row_among_few_has_the_bits_of_the_row_alone() {
    let mut rng = Rng::new(9);
    for dtype in [DType::F32, DType::Bf16] {
        let (x, w) = (rng.normal_tensor([7, 333]), rng.normal_tensor([250, 333]).to_dtype(dtype));
        let together = fwd(&x, &w, None);
        for i in 0..7 {
            let alone = fwd(&Tensor::from_vec(x.f32()[i * 333..(i + 1) * 333].to_vec(), [1, 333]), &w, None);
            assert_eq!(alone.f32(), &together.f32()[i * 250..(i + 1) * 250], "row {i} with {dtype:?}");
        }
    }
}
