use super::*;

#[test]
fn noise_has_the_mean_and_spread_of_a_gumbel_distribution() {
    let n = 200_000;
    let noise = add_noise(&Tensor::zeros([n]), 5, 1, 2.0);
    let mean = noise.f32().iter().map(|&x| x as f64).sum::<f64>() / n as f64;
    let variance = noise.f32().iter().map(|&x| (x as f64 - mean).powi(2)).sum::<f64>() / n as f64;
    // Euler's constant times the scale, and pi^2 / 6 times its square.
    assert!((mean - 2.0 * 0.577_215_66).abs() < 0.02, "{mean}");
    assert!((variance - 4.0 * 1.644_934).abs() < 0.1, "{variance}");
}

#[test]
fn another_seed_and_another_stream_give_other_noise() {
    let zeros = Tensor::zeros([100]);
    let noise = |seed, stream| add_noise(&zeros, seed, stream, 1.0).into_vec();
    assert_eq!(noise(1, 2), noise(1, 2));
    assert_ne!(noise(1, 2), noise(1, 3));
    assert_ne!(noise(1, 2), noise(9, 2));
}
