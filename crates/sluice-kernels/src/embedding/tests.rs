use sluice_testkit::{Rng, check_gradient, probe_weights};

use super::*;
use crate::row_chunks::on_one_and_three_threads;

fn gradient(dy: &Tensor, tokens: &[u32], vocab: usize) -> Tensor {
    let mut dtable = Tensor::zeros([vocab, dy.last_dim()]);
    bwd(dy, tokens, &mut dtable);
    dtable
}

#[test]
fn gradient_is_added_to_what_is_there() {
    let mut dtable = Tensor::full(10.0, [3, 2]);
    bwd(&Tensor::from_vec(vec![1.0, 2.0, 3.0, 4.0], [2, 2]), &[2, 2], &mut dtable);
    assert_eq!(dtable.f32(), [10.0, 10.0, 10.0, 10.0, 14.0, 16.0]);
}

#[test]
fn gradient_matches_finite_differences() {
    let (tokens, table) = ([2, 0, 2, 3], Rng::new(2).normal_tensor([5, 6]));
    let dy = Tensor::from_vec(probe_weights(24, 3), [4, 6]);
    check_gradient("dtable", &table, &gradient(&dy, &tokens, 5), 1e-2, 1e-4, 30, |table| {
        naive::fwd(&tokens, table).iter().zip(dy.f32()).map(|(y, &d)| y * d as f64).sum()
    });
}

#[test]
fn thread_count_does_not_change_a_bit() {
    let mut rng = Rng::new(4);
    let dy = rng.normal_tensor([2000, 64]);
    let tokens: Vec<u32> = (0..2000).map(|_| rng.below(700) as u32).collect();
    let (one, three) = on_one_and_three_threads(|| gradient(&dy, &tokens, 700));
    assert_eq!(one.f32(), three.f32());
}

#[test]
#[should_panic(expected = "token 7 at 1 is outside a vocabulary of 5")]
fn token_outside_the_vocabulary_is_refused() {
    fwd(&[4, 7], &Tensor::zeros([5, 2]));
}
