//! The specification: sort all candidates of a block, keep the first `k`.

use super::Budget;

/// Kept positions (ascending) and `tau` of one block and head, given the scores of its candidates `0..scores.len()`.
pub(super) fn keep_best(scores: &[f32], budget: &Budget) -> (Vec<i32>, f32) {
    let score = |j: usize| if j < budget.n_sink { f32::INFINITY } else { scores[j] };
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| score(b).partial_cmp(&score(a)).expect("no NaN in the tests").then(b.cmp(&a)));
    let tau = if budget.top_k > 0 && order.len() >= budget.top_k { score(order[budget.top_k - 1]) } else { f32::NEG_INFINITY };
    order.truncate(budget.top_k);
    order.sort_unstable();
    (order.into_iter().map(|j| j as i32).collect(), tau)
}

/// Kept positions and `tau` of a causal block, from the scores of its whole sequence.
pub(super) fn causal_block(scores: &[f32], block: usize, budget: &Budget) -> (Vec<i32>, f32) {
    let first_local = (block as i64 * budget.route_every as i64 - budget.window as i64 + 1).max(0) as usize;
    keep_best(&scores[..first_local], budget)
}
