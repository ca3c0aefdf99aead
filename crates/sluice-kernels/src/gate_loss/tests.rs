use sluice_testkit::{Rng, assert_close, check_gradient};

use super::*;

#[test]
fn gradient_equals_finite_differences() {
    let mut rng = Rng::new(3);
    let (scores, slopes) = (rng.normal_tensor([1, 40, 2]), Tensor::from_vec(vec![0.5, 2.0], [2]));
    // Without the ranking term every key may be probed; its threshold is a constant of the gradient by design.
    let terms = Terms { rank: 0.0, spread: 0.3, smooth: 0.2 };
    let (_, grad) = fwd(&scores, &[40], &slopes, &[None], &terms);
    check_gradient("spread and smooth", &scores, &grad, 1e-2, 1e-3, 80, |s| naive::loss(s, &slopes, None, &terms).0);
}

#[test]
fn descending_the_ranking_loss_raises_the_best_labels_and_lowers_the_worst() {
    let mut rng = Rng::new(3);
    let scores = rng.normal_tensor([1, 40, 2]);
    let positions: Vec<u32> = (2..30).step_by(3).collect();
    let labels = rng.normal_tensor([positions.len(), 2]);
    let rank = RankLabels { positions: &positions, labels: &labels, keep: 0.3 };
    let (_, grad) = fwd(&scores, &[40], &Tensor::zeros([1]), &[Some(rank)], &Terms { rank: 1.0, spread: 0.0, smooth: 0.0 });
    for head in 0..2 {
        let label = |i: usize| labels.f32()[i * 2 + head];
        let order = |a: &usize, b: &usize| label(*a).total_cmp(&label(*b));
        let (best, worst) = ((0..positions.len()).max_by(order).unwrap(), (0..positions.len()).min_by(order).unwrap());
        let of = |i: usize| grad.f32()[positions[i] as usize * 2 + head];
        assert!(of(best) < 0.0 && of(worst) > 0.0, "head {head}: {} and {}", of(best), of(worst));
    }
}

#[test]
fn a_slope_that_explains_the_scores_leaves_nothing_to_lose() {
    let scores = Tensor::from_vec((0..100).map(|j| 3.0 + 2.0 * j as f32 / 1024.0).collect(), [1, 100, 1]);
    let (loss, grad) = fwd(&scores, &[100], &Tensor::full(2.0, [1]), &[None], &Terms { rank: 0.0, spread: 1.0, smooth: 1.0 });
    assert!(loss.item() < 1e-12, "{}", loss.item());
    assert_close("gradient", grad.f32(), &[0.0; 100], 1e-7);
}

#[test]
#[should_panic(expected = "positions must ascend")]
fn a_position_twice_is_refused() {
    let rank = RankLabels { positions: &[1, 1], labels: &Tensor::zeros([2, 1]), keep: 0.5 };
    fwd(&Tensor::zeros([1, 4, 1]), &[4], &Tensor::zeros([1]), &[Some(rank)], &Terms { rank: 1.0, spread: 0.0, smooth: 0.0 });
}
