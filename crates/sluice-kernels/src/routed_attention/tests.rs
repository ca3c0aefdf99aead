use sluice_tensor::Tensor;
use sluice_testkit::{Rng, assert_close, check_gradient, max_abs_diff, probe_weights};

use super::{GateBias, Routing, Visibility, bwd, bwd_scores, fwd, naive};
use crate::top_k_routing::{Budget, RouterState, route, route_bidirectional};

/// How a case chooses its routed keys.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Keys {
    /// The best by score, as the router does it: consecutive blocks share almost all.
    Best,
    /// Any candidates, different in every block and padded unevenly.
    Random,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    t: usize,
    heads: (usize, usize),
    d: usize,
    window: usize,
    top_k: usize,
    every: usize,
    visibility: Visibility,
    keys: Keys,
    bias: bool,
    /// Valid queries of the second sequence of the batch; the first is full. `None`: a batch of one.
    short: Option<usize>,
}

const BASE: Case = Case {
    t: 100,
    heads: (3, 1),
    d: 64,
    window: 8,
    top_k: 16,
    every: 8,
    visibility: Visibility::Causal,
    keys: Keys::Best,
    bias: false,
    short: None,
};

const BIDIRECTIONAL: Case = Case { visibility: Visibility::Bidirectional, ..BASE };

const CASES: &[Case] = &[
    Case { t: 1, ..BASE },
    Case { t: 63, every: 64, ..BASE },
    Case { t: 63, heads: (4, 4), window: 1, every: 1, bias: true, ..BASE },
    BASE,
    Case { bias: true, short: Some(41), ..BASE },
    Case { keys: Keys::Random, bias: true, short: Some(0), ..BASE },
    Case { every: 1, keys: Keys::Random, bias: true, ..BASE },
    Case { every: 1, bias: true, ..BASE },
    Case { every: 64, window: 1, heads: (4, 2), ..BASE },
    Case { every: 24, window: 5, heads: (4, 1), d: 32, bias: true, ..BASE },
    Case { d: 20, heads: (2, 2), bias: true, ..BASE },
    Case { d: 128, heads: (2, 1), every: 200, window: 3, ..BASE },
    Case { top_k: 0, bias: true, ..BASE },
    Case { t: 300, window: 128, top_k: 64, every: 64, bias: true, short: Some(170), heads: (6, 2), ..BASE },
    Case { t: 1000, window: 128, top_k: 256, every: 64, heads: (3, 1), ..BASE },
    Case { t: 1000, window: 1, top_k: 33, every: 1, heads: (4, 2), bias: true, ..BASE },
    Case { t: 1000, window: 8, top_k: 32, every: 8, heads: (2, 1), keys: Keys::Random, ..BASE },
    BIDIRECTIONAL,
    Case { t: 1, ..BIDIRECTIONAL },
    Case { t: 63, window: 1, bias: true, ..BIDIRECTIONAL },
    Case { t: 150, window: 40, bias: true, short: Some(77), heads: (4, 2), ..BIDIRECTIONAL },
    Case { t: 1000, window: 128, top_k: 100, heads: (2, 1), bias: true, ..BIDIRECTIONAL },
    // Nothing to see at all: no window and no routed keys.
    Case { t: 70, window: 0, top_k: 0, ..BIDIRECTIONAL },
    Case { t: 70, window: 0, top_k: 3, bias: true, ..BIDIRECTIONAL },
];

struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    scores: Tensor,
    routing: Routing,
    bias: bool,
}

impl Inputs {
    fn new(case: &Case) -> Self {
        let (n_batch, (h, g)) = (1 + case.short.is_some() as usize, case.heads);
        let mut rng = Rng::new(17 + case.t as u64);
        let q = rng.normal_tensor([n_batch, case.t, h, case.d]);
        let k = rng.normal_tensor([n_batch, case.t, g, case.d]);
        let v = rng.normal_tensor([n_batch, case.t, g, case.d]);
        let dout = rng.normal_tensor([n_batch, case.t, h, case.d]);
        let scores = rng.normal_tensor([n_batch, case.t, g]);
        let lens: Vec<usize> = [case.t].into_iter().chain(case.short).collect();
        // The router wants a window; the kernel does without one.
        let budget = Budget { window: case.window.max(1), top_k: case.top_k, route_every: case.every, n_sink: 2.min(case.top_k) };
        let mut routing = match case.visibility {
            Visibility::Causal => route(&scores, &lens, &budget),
            Visibility::Bidirectional => route_bidirectional(&scores, &lens, &budget),
        };
        routing.window = case.window;
        if case.keys == Keys::Random {
            scramble(&mut routing, &mut rng);
        }
        Self { q, k, v, dout, scores, routing, bias: case.bias }
    }

