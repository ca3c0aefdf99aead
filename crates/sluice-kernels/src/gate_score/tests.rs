use sluice_tensor::Tensor;
use sluice_testkit::{Rng, check_gradient, probe_weights};

use super::*;

const EPS: f32 = 1e-5;

struct Case {
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    recency: Tensor,
    positions: Vec<u32>,
}

fn case(seed: u64, b: usize, t: usize, m: usize, gs: usize) -> Case {
    let mut rng = Rng::new(seed);
    Case {
        x: rng.normal_tensor([b, t, m]),
        weight: rng.normal_tensor([gs, m]),
        bias: rng.normal_tensor([gs]),
        recency: rng.normal_tensor([gs]),
        positions: (0..t as u32).map(|i| i * 37 + 5).collect(),
    }
}

fn score(c: &Case) -> Tensor {
    fwd(&c.x, &c.weight, &c.bias, &c.recency, &c.positions, EPS)
}

#[test]
fn a_row_has_the_same_score_alone_and_among_others() {
    let c = case(2, 1, 100, 100, 3);
    let all = score(&c);
    for t in [0, 1, 63, 64, 99] {
        let row = Tensor::from_vec(c.x.f32()[t * 100..(t + 1) * 100].to_vec(), [1, 1, 100]);
        let alone = fwd(&row, &c.weight, &c.bias, &c.recency, &c.positions[t..t + 1], EPS);
        assert_eq!(alone.f32(), &all.f32()[t * 3..(t + 1) * 3], "row {t}");
        let mut scores = [f32::NAN; 3];
        token(row.f32(), c.weight.f32(), c.bias.f32(), c.recency.f32(), c.positions[t], EPS, &mut scores);
        assert_eq!(scores[..], all.f32()[t * 3..(t + 1) * 3], "token {t}");
    }
}

#[test]
fn gradients_agree_with_finite_differences() {
    let c = case(3, 2, 70, 19, 2);
    let probe = probe_weights(2 * 70 * 2, 4);
    let loss = |x: &Tensor, weight: &Tensor, bias: &Tensor, recency: &Tensor| -> f64 {
        naive::fwd(x.f32(), weight.f32(), bias.f32(), recency.f32(), &c.positions, EPS).iter().zip(&probe).map(|(s, p)| s * *p as f64).sum()
    };
    let dscores = Tensor::from_vec(probe.clone(), [2, 70, 2]);
    let (dweight, dbias, drecency, dx) = bwd(&dscores, &c.x, &c.weight, &c.positions, EPS, true);
    check_gradient("dx", &c.x, &dx.unwrap(), 1e-3, 1e-4, 60, |x| loss(x, &c.weight, &c.bias, &c.recency));
    check_gradient("dweight", &c.weight, &dweight, 1e-3, 1e-4, 60, |w| loss(&c.x, w, &c.bias, &c.recency));
    check_gradient("dbias", &c.bias, &dbias, 1e-3, 1e-4, 60, |b| loss(&c.x, &c.weight, b, &c.recency));
    check_gradient("drecency", &c.recency, &drecency, 1e-3, 1e-4, 60, |r| loss(&c.x, &c.weight, &c.bias, r));
    assert!(bwd(&dscores, &c.x, &c.weight, &c.positions, EPS, false).3.is_none());
}

#[test]
fn no_rows_give_no_scores_and_zero_gradients() {
    let c = case(5, 1, 0, 8, 2);
    assert!(score(&c).is_empty());
    let (dweight, ..) = bwd(&Tensor::zeros([1, 0, 2]), &c.x, &c.weight, &[], EPS, true);
    assert_eq!(dweight.f32(), [0.0; 16]);
}
