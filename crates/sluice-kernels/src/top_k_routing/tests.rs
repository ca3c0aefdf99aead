use sluice_tensor::Tensor;
use sluice_testkit::Rng;

use super::*;

/// Scores of one head of one sequence.
fn column(scores: &Tensor, b: usize, head: usize, len: usize) -> Vec<f32> {
    let [_, t, g] = scores.dims();
    (0..len).map(|j| scores.f32()[(b * t + j) * g + head]).collect()
}

/// Few distinct values make ties, -0.0 among them.
fn tied_scores(rng: &mut Rng, shape: [usize; 3], levels: usize) -> Tensor {
    let n = shape.iter().product();
    Tensor::from_vec(
        (0..n).map(|_| (rng.below(levels) as f32 - (levels / 2) as f32) * if rng.below(2) == 0 { 1.0 } else { -1.0 }).collect(),
        shape,
    )
}

fn random_budget(rng: &mut Rng) -> Budget {
    Budget { window: 1 + rng.below(20), top_k: rng.below(24), route_every: 1 + rng.below(17), n_sink: rng.below(6) }
}

#[track_caller]
fn check_causal(scores: &Tensor, lens: &[usize], budget: &Budget) {
    let [batch, t, g] = scores.dims();
    let routing = route(scores, lens, budget);
    assert_eq!(routing.n_blocks, t.div_ceil(budget.route_every));
    for b in 0..batch {
        for head in 0..g {
            let column = column(scores, b, head, t);
            for block in 0..routing.n_blocks {
                let want = if block * budget.route_every < lens[b] {
                    naive::causal_block(&column, block, budget)
                } else {
                    (vec![], f32::NEG_INFINITY)
                };
                let got = (routing.routed(b, block, head).to_vec(), routing.tau_of(b, block, head));
                assert_eq!(got, want, "sequence {b}, block {block}, head {head}, {budget:?}");
                assert!(got.0.iter().all(|&j| (j as usize) < lens[b]), "a padded position was kept");
            }
        }
    }
}

#[test]
fn streaming_heap_is_the_prefix_top_k() {
    let mut rng = Rng::new(1);
    for case in 0..200 {
        let (batch, t, g) = (1 + rng.below(3), 1 + rng.below(120), 1 + rng.below(3));
        let budget = random_budget(&mut rng);
        let scores = if case % 2 == 0 { rng.normal_tensor([batch, t, g]) } else { tied_scores(&mut rng, [batch, t, g], 5) };
        let lens: Vec<usize> = (0..batch).map(|_| rng.below(t + 1)).collect();
        check_causal(&scores, &lens, &budget);
    }
}

/// Fact 1: `R_b = top_k(R_{b-1} + [l_{b-1}, l_b))`.
#[test]
fn a_block_needs_only_the_previous_kept_set_and_the_new_candidates() {
    let mut rng = Rng::new(2);
    for _ in 0..50 {
        let budget = random_budget(&mut rng);
        let scores = tied_scores(&mut rng, [1, 150, 1], 9);
        let routing = route(&scores, &[150], &budget);
        let all = column(&scores, 0, 0, 150);
        for block in 1..routing.n_blocks {
            let (from, to) = (budget.n_candidates(block - 1), budget.n_candidates(block));
            let mut pool: Vec<usize> = routing.routed(0, block - 1, 0).iter().map(|&j| j as usize).collect();
            pool.extend(from..to);
            // Everything outside the pool is forbidden, the order inside it is the same.
            let mut restricted = vec![f32::NEG_INFINITY; to];
            for &j in &pool {
                restricted[j] = all[j];
            }
            let (mut want, _) = naive::keep_best(&restricted, &budget);
            want.retain(|j| pool.contains(&(*j as usize)));
            assert_eq!(routing.routed(0, block, 0), want, "block {block}, {budget:?}");
        }
    }
}

/// Fact 3: a constant gate keeps the sinks and the most recent candidates, which is StreamingLLM.
#[test]
fn constant_gate_keeps_sinks_and_recency() {
    for budget in [
        Budget { window: 8, top_k: 12, route_every: 4, n_sink: 4 },
        Budget { window: 1, top_k: 5, route_every: 1, n_sink: 2 },
        Budget { window: 64, top_k: 20, route_every: 16, n_sink: 0 },
    ] {
        let routing = route(&Tensor::full(0.25, [1, 200, 2]), &[200], &budget);
        for block in 0..routing.n_blocks {
            let n = budget.n_candidates(block);
            let sinks = budget.n_sink.min(n);
            let recent = (n - sinks).min(budget.top_k - budget.n_sink);
            let want: Vec<i32> = (0..sinks).chain(n - recent..n).map(|j| j as i32).collect();
            assert_eq!(routing.routed(0, block, 1), want, "block {block}, {budget:?}");
        }
    }
}

