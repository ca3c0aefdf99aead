use sluice_tensor::Tensor;
use sluice_testkit::{Rng, assert_close, check_gradient, max_abs_diff, probe_weights};

use super::cases::{BASE, Case, Inputs};
use super::{bwd, fwd, fwd_bidirectional, naive};

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

#[test]
fn specification_gradients_equal_finite_differences() {
    let x = Inputs::filled(&Case { t: 12, start: 3, heads: (4, 2), d: 6, short: Some(7) }, |rng| rng.normal());
    let weights = probe_weights(x.q.len(), 3);
    let dout = Tensor::from_vec(weights.clone(), x.q.shape());
    let loss = |q: &Tensor, k: &Tensor, v: &Tensor| {
        let (o, _) = naive::fwd(q, k, v, 3, &x.lens);
        o.iter().zip(&weights).map(|(o, w)| o * *w as f64).sum()
    };
    let (dq, dk, dv) = naive::bwd(&dout, &x.q, &x.k, &x.v, 3, &x.lens);
    let like = |g: &[f64], x: &Tensor| Tensor::from_vec(to_f32(g), x.shape());
    check_gradient("q", &x.q, &like(&dq, &x.q), 1e-3, 1e-3, 60, |q| loss(q, &x.k, &x.v));
    check_gradient("k", &x.k, &like(&dk, &x.k), 1e-3, 1e-3, 60, |k| loss(&x.q, k, &x.v));
    check_gradient("v", &x.v, &like(&dv, &x.v), 1e-3, 1e-3, 60, |v| loss(&x.q, &x.k, v));
}

#[test]
fn large_logits_do_not_overflow() {
    let mut rng = Rng::new(8);
    let mut big = |heads| Tensor::from_vec((0..130 * heads * 64).map(|_| 30.0 * rng.normal()).collect(), [1, 130, heads, 64]);
    let (q, k, v) = (big(2), big(1), big(1));
    let (o, lse) = fwd(&q, &k, &v, 0, &[130]);
    let (want_o, want_lse) = naive::fwd(&q, &k, &v, 0, &[130]);
    // Logits of several thousand: one unit in the last place of a logit is 1e-3 in its exponential.
    assert_close("lse", lse.f32(), &to_f32(&want_lse), 1e-5);
    assert_close("o", o.f32(), &to_f32(&want_o), 5e-2);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let x = Inputs::poisoned(&Case { t: 700, heads: (4, 2), short: Some(333), ..BASE });
    let run = |threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let (o, lse) = fwd(&x.q, &x.k, &x.v, 0, &x.lens);
            let (dq, dk, dv) = bwd(&x.dout, &x.q, &x.k, &x.v, &o, &lse, 0, &x.lens);
            [o, lse, dq, dk, dv]
        })
    };
    for (one, five) in run(1).iter().zip(run(5)) {
        assert_eq!(max_abs_diff(one.f32(), five.f32()), 0.0);
    }
}

#[test]
fn an_encoder_sees_the_same_whatever_the_order_of_its_tokens() {
    let x = Inputs::poisoned(&Case { t: 90, heads: (2, 1), ..BASE });
    let [k, v] = [&x.k, &x.v].map(|x| Tensor::from_vec(x.f32()[..90 * 64].to_vec(), [1, 90, 1, 64]));
    let turned = |x: &Tensor| {
        let rows = x.f32().chunks_exact(x.len() / 90).rev();
        Tensor::from_vec(rows.flatten().copied().collect(), x.shape())
    };
    let (o, lse) = fwd_bidirectional(&x.q, &k, &v, &[90]);
    let (o_turned, lse_turned) = fwd_bidirectional(&turned(&x.q), &turned(&k), &turned(&v), &[90]);
    assert_close("o", turned(&o).f32(), o_turned.f32(), 1e-5);
    assert_close("lse", turned(&lse).f32(), lse_turned.f32(), 1e-5);
}

#[test]
#[should_panic(expected = "3 queries and 4 keys of encoders")]
fn an_encoder_with_more_keys_than_queries_is_refused() {
    let [q, k] = [3, 4].map(|t| Tensor::zeros([1, t, 1, 8]));
    fwd_bidirectional(&q, &k, &k, &[3]);
}

#[test]
fn rounding_to_eight_bits_costs_a_few_hundredths_at_most() {
    for case in [Case { short: Some(41), ..BASE }, Case { t: 63, heads: (4, 4), d: 128, ..BASE }] {
        let x = Inputs::poisoned(&case);
        let (o, _) = naive::fwd(&x.q, &x.k, &x.v, case.start, &x.lens);
        let (dq, dk, dv) = naive::bwd(&x.dout, &x.q, &x.k, &x.v, case.start, &x.lens);
        let rounded = naive::rounded(&x.dout, &x.q, &x.k, &x.v, case.start, &x.lens);
        for (want, got) in [o, dq, dk, dv].iter().zip(&rounded) {
            let off = want.iter().zip(got).map(|(want, got)| (want - got).abs() / want.abs().max(1.0)).fold(0.0, f64::max);
            assert!(off > 1e-3 && off < 0.03, "{case:?}: {off}");
        }
    }
}