    /// Every row that must not be read is NaN.
    fn poisoned(case: &Case) -> Self {
        let mut inputs = Self::new(case);
        inputs.poison();
        inputs
    }

    fn gate_bias(&self) -> Option<GateBias<'_>> {
        self.bias.then_some(GateBias { scores: &self.scores, temperature: 0.7 })
    }

    fn poison(&mut self) {
        let [n_batch, t, h, d] = self.q.dims();
        let [_, s, g, _] = self.k.dims();
        let mut seen = vec![false; n_batch * s * g];
        for b in 0..n_batch {
            for i in 0..self.routing.lens[b] {
                for kv in 0..g {
                    for row in naive::visible(None, &self.routing, b, i, kv).into_keys() {
                        seen[(b * s + row) * g + kv] = true;
                    }
                }
            }
            for x in [&mut self.q, &mut self.dout] {
                x.f32_mut()[(b * t + self.routing.lens[b]) * h * d..(b + 1) * t * h * d].fill(f32::NAN);
            }
        }
        for (at, seen) in seen.into_iter().enumerate() {
            if !seen {
                self.k.f32_mut()[at * d..][..d].fill(f32::NAN);
                self.v.f32_mut()[at * d..][..d].fill(f32::NAN);
                self.scores.f32_mut()[at] = f32::NAN;
            }
        }
    }
}

/// Other candidates for every causal block, and sometimes fewer of them.
fn scramble(routing: &mut Routing, rng: &mut Rng) {
    let per_block = routing.n_kv_heads * routing.n_routed;
    for (at, row) in routing.indices.chunks_exact_mut(routing.n_routed).enumerate() {
        let block = at * routing.n_routed / per_block % routing.n_blocks;
        let n_candidates = (block * routing.route_every + 1).saturating_sub(routing.window);
        let mut chosen: Vec<i32> =
            (0..rng.below(row.len() + 1)).filter(|_| n_candidates > 0).map(|_| rng.below(n_candidates) as i32).collect();
        chosen.sort_unstable();
        chosen.dedup();
        row.fill(-1);
        row[..chosen.len()].copy_from_slice(&chosen);
    }
    for tau in &mut routing.tau {
        *tau = if rng.below(3) == 0 { f32::NEG_INFINITY } else { rng.normal() };
    }
}

fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn check(case: &Case) {
    let x = Inputs::poisoned(case);
    let (o, lse) = fwd(&x.q, &x.k, &x.v, x.gate_bias(), &x.routing);
    let (want_o, want_lse) = naive::fwd(&x.q, &x.k, &x.v, x.gate_bias(), &x.routing);
    assert_close(&format!("{case:?} o"), o.f32(), &to_f32(&want_o), 2e-5);
    assert_close(&format!("{case:?} lse"), lse.f32(), &to_f32(&want_lse), 1e-5);

    let grads = bwd(&x.dout, &x.q, &x.k, &x.v, &o, &lse, x.gate_bias(), &x.routing);
    let (dq, dk, dv, dscores) = naive::bwd(&x.dout, &x.q, &x.k, &x.v, x.gate_bias(), &x.routing);
    assert_close(&format!("{case:?} dq"), grads.dq.f32(), &to_f32(&dq), 5e-5);
    assert_close(&format!("{case:?} dk"), grads.dk.f32(), &to_f32(&dk), 5e-5);
    assert_close(&format!("{case:?} dv"), grads.dv.f32(), &to_f32(&dv), 5e-5);
    assert_eq!(grads.dscores.is_some(), case.bias);
    if let Some(got) = grads.dscores {
        assert_close(&format!("{case:?} dscores"), got.f32(), &to_f32(&dscores), 5e-5);
        let bias = x.gate_bias().expect("the case has a bias");
        let alone = bwd_scores(&x.dout, &x.q, &x.k, &x.v, &o, &lse, bias, &x.routing);
        assert_eq!(alone.f32(), got.f32(), "{case:?} dscores alone");
    }
}

