//! The case list of [`selftest`](crate::selftest). On a GPU the causal ones run only where factors may be rounded to bf16.

use sluice_tensor::cuda::Precision;
use sluice_tensor::{Device, Tensor};
use sluice_testkit::Rng;

use super::{GateBias, PlacedRouting, RoutedGrads, bwd, bwd_on_gpu, bwd_scores, fwd, fwd_on_gpu, fwd_packed, naive};
use crate::selftest::Check;
use crate::top_k_routing::{Budget, mark_sinks, route, route_bidirectional, route_bidirectional_in_place, route_on_gpu};

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
    // Enough blocks and heads for gradients in one pass.
    Case { t: 600, window: 128, top_k: 256, every: 64, heads: (54, 27), short: Some(333), ..BASE },
    Case { t: 500, window: 100, top_k: 200, every: 64, heads: (34, 34), bias: false, short: Some(449), ..BASE },
    // Dense causal attention.
    Case { t: 200, window: 200, top_k: 1, every: 64, heads: (2, 1), d: 128, bias: false, ..BASE },
];

/// Which tokens of an encoder have the largest scores.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Best {
    /// Any.
    Anywhere,
    /// The last ones, far from the first queries and local to the last.
    Last,
}

/// Bidirectional routing and attention, forward.
#[derive(Clone, Copy)]
struct Encoder {
    t: usize,
    heads: (usize, usize),
    d: usize,
    window: usize,
    top_k: usize,
    best: Best,
    /// Length of a second sequence.
    short: Option<usize>,
}

const ENCODER: Encoder = Encoder { t: 100, heads: (3, 3), d: 64, window: 8, top_k: 16, best: Best::Anywhere, short: None };

const ENCODERS: &[Encoder] = &[
    ENCODER,
    Encoder { t: 1, ..ENCODER },
    Encoder { t: 63, window: 1, short: Some(62), ..ENCODER },
    Encoder { t: 130, window: 2, top_k: 3, short: Some(0), ..ENCODER },
    Encoder { t: 200, window: 0, top_k: 70, short: Some(129), ..ENCODER },
    Encoder { t: 70, window: 0, top_k: 0, short: Some(3), ..ENCODER },
    Encoder { t: 300, window: 5, top_k: 0, short: Some(128), ..ENCODER },
    Encoder { t: 150, window: 40, top_k: 1000, heads: (4, 2), short: Some(77), ..ENCODER },
    Encoder { t: 150, window: 1000, top_k: 20, heads: (2, 2), short: Some(149), ..ENCODER },
    Encoder { t: 600, window: 33, top_k: 64, best: Best::Last, heads: (6, 2), short: Some(555), ..ENCODER },
    Encoder { t: 700, window: 256, top_k: 64, best: Best::Last, heads: (2, 2), short: Some(385), ..ENCODER },
    Encoder { t: 1000, window: 128, top_k: 300, heads: (2, 2), short: Some(513), ..ENCODER },
    Encoder { t: 300, window: 31, top_k: 40, heads: (4, 2), d: 128, short: Some(193), ..ENCODER },
    Encoder { t: 300, window: 31, top_k: 40, heads: (4, 2), d: 32, short: Some(193), ..ENCODER },
    Encoder { t: 200, window: 0, top_k: 70, heads: (2, 2), d: 32, short: Some(129), ..ENCODER },
    Encoder { t: 70, window: 0, top_k: 0, d: 32, short: Some(3), ..ENCODER },
    Encoder { t: 500, window: 64, top_k: 100, heads: (2, 2), d: 128, ..ENCODER },
    Encoder { t: 300, window: 0, top_k: 70, heads: (4, 2), d: 20, short: Some(0), ..ENCODER },
    Encoder { t: 150, window: 33, top_k: 20, best: Best::Last, heads: (2, 2), d: 100, short: Some(77) },
];

pub(crate) fn run(check: &mut Check<'_>) {
    ENCODERS.iter().for_each(|case| run_encoder(check, case));
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

fn run_encoder(check: &mut Check<'_>, case: &Encoder) {
    let Encoder { t, heads: (h, g), d, window, top_k, best, short } = *case;
    // On tensor cores twice half a unit in the last place of a weight near 1, and of a result in bf16.
    let rounding = match (check.device().gpu().map(|gpu| gpu.precision()), d) {
        (Some(Precision::Bf16), 64 | 128) => 1.0 / 128.0,
        (Some(Precision::Bf16 | Precision::Tf32), 32 | 64) => 1.0 / 1024.0,
        _ => 0.0,
    };
    let short_of = short.map_or(String::new(), |n| format!(" and {n}"));
    if !check.case("routed_attention", format!("encoder, T {t}{short_of}, {h}/{g} heads of {d}, w {window}, k {top_k}, best {best:?}")) {
        return;
    }
    let lens: Vec<usize> = [t].into_iter().chain(short).collect();
    let mut rng = Rng::new(29 + t as u64);
    let [mut q, mut k, mut v] = [h, g, g].map(|n| check.factor(&rng.normal_tensor([lens.len(), t, n, d])));
    let mut scores = rng.normal_tensor([lens.len(), t, g]);
    if best == Best::Last {
        scores.f32_mut().iter_mut().enumerate().for_each(|(i, score)| *score = (i / g % t) as f32);
    }
    let budget = Budget { window: window.max(1), top_k, route_every: 1, n_sink: 2.min(top_k) };
    // The router wants a window; the kernel does without one.
    let routing = super::Routing { window, ..route_bidirectional(&scores, &lens, &budget) };
    // What no valid query sees is NaN.
    for (b, &len) in lens.iter().enumerate() {
        q.f32_mut()[(b * t + len) * h * d..(b + 1) * t * h * d].fill(f32::NAN);
        for head in 0..g {
            let mut seen = vec![false; t];
            (0..len).flat_map(|i| naive::visible(None, &routing, b, i, head).into_keys()).for_each(|row| seen[row] = true);
            for row in (0..t).filter(|&row| !seen[row]) {
                for x in [&mut k, &mut v] {
                    x.f32_mut()[((b * t + row) * g + head) * d..][..d].fill(f32::NAN);
                }
            }
        }
    }
    let (want_o, want_lse) = naive::fwd(&q, &k, &v, None, &routing);
    let there = [&q, &k, &v].map(|x| check.put(x));
    let (o, lse) = fwd(&there[0], &there[1], &there[2], None, &routing);
    check.compare("o", &o, &want_o, 2e-5 + rounding);
    check.compare("lse", &lse, &want_lse, if rounding > 0.0 { 1e-4 } else { 1e-5 });
    if h == g {
        let packed = check.put(&crate::dense_attention::cases::packed([&q, &k, &v]));
        let placed: PlacedRouting = match route_bidirectional_in_place(&check.put(&scores), &lens, &budget) {
            PlacedRouting::Host(_) => routing.clone().into(),
            PlacedRouting::Gpu(there) => {
                let there = std::sync::Arc::into_inner(there).expect("nobody else has it");
                super::GpuRouting { window, ..there }.into()
            }
        };
        check.require("routed where the scores are", *placed.download() == routing);
        let o_packed = fwd_packed(&packed, &placed);
        check.require("packed rows give the same bits", same_bits(&o, &o_packed));
    }
}

fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    let [a, b] = [a, b].map(|x| x.to(&Device::Cpu));
    a.f32().iter().map(|x| x.to_bits()).eq(b.f32().iter().map(|x| x.to_bits()))
}
