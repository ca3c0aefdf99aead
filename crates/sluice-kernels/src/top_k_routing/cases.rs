//! The case list of [`selftest`](crate::selftest).

use sluice_tensor::{Device, Tensor};
use sluice_testkit::Rng;

use super::{Budget, mark_sinks, mark_sinks_bwd, naive, route, route_bidirectional};
use crate::selftest::Check;

#[derive(Clone, Copy)]
struct Case {
    t: usize,
    heads: usize,
    window: usize,
    top_k: usize,
    every: usize,
    n_sink: usize,
    /// Scores are whole numbers, zeros of both signs among them.
    ties: bool,
    /// Length of a second sequence.
    short: Option<usize>,
}

const BASE: Case = Case { t: 100, heads: 2, window: 8, top_k: 16, every: 8, n_sink: 2, ties: false, short: None };

const CASES: &[Case] = &[
    Case { t: 1, ..BASE },
    Case { t: 63, every: 64, ..BASE },
    BASE,
    Case { ties: true, short: Some(41), ..BASE },
    Case { window: 1, every: 1, top_k: 33, short: Some(0), ..BASE },
    Case { window: 300, ..BASE },
    // A budget of half the candidates.
    Case { t: 4096, heads: 1, window: 128, top_k: 1920, every: 64, ..BASE },
    Case { top_k: 0, n_sink: 0, ..BASE },
    Case { top_k: 200, ..BASE },
    Case { top_k: 2, n_sink: 4, ..BASE },
    // More candidates than a chunk, a group, and the blocks of several of each.
    Case { t: 4800, heads: 1, window: 128, top_k: 256, every: 64, ties: true, ..BASE },
    Case { t: 14000, heads: 1, window: 128, top_k: 256, every: 512, n_sink: 4, short: Some(9000), ..BASE },
    Case { t: 7000, heads: 1, window: 5, top_k: 1500, every: 700, ties: true, ..BASE },
    Case { t: 20000, heads: 1, window: 5, top_k: 1500, every: 2000, ties: true, ..BASE },
    // Runs of several blocks.
    Case { t: 5000, heads: 2, window: 5, top_k: 64, every: 8, ties: true, short: Some(3001), ..BASE },
    Case { t: 9000, heads: 2, window: 64, top_k: 256, every: 16, n_sink: 4, ..BASE },
];

pub(crate) fn run(check: &mut Check<'_>) {
    for case in CASES {
        let Case { t, heads, window, top_k, every, n_sink, ties, short } = *case;
        let tied = if ties { ", ties" } else { "" };
        if !check.case("top_k_routing", format!("T {t}, {heads} heads, w {window}, k {top_k}, r {every}{tied}")) {
            continue;
        }
        let budget = Budget { window, top_k, route_every: every, n_sink };
        let lens: Vec<usize> = [t].into_iter().chain(short).collect();
        let mut scores = Rng::new(3 + t as u64).normal_tensor([lens.len(), t, heads]);
        for (b, row) in scores.f32_mut().chunks_exact_mut(t * heads).enumerate() {
            for score in &mut row[..lens[b] * heads] {
                *score = if ties { (*score * 2.0).round() } else { *score };
            }
            row[lens[b] * heads..].fill(f32::NAN);
        }
        let routing = route(&check.put(&scores), &lens, &budget);
        let (mut same_sets, mut same_tau) = (true, true);
        for (b, &len) in lens.iter().enumerate() {
            for g in 0..heads {
                let column: Vec<f32> = scores.f32()[b * t * heads..].iter().skip(g).step_by(heads).take(len).copied().collect();
                for block in 0..routing.n_blocks {
                    let (kept, tau) =
                        if block * every < len { naive::causal_block(&column, block, &budget) } else { (vec![], f32::NEG_INFINITY) };
                    same_sets &= routing.routed(b, block, g) == kept;
                    same_tau &= routing.tau_of(b, block, g) == tau;
                }
            }
        }
        check.require("kept sets", same_sets);
        check.require("tau", same_tau);
        let routing = route_bidirectional(&check.put(&scores), &lens, &budget);
        let whole = (0..lens.len() * heads).all(|i| {
            let (b, g) = (i / heads, i % heads);
            let column: Vec<f32> = scores.f32()[b * t * heads..].iter().skip(g).step_by(heads).take(lens[b]).copied().collect();
            let (kept, tau) = naive::keep_best(&column, &budget);
            routing.routed(b, 0, g) == kept && routing.tau_of(b, 0, g) == tau
        });
        check.require("an encoder's kept sets and tau", whole);
        let positions: Vec<u32> = (0..t as u32).collect();
        let marked = mark_sinks(&check.put(&scores), &positions, n_sink).to(&Device::Cpu);
        let want: Vec<f32> =
            scores.f32().iter().enumerate().map(|(i, &s)| if i / heads % t < n_sink { f32::INFINITY } else { s }).collect();
        check.require("marked sinks", same_bits(&marked, &want));
        let dscores = mark_sinks_bwd(&check.put(&scores), &positions, n_sink).to(&Device::Cpu);
        let want: Vec<f32> = scores.f32().iter().enumerate().map(|(i, &s)| if i / heads % t < n_sink { 0.0 } else { s }).collect();
        check.require("gradient of marked sinks", same_bits(&dscores, &want));
    }
}

fn same_bits(x: &Tensor, want: &[f32]) -> bool {
    x.f32().iter().map(|x| x.to_bits()).eq(want.iter().map(|x| x.to_bits()))
}