#[test]
fn every_case_equals_the_specification_and_reads_no_unseen_row() {
    for case in CASES {
        check(case);
    }
}

#[test]
fn specification_gradients_equal_finite_differences() {
    for case in [
        Case { t: 20, window: 3, top_k: 4, every: 4, heads: (4, 2), d: 6, bias: true, ..BASE },
        Case { t: 20, window: 3, top_k: 4, heads: (2, 1), d: 6, bias: true, short: Some(11), ..BIDIRECTIONAL },
    ] {
        let x = Inputs::new(&case);
        let weights = probe_weights(x.q.len(), 3);
        let dout = Tensor::from_vec(weights.clone(), x.q.shape());
        let loss = |q: &Tensor, k: &Tensor, v: &Tensor, scores: &Tensor| {
            let (o, _) = naive::fwd(q, k, v, Some(GateBias { scores, temperature: 0.7 }), &x.routing);
            o.iter().zip(&weights).map(|(o, w)| o * *w as f64).sum()
        };
        let (dq, dk, dv, dscores) = naive::bwd(&dout, &x.q, &x.k, &x.v, x.gate_bias(), &x.routing);
        let like = |g: &[f64], x: &Tensor| Tensor::from_vec(to_f32(g), x.shape());
        check_gradient("q", &x.q, &like(&dq, &x.q), 1e-3, 1e-3, 60, |q| loss(q, &x.k, &x.v, &x.scores));
        check_gradient("k", &x.k, &like(&dk, &x.k), 1e-3, 1e-3, 60, |k| loss(&x.q, k, &x.v, &x.scores));
        check_gradient("v", &x.v, &like(&dv, &x.v), 1e-3, 1e-3, 60, |v| loss(&x.q, &x.k, v, &x.scores));
        // tau is a constant for the gradient, and the routing is frozen, so a moved score does not reroute.
        check_gradient("scores", &x.scores, &like(&dscores, &x.scores), 1e-3, 1e-3, 60, |s| loss(&x.q, &x.k, &x.v, s));
        assert!(dscores.iter().any(|g| g.abs() > 1e-3), "the bias must reach some score");
    }
}

#[test]
fn row_without_keys_yields_zero() {
    let x = Inputs::poisoned(&Case { t: 70, window: 0, top_k: 0, ..BIDIRECTIONAL });
    let (o, lse) = fwd(&x.q, &x.k, &x.v, None, &x.routing);
    assert!(o.f32().iter().all(|&o| o == 0.0) && lse.f32().iter().all(|&l| l == f32::NEG_INFINITY));
    let grads = bwd(&x.dout, &x.q, &x.k, &x.v, &o, &lse, None, &x.routing);
    assert!([grads.dq, grads.dk, grads.dv].iter().all(|g| g.f32().iter().all(|&g| g == 0.0)));
}

#[test]
fn budget_of_the_whole_text_equals_dense_attention() {
    for every in [1, 8, 64] {
        let x = Inputs::new(&Case { t: 200, top_k: 200, every, heads: (6, 2), ..BASE });
        let (o, lse) = fwd(&x.q, &x.k, &x.v, None, &x.routing);
        let (dense_o, dense_lse) = crate::dense_attention::fwd(&x.q, &x.k, &x.v, 0, &[200]);
        assert_close("o", o.f32(), dense_o.f32(), 1e-5);
        assert_close("lse", lse.f32(), dense_lse.f32(), 1e-5);
    }
}

/// Copy the rows of `x [1, S, heads, D]` named by `rows` (`None`: NaN, never to be read).
fn pick_rows(x: &Tensor, rows: impl Iterator<Item = Option<usize>>) -> Tensor {
    let [_, _, heads, d] = x.dims();
    let mut out = Vec::new();
    for row in rows {
        match row {
            Some(row) => out.extend_from_slice(&x.f32()[row * heads * d..][..heads * d]),
            None => out.extend(std::iter::repeat_n(f32::NAN, heads * d)),
        }
    }
    let n = out.len() / (heads * d);
    Tensor::from_vec(out, [1, n, heads, d])
}

