//! The causal router as a stream: a bounded heap per KV head that sees every candidate once.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};

use super::{Budget, effective};

/// What a router remembers between chunks: per head the kept set, and the scores that are still local.
/// Its size depends on the budget alone, never on the length of the text.
#[derive(Clone, Debug)]
pub struct RouterState {
    budget: Budget,
    heads: Vec<Kept>,
    /// `[n, G]` scores of the positions `n_candidates .. position`, which are not candidates yet.
    waiting: VecDeque<f32>,
    /// Positions that have been offered to the heaps.
    n_candidates: usize,
    position: usize,
}

/// Routing of the blocks that a chunk touches.
#[derive(Clone, Debug, PartialEq)]
pub struct ChunkRouting {
    /// Block of the chunk's first position.
    pub first_block: usize,
    /// Blocks touched; 0 for an empty chunk.
    pub n_blocks: usize,
    /// `[n_blocks, G, top_k]` kept positions, ascending, padded with -1 at the end.
    pub positions: Vec<i32>,
    /// `[n_blocks, G]` the k-th best score, -inf while there are fewer candidates than that.
    pub tau: Vec<f32>,
}

impl RouterState {
    /// A router at position 0.
    #[track_caller]
    pub fn new(n_kv_heads: usize, budget: Budget) -> Self {
        budget.check();
        Self { budget, heads: vec![Kept::default(); n_kv_heads], waiting: VecDeque::new(), n_candidates: 0, position: 0 }
    }

    /// Tokens seen.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The budget that it keeps to.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Positions that a head keeps for the block in progress, ascending.
    pub fn kept(&self, head: usize) -> &[i32] {
        &self.heads[head].ascending
    }

    /// How many candidates a head has admitted so far; those that it evicted again are counted too.
    pub fn admissions(&self, head: usize) -> u64 {
        self.heads[head].admissions
    }

    /// Positions whose scores wait to become candidates.
    #[cfg(test)]
    pub(super) fn waiting_positions(&self) -> usize {
        self.waiting.len() / self.heads.len()
    }

    /// Take the scores `[t, G]` of the next `t` positions and route every block that they touch.
    /// A chunk may start and end anywhere; a block in progress keeps its routing.
    #[track_caller]
    pub fn route_chunk(&mut self, scores: &[f32]) -> ChunkRouting {
        let (g, k, r) = (self.heads.len(), self.budget.top_k, self.budget.route_every);
        assert!(scores.len().is_multiple_of(g.max(1)), "route_chunk: {} scores for {g} heads", scores.len());
        let end = self.position + scores.len() / g.max(1);
        let first_block = self.position / r;
        let n_blocks = if end == self.position { 0 } else { end.div_ceil(r) - first_block };
        let mut positions = vec![-1; n_blocks * g * k];
        let mut tau = vec![f32::NEG_INFINITY; n_blocks * g];
        self.advance(scores, k, &mut positions, &mut tau);
        ChunkRouting { first_block, n_blocks, positions, tau }
    }

    /// [`Self::route_chunk`] into `positions [n_blocks, G, n_routed]` (filled with -1) and `tau [n_blocks, G]`.
    pub(super) fn advance(&mut self, scores: &[f32], n_routed: usize, positions: &mut [i32], tau: &mut [f32]) {
        let g = self.heads.len();
        if scores.is_empty() {
            return;
        }
        let start = self.position;
        let end = start + scores.len() / g;
        let first_block = start / self.budget.route_every;
        for block in first_block..end.div_ceil(self.budget.route_every) {
            // For the block in progress this admits nothing: its candidates were complete when it began.
            self.admit_before(self.budget.n_candidates(block), start, scores);
            for (head, kept) in self.heads.iter().enumerate() {
                let at = (block - first_block) * g + head;
                positions[at * n_routed..][..kept.ascending.len()].copy_from_slice(&kept.ascending);
                tau[at] = kept.tau(self.budget.top_k);
            }
        }
        let seen_in_chunk = self.n_candidates.saturating_sub(start);
        self.waiting.extend(&scores[seen_in_chunk * g..]);
        self.position = end;
    }

    /// Offer the positions `n_candidates..end` to the heaps; `scores` are those from `start` on.
    fn admit_before(&mut self, end: usize, start: usize, scores: &[f32]) {
        let g = self.heads.len();
        while self.n_candidates < end {
            let position = self.n_candidates;
            for (head, kept) in self.heads.iter_mut().enumerate() {
                let score = if position < start {
                    self.waiting.pop_front().expect("a score waits for every position before the chunk")
                } else {
                    scores[(position - start) * g + head]
                };
                kept.offer(effective(score, position, self.budget.n_sink), position as i32, self.budget.top_k);
            }
            self.n_candidates += 1;
        }
    }
}

/// The kept set of one head.
#[derive(Clone, Debug, Default)]
struct Kept {
    /// The worst member on top.
    heap: BinaryHeap<Reverse<Candidate>>,
    /// The same positions in ascending order. Candidates arrive in order, so a new one is always the last.
    ascending: Vec<i32>,
    admissions: u64,
}

impl Kept {
    fn offer(&mut self, score: f32, position: i32, top_k: usize) {
        let candidate = Candidate { score, position };
        if self.heap.len() == top_k {
            match self.heap.peek_mut() {
                Some(mut worst) if worst.0 < candidate => {
                    let at = self.ascending.binary_search(&worst.0.position).expect("both views hold the same positions");
                    self.ascending.remove(at);
                    *worst = Reverse(candidate);
                }
                _ => return,
            }
        } else {
            self.heap.push(Reverse(candidate));
        }
        self.ascending.push(position);
        self.admissions += 1;
    }

    fn tau(&self, top_k: usize) -> f32 {
        match self.heap.peek() {
            Some(worst) if self.heap.len() == top_k => worst.0.score,
            _ => f32::NEG_INFINITY,
        }
    }
}

/// Ordered by score, ties to the larger position.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) score: f32,
    pub(super) position: i32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(self.position.cmp(&other.position))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}