/// Fact 3: with `k >= T` every position before the local part is kept, so a query sees the whole prefix.
#[test]
fn budget_above_the_length_keeps_everything() {
    let budget = Budget { window: 7, top_k: 1000, route_every: 8, n_sink: 4 };
    let routing = route(&Rng::new(3).normal_tensor([1, 100, 2]), &[100], &budget);
    for block in 0..routing.n_blocks {
        let want: Vec<i32> = (0..budget.n_candidates(block) as i32).collect();
        assert_eq!(routing.routed(0, block, 0), want);
        assert_eq!(routing.tau_of(0, block, 0), f32::NEG_INFINITY);
    }
    assert!(routing.n_routed < 100, "places that no block can fill are not stored");
}

/// Fact 5: with random scores about `k (1 + ln((T - w) / k))` candidates are admitted.
#[test]
fn random_scores_are_admitted_as_often_as_the_records_of_a_random_sequence() {
    let (t, heads) = (8192, 16);
    let budget = Budget { window: 128, top_k: 256, route_every: 64, n_sink: 4 };
    let mut state = RouterState::new(heads, budget);
    state.route_chunk(Rng::new(5).normal_tensor([t, heads]).f32());
    let mean = (0..heads).map(|h| state.admissions(h) as f64).sum::<f64>() / heads as f64;
    let k = budget.top_k as f64;
    let want = k * (1.0 + ((t - budget.window) as f64 / k).ln());
    assert!((mean / want - 1.0).abs() < 0.05, "{mean} admissions, expected about {want}");
}

#[test]
fn any_chunking_gives_the_routing_of_the_whole() {
    let mut rng = Rng::new(4);
    for _ in 0..150 {
        let (t, g) = (1 + rng.below(150), 1 + rng.below(3));
        let budget = random_budget(&mut rng);
        let scores = tied_scores(&mut rng, [1, t, g], 7);
        let whole = route(&scores, &[t], &budget);
        let mut state = RouterState::new(g, budget);
        while state.position() < t {
            let start = state.position();
            let n = rng.below((t - start).min(40) + 1);
            let chunk = state.route_chunk(&scores.f32()[start * g..(start + n) * g]);
            assert_eq!(chunk.first_block, start / budget.route_every);
            assert_eq!(chunk.n_blocks, if n == 0 { 0 } else { (start + n - 1) / budget.route_every - start / budget.route_every + 1 });
            assert_eq!(chunk.positions.len(), chunk.n_blocks * g * budget.top_k);
            for block in 0..chunk.n_blocks {
                for head in 0..g {
                    let at = block * g + head;
                    let mut want = whole.routed(0, chunk.first_block + block, head).to_vec();
                    want.resize(budget.top_k, -1);
                    assert_eq!(chunk.positions[at * budget.top_k..(at + 1) * budget.top_k], want, "positions {start}..{}", start + n);
                    assert_eq!(chunk.tau[at], whole.tau_of(0, chunk.first_block + block, head));
                }
            }
        }
    }
}

/// Fact 2: what a router remembers is bounded by the budget, for any length of text.
#[test]
fn state_stays_within_the_budget() {
    let budget = Budget { window: 16, top_k: 8, route_every: 4, n_sink: 2 };
    let mut state = RouterState::new(2, budget);
    let mut rng = Rng::new(6);
    for _ in 0..500 {
        state.route_chunk(&[rng.normal(), rng.normal()]);
        assert!(state.kept(0).len() <= budget.top_k);
        let local = state.position() - budget.n_candidates((state.position() - 1) / budget.route_every);
        assert!(local < budget.window + budget.route_every, "{local} local keys");
        assert!(state.waiting_positions() < budget.window + budget.route_every);
    }
}

#[test]
fn ties_go_to_the_larger_index_and_sinks_beat_everything() {
    let budget = Budget { window: 1, top_k: 3, route_every: 1, n_sink: 1 };
    let scores = Tensor::from_vec(vec![-9.0, 1.0, 2.0, 1.0, -0.0, 0.0, 1.0, f32::NAN, 5.0], [1, 9, 1]);
    let routing = route(&scores, &[9], &budget);
    assert_eq!(routing.routed(0, 4, 0), [0, 2, 3], "of the equal 1 and 3, 3 stays");
    assert_eq!(routing.routed(0, 8, 0), [0, 2, 6]);
    assert_eq!(routing.tau_of(0, 8, 0), 1.0);
    assert_eq!(routing.routed(0, 2, 0), [0, 1]);
    assert_eq!(routing.tau_of(0, 2, 0), f32::NEG_INFINITY);
}

