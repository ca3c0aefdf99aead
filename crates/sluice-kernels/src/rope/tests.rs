use sluice_testkit::{Rng, assert_close, check_gradient, probe_weights};

use super::*;
use crate::row_chunks::on_one_and_three_threads;

const STYLES: [RopeStyle; 2] = [RopeStyle::Interleaved, RopeStyle::HalfSplit];

fn frequencies(head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / head_dim as f32)).collect()
}

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

#[test]
fn heads_turned_in_place_agree_with_the_naive_twin() {
    for position in [0u32, 1, 777, 1_000_000] {
        let x = Rng::new(4).normal_tensor([1, 1, 3, 64]);
        let freq = frequencies(64);
        let (mut cos, mut sin, mut turned) = ([0.0; 32], [0.0; 32], x.f32().to_vec());
        position_angles(position, &freq, &mut cos, &mut sin);
        turn_heads(&mut turned, &cos, &sin);
        assert_close(&position.to_string(), &turned, &to_f32(&naive::rotate(&x, &[position], &freq, RopeStyle::HalfSplit, 1.0)), 1e-6);
    }
}

#[test]
fn the_styles_differ_by_a_permutation_of_each_head() {
    let x = Rng::new(2).normal_tensor([1, 5, 2, 8]);
    let interleave = |x: &Tensor| {
        let shuffled = x.f32().chunks(8).flat_map(|head| (0..8).map(move |i| head[i / 2 + 4 * (i % 2)])).collect();
        Tensor::from_vec(shuffled, x.shape())
    };
    let (positions, freq) = ([0, 3, 9, 70, 4000], frequencies(8));
    let split = fwd(&x, &positions, &freq, RopeStyle::HalfSplit);
    let interleaved = fwd(&interleave(&x), &positions, &freq, RopeStyle::Interleaved);
    assert_eq!(interleave(&split).f32(), interleaved.f32());
}

#[test]
fn products_depend_on_the_distance_alone_even_far_out() {
    let mut rng = Rng::new(3);
    let (q, k, freq) = (rng.normal_tensor([1, 1, 1, 64]), rng.normal_tensor([1, 1, 1, 64]), frequencies(64));
    let at = |p: u32, r: u32| {
        let (q, k) = (fwd(&q, &[p], &freq, RopeStyle::HalfSplit), fwd(&k, &[r], &freq, RopeStyle::HalfSplit));
        q.f32().iter().zip(k.f32()).map(|(q, k)| q * k).sum::<f32>()
    };
    assert_close("q.k", &[at(1_000_017, 1_000_000)], &[at(17, 0)], 1e-5);
}

#[test]
fn gradient_matches_finite_differences() {
    let x = Rng::new(4).normal_tensor([2, 3, 2, 6]);
    let dy = Tensor::from_vec(probe_weights(x.len(), 5), x.shape());
    let (positions, freq) = ([4, 65, 2], frequencies(6));
    for style in STYLES {
        check_gradient("dx", &x, &bwd(&dy, &positions, &freq, style), 1e-2, 1e-4, 30, |x| {
            naive::rotate(x, &positions, &freq, style, 1.0).iter().zip(dy.f32()).map(|(y, &d)| y * d as f64).sum()
        });
    }
}

#[test]
fn thread_count_and_neighbours_do_not_change_a_bit() {
    let x = Rng::new(6).normal_tensor([1, 500, 3, 64]);
    let (positions, freq): (Vec<u32>, _) = ((0..500).collect(), frequencies(64));
    let (one, three) = on_one_and_three_threads(|| fwd(&x, &positions, &freq, RopeStyle::HalfSplit));
    assert_eq!(one.f32(), three.f32());
    let last = Tensor::from_vec(x.f32()[499 * 192..].to_vec(), [1, 1, 3, 64]);
    assert_eq!(fwd(&last, &[499], &freq, RopeStyle::HalfSplit).f32(), &one.f32()[499 * 192..]);
}
