use sluice_tensor::DType;
use sluice_testkit::{Rng, assert_close, check_gradient, probe_weights};

use super::*;
use crate::row_chunks::on_one_and_three_threads;

/// `(tokens, vocabulary, width)`.
const CASES: &[(usize, usize, usize)] = &[(0, 5, 3), (1, 1, 1), (63, 100, 63), (1000, 63, 100), (100, 1000, 1000)];

fn check(n: usize, vocab: usize, m: usize) {
    let mut rng = Rng::new(1);
    let table = rng.normal_tensor([vocab, m]);
    let dy = rng.normal_tensor([n, m]);
    let tokens: Vec<u32> = (0..n).map(|_| rng.below(vocab) as u32).collect();
    for table in [table.to_dtype(DType::Bf16), table] {
        let want: Vec<f32> = naive::fwd(&tokens, &table).iter().map(|&x| x as f32).collect();
        assert_eq!(fwd(&tokens, &table).f32(), want, "{n} tokens of [{vocab}, {m}]");
    }
    let want: Vec<f32> = naive::bwd(&dy, &tokens, vocab).iter().map(|&x| x as f32).collect();
    assert_close("dtable", gradient(&dy, &tokens, vocab).f32(), &want, 1e-5);
}

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
fn agrees_with_the_naive_twin() {
    CASES.iter().for_each(|&(n, vocab, m)| check(n, vocab, m));
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