#[test]
fn no_routed_keys_and_empty_sequences_are_fine() {
    let budget = Budget { window: 2, top_k: 0, route_every: 3, n_sink: 4 };
    let routing = route(&Tensor::zeros([1, 10, 2]), &[10], &budget);
    assert!(routing.indices.is_empty());
    assert!(routing.tau.iter().all(|&tau| tau == f32::NEG_INFINITY));
    assert!(route(&Tensor::zeros([2, 0, 2]), &[0, 0], &Budget { top_k: 4, ..budget }).indices.is_empty());
}

#[test]
fn bidirectional_keeps_the_best_of_the_unpadded() {
    let mut rng = Rng::new(7);
    for _ in 0..50 {
        let (t, g) = (1 + rng.below(60), 1 + rng.below(3));
        let budget = random_budget(&mut rng);
        let scores = tied_scores(&mut rng, [2, t, g], 7);
        let lens = [rng.below(t + 1), t];
        let routing = route_bidirectional(&scores, &lens, &budget);
        assert_eq!((routing.n_blocks, routing.visibility), (1, Visibility::Bidirectional));
        for b in 0..2 {
            for head in 0..g {
                let (kept, tau) = naive::keep_best(&column(&scores, b, head, lens[b]), &budget);
                assert_eq!((routing.routed(b, 0, head), routing.tau_of(b, 0, head)), (&kept[..], tau));
            }
        }
    }
}

#[test]
fn blockwise_scores_that_do_not_change_give_the_streaming_routing() {
    let mut rng = Rng::new(8);
    for _ in 0..50 {
        let (t, g) = (1 + rng.below(90), 1 + rng.below(3));
        let budget = random_budget(&mut rng);
        let scores = tied_scores(&mut rng, [2, t, g], 7);
        let lens = [rng.below(t + 1), t];
        let blockwise = route_blockwise(2, t, g, &lens, &budget, |b, _, head, out| {
            for (j, s) in out.iter_mut().enumerate() {
                *s = scores.f32()[(b * t + j) * g + head];
            }
        });
        assert_eq!(blockwise, route(&scores, &lens, &budget));
    }
}

#[test]
fn blockwise_scores_may_change_from_block_to_block() {
    let budget = Budget { window: 1, top_k: 1, route_every: 1, n_sink: 0 };
    // Block b prefers position b / 2, which no streaming router could.
    let routing = route_blockwise(1, 10, 1, &[10], &budget, |_, block, _, out| {
        out.iter_mut().enumerate().for_each(|(j, s)| *s = f32::from(j == block / 2))
    });
    for block in 1..10 {
        assert_eq!(routing.routed(0, block, 0), [block as i32 / 2]);
    }
}

#[test]
fn mark_sinks_touches_the_first_positions_only() {
    let scores = Rng::new(9).normal_tensor([2, 4, 2]);
    let marked = mark_sinks(&scores, &[2, 3, 4, 5], 4);
    for (i, (m, s)) in marked.f32().iter().zip(scores.f32()).enumerate() {
        assert_eq!(*m, if i / 2 % 4 < 2 { f32::INFINITY } else { *s });
    }
    assert!(mark_sinks(&scores, &[4, 5, 6, 7], 4).shares_storage_with(&scores));
}

#[test]
#[should_panic(expected = "lengths [11] exceed the 10 rows")]
fn lengths_beyond_the_rows_are_refused() {
    route(&Tensor::zeros([1, 10, 1]), &[11], &Budget { window: 1, top_k: 1, route_every: 1, n_sink: 0 });
}

#[test]
fn an_overhang_adds_the_next_best_keys_under_the_threshold_of_the_budget() {
    let scores = Rng::new(11).normal_tensor([1, 200, 2]);
    let budget = Budget { window: 8, top_k: 16, route_every: 8, n_sink: 2 };
    let narrow = route(&scores, &[200], &budget);
    let wide = route_with_overhang(&scores, &[200], &budget, 10).download();
    assert_eq!((wide.n_routed, &wide.tau), (26, &narrow.tau));
    let (kept, let_in) = (narrow.routed(0, 24, 1), wide.routed(0, 24, 1));
    assert_eq!(let_in.len(), 26);
    assert!(kept.iter().all(|j| let_in.contains(j)));
    let tau = narrow.tau_of(0, 24, 1);
    let score = |j: &&i32| scores.f32()[**j as usize * 2 + 1];
    assert!(let_in.iter().filter(|j| !kept.contains(j)).all(|j| score(&j) < tau));
}
