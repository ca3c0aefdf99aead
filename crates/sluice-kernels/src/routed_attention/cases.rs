//! The case list of [`selftest`](crate::selftest). On a GPU only where factors may be rounded to bf16.

use sluice_tensor::cuda::Precision;
use sluice_tensor::{Device, Tensor};
use sluice_testkit::Rng;

use super::{GateBias, RoutedGrads, bwd, bwd_on_gpu, bwd_scores, fwd, fwd_on_gpu, naive};
use crate::selftest::Check;
use crate::top_k_routing::{Budget, mark_sinks, route, route_on_gpu};

#[derive(Clone, Copy)]
struct Case {
    t: usize,
    heads: (usize, usize),
    d: usize,
    window: usize,
    top_k: usize,
    every: usize,
    bias: bool,
    /// Length of a second sequence.
    short: Option<usize>,
}

const BASE: Case = Case { t: 100, heads: (3, 1), d: 64, window: 8, top_k: 16, every: 8, bias: true, short: None };

const CASES: &[Case] = &[
    Case { t: 1, ..BASE },
    Case { t: 63, every: 64, ..BASE },
    Case { heads: (4, 4), window: 1, every: 1, short: Some(41), ..BASE },
    Case { bias: false, short: Some(0), ..BASE },
    Case { every: 64, window: 1, top_k: 33, heads: (4, 2), ..BASE },
    Case { d: 128, heads: (2, 1), every: 200, window: 3, ..BASE },
    Case { top_k: 0, ..BASE },
    Case { t: 300, window: 128, top_k: 64, every: 64, short: Some(170), heads: (9, 3), ..BASE },
    Case { t: 300, window: 128, top_k: 100, every: 64, heads: (8, 2), d: 128, ..BASE },
    Case { t: 600, window: 128, top_k: 256, every: 64, heads: (3, 1), bias: false, ..BASE },
    // Dense causal attention.
    Case { t: 200, window: 200, top_k: 1, every: 64, heads: (2, 1), d: 128, bias: false, ..BASE },
];

pub(crate) fn run(check: &mut Check<'_>) {
    let gpu = check.device().gpu().cloned();
    if gpu.as_ref().is_some_and(|gpu| gpu.precision() != Precision::Bf16) {
        return;
    }
    for case in CASES {
        let Case { t, heads: (h, g), d, window, top_k, every, bias, short } = *case;
        let biased = if bias { ", bias" } else { "" };
        if !check.case("routed_attention", format!("T {t}, {h}/{g} heads of {d}, w {window}, k {top_k}, r {every}{biased}")) {
            continue;
        }
        let lens: Vec<usize> = [t].into_iter().chain(short).collect();
        let mut rng = Rng::new(17 + t as u64);
        let [mut q, k, v, mut dout] = [h, g, g, h].map(|n| check.factor(&rng.normal_tensor([lens.len(), t, n, d])));
        let scores = rng.normal_tensor([lens.len(), t, g]);
        for x in [&mut q, &mut dout] {
            for (b, row) in x.f32_mut().chunks_exact_mut(t * h * d).enumerate() {
                row[lens[b] * h * d..].fill(f32::NAN);
            }
        }
        let budget = Budget { window, top_k, route_every: every, n_sink: 2.min(top_k) };
        let positions: Vec<u32> = (0..t as u32).collect();
        let marked = mark_sinks(&scores, &positions, budget.n_sink);
        let bias_of = |scores| bias.then_some(GateBias { scores, temperature: 0.7 });
        let routing = route(&scores, &lens, &budget);
        let (want_o, want_lse) = naive::fwd(&q, &k, &v, bias_of(&marked), &routing);
        let want = naive::bwd(&dout, &q, &k, &v, bias_of(&marked), &routing);

        let [dout, q, k, v, marked] = [&dout, &q, &k, &v, &marked].map(|x| check.put(x));
        let there = bias_of(&marked);
        let (o, lse) = fwd(&q, &k, &v, there, &routing);
        let grads = bwd(&dout, &q, &k, &v, &o, &lse, there, &routing);
        // Weights and results have 8 bits on a GPU, and a few weights are near 1.
        let rounded = if gpu.is_some() { 1.0 / 64.0 } else { 0.0 };
        check.compare("o", &o, &want_o, 2e-5 + rounded / 2.0);
        check.compare("lse", &lse, &want_lse, if gpu.is_some() { 1e-4 } else { 1e-5 });
        let RoutedGrads { dq, dk, dv, dscores } = &grads;
        check.compare("dq", dq, &want.0, 5e-5 + rounded);
        check.compare("dk", dk, &want.1, 5e-5 + rounded);
        check.compare("dv", dv, &want.2, 5e-5 + rounded);
        if let Some(bias) = there {
            let dscores = dscores.as_ref().expect("there is a bias");
            check.compare("dscores", dscores, &want.3, 5e-5 + rounded);
            let alone = bwd_scores(&dout, &q, &k, &v, &o, &lse, bias, &routing);
            check.require("dscores alone have the same bits", same_bits(&alone, dscores));
        }
        if gpu.is_some() {
            let routing = route_on_gpu(&check.put(&scores), &lens, &budget);
            let (o_again, _) = fwd_on_gpu(&q, &k, &v, there, &routing);
            let again = bwd_on_gpu(&dout, &q, &k, &v, &o, &lse, there, &routing);
            let pairs = [(&o, &o_again), (dq, &again.dq), (dk, &again.dk), (dv, &again.dv)];
            check.require("the same bits again, routed there", pairs.into_iter().all(|(a, b)| same_bits(a, b)));
        }
    }
}

fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    let [a, b] = [a, b].map(|x| x.to(&Device::Cpu));
    a.f32().iter().map(|x| x.to_bits()).eq(b.f32().iter().map(|x| x.to_bits()))
}