#[test]
fn chunks_with_a_bounded_cache_equal_plain_prefill() {
    for every in [1, 8, 24] {
        let (t, window, top_k, n_kv) = (130, 9, 12, 1);
        let x = Inputs::new(&Case { t, window, top_k, every, heads: (3, n_kv), bias: true, ..BASE });
        let (want_o, want_lse) = fwd(&x.q, &x.k, &x.v, x.gate_bias(), &x.routing);
        let mut state = RouterState::new(n_kv, Budget { window, top_k, route_every: every, n_sink: 2 });
        let mut start = 0;
        for n in [1, 1, 30, 5, 1, 64, 28] {
            let chunk = state.route_chunk(&x.scores.f32()[start * n_kv..(start + n) * n_kv]);
            // A cache: one slot for every routed key of the chunk, then the local rows, from `key_offset` on.
            let mut slots: Vec<i32> = chunk.positions.iter().copied().filter(|&p| p >= 0).collect();
            slots.sort_unstable();
            slots.dedup();
            let first_local = (start / every * every + 1).saturating_sub(window);
            let n_slots = first_local.min(slots.len());
            let n_blocks = chunk.n_blocks;
            // Only keys that stand before the first local row need a slot; later ones are rows of the buffer.
            slots.retain(|&p| (p as usize) < first_local);
            let used = slots.len();
            assert!(used <= n_slots);
            let key_offset = first_local - used;
            let row_of = |p: i32| match slots.binary_search(&p) {
                Ok(slot) => slot as i32,
                Err(_) => p - key_offset as i32,
            };
            let rows = || slots.iter().map(|&p| Some(p as usize)).chain((first_local..start + n).map(Some)).chain([None]);
            let routing = Routing {
                batch: 1,
                n_blocks,
                n_kv_heads: n_kv,
                n_routed: top_k,
                indices: chunk.positions.iter().map(|&p| if p < 0 { -1 } else { row_of(p) }).collect(),
                tau: chunk.tau.clone(),
                window,
                route_every: every,
                start,
                key_offset,
                lens: vec![n],
                visibility: Visibility::Causal,
            };
            let scores = pick_rows(&x.scores.reshape([1, t, n_kv, 1]), rows());
            let scores = scores.reshape([1, scores.len() / n_kv, n_kv]);
            let q = pick_rows(&x.q, (start..start + n).map(Some));
            let bias = Some(GateBias { scores: &scores, temperature: 0.7 });
            let (o, lse) = fwd(&q, &pick_rows(&x.k, rows()), &pick_rows(&x.v, rows()), bias, &routing);
            let width = want_o.len() / t;
            assert_close(&format!("o every {every} from {start}"), o.f32(), &want_o.f32()[start * width..][..n * width], 1e-5);
            assert_close(&format!("lse every {every} from {start}"), lse.f32(), &want_lse.f32()[start * 3..][..n * 3], 1e-5);
            start += n;
        }
        assert_eq!(start, t);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let x = Inputs::new(&Case { t: 700, window: 40, top_k: 64, every: 16, heads: (4, 2), bias: true, short: Some(333), ..BASE });
    let run = |threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let (o, lse) = fwd(&x.q, &x.k, &x.v, x.gate_bias(), &x.routing);
            let g = bwd(&x.dout, &x.q, &x.k, &x.v, &o, &lse, x.gate_bias(), &x.routing);
            [o, lse, g.dq, g.dk, g.dv, g.dscores.unwrap()]
        })
    };
    for (one, five) in run(1).iter().zip(run(5)) {
        assert_eq!(max_abs_diff(one.f32(), five.f32()), 0.0);
    }
}

#[test]
#[should_panic(expected = "is routed and local")]
fn routed_key_inside_the_local_range_is_refused() {
    let mut x = Inputs::new(&BASE);
    let last = x.routing.indices.len() - 1;
    x.routing.indices[last] = 99;
    let _ = fwd(&x.q, &x.k, &x.v, None, &x.routing);
}

#[test]
#[should_panic(expected = "blocks of routing")]
fn routing_that_is_too_short_is_refused() {
    let mut x = Inputs::new(&BASE);
    x.routing.n_blocks -= 1;
    x.routing.indices.truncate(x.routing.n_blocks * 16);
    x.routing.tau.truncate(x.routing.n_blocks);
    let _ = fwd(&x.q, &x.k, &x.v, None, &x.routing);
}
