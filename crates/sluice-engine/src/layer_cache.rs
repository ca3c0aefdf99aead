//! Bounded cache of one layer: slots for admitted keys, a strip of recent ones that are not decided yet.
//!
//! The router decides at the start of a block: what has left the window since the last block is offered to the slots,
//! each slot's key is the worst of them at most once, and what is not admitted is gone. Scores never change, so this is
//! exactly the prefix top-k. At most `top_k + window + route_every - 1` keys are held at any moment.

use std::cmp::Ordering;
use std::collections::VecDeque;

use sluice_kernels::cached_attention::{self, Departure, Head, HeadShape};
use sluice_kernels::routed_attention::GateBias;
use sluice_kernels::worker_team::WorkerTeam;
use sluice_spec::{ModelConfig, RoutingConfig};

/// Keys, values and scores that one layer keeps of a sequence.
#[derive(Clone)]
pub(crate) struct LayerCache {
    pub(crate) shape: HeadShape,
    n_heads: usize,
    routing: RoutingConfig,
    /// `[G, D, rows]`.
    pub(crate) keys: Vec<u16>,
    /// `[G, rows, width]`.
    pub(crate) values: Vec<u16>,
    /// `[G, top_k]` positions and scores of the slots in use.
    pub(crate) slot_positions: Vec<u32>,
    pub(crate) slot_scores: Vec<f32>,
    /// Slots in use, the same for every head.
    pub(crate) n_slots: usize,
    /// `[G, top_k]` the slots as a heap, once all are in use: the one to give up next is the first.
    heaps: Vec<u32>,
    /// `[G, strip]` rows of the strip that the last decision admitted, and their slots; of each head the first `n_admitted [G]`.
    admitted: Vec<(u32, u32)>,
    n_admitted: Vec<usize>,
    /// `[G, top_k]` biases of the block in progress, when the gate keeps its temperature.
    bias: Vec<f32>,
    /// `[strip, G]`.
    pub(crate) strip_scores: Vec<f32>,
    /// Position of the strip's first key.
    pub(crate) strip_start: usize,
    pub(crate) strip_len: usize,
    /// Keys admitted so far, evicted ones included.
    pub(crate) admissions: u64,
    /// `[T, G]` scores of the next positions, given from outside. Empty but in comparisons.
    pub(crate) replayed: VecDeque<f32>,
}

impl LayerCache {
    pub(crate) fn new(model: &ModelConfig, routing: &RoutingConfig) -> Self {
        let shape = Self::shape_of(model, routing);
        let g = model.n_kv_heads;
        let has_bias = routing.gate_temperature > 0.0;
        Self {
            shape,
            n_heads: g,
            routing: *routing,
            keys: vec![0; g * shape.key_len()],
            values: vec![0; g * shape.value_len()],
            slot_positions: vec![0; g * routing.top_k],
            slot_scores: vec![0.0; g * routing.top_k],
            n_slots: 0,
            heaps: vec![0; g * routing.top_k],
            admitted: vec![(0, 0); g * shape.strip],
            n_admitted: vec![0; g],
            bias: vec![0.0; if has_bias { g * routing.top_k } else { 0 }],
            strip_scores: vec![0.0; shape.strip * g],
            strip_start: 0,
            strip_len: 0,
            admissions: 0,
            replayed: VecDeque::new(),
        }
    }

    /// Where the strip begins after `position` tokens: at the first key that the last block's queries see locally.
    pub(crate) fn strip_start_at(&self, position: usize) -> usize {
        let r = self.routing.route_every;
        let block = position.saturating_sub(1) / r * r;
        (block + 1).saturating_sub(self.routing.window)
    }

    /// Forget everything; the room stays.
    pub(crate) fn clear(&mut self) {
        // What remains in free rows is finite, which is all that attention asks of them.
        (self.n_slots, self.strip_start, self.strip_len, self.admissions) = (0, 0, 0, 0);
        self.replayed.clear();
    }

    /// Become `other`, a cache of the same shape, without allocating.
    pub(crate) fn copy_from(&mut self, other: &Self) {
        self.keys.copy_from_slice(&other.keys);
        self.values.copy_from_slice(&other.values);
        self.slot_positions.copy_from_slice(&other.slot_positions);
        self.slot_scores.copy_from_slice(&other.slot_scores);
        self.heaps.copy_from_slice(&other.heaps);
        self.bias.copy_from_slice(&other.bias);
        self.strip_scores.copy_from_slice(&other.strip_scores);
        (self.n_slots, self.strip_start, self.strip_len) = (other.n_slots, other.strip_start, other.strip_len);
        self.admissions = other.admissions;
        self.replayed.clone_from(&other.replayed);
    }

    /// Keys of one head that were offered to the slots and are gone.
    pub(crate) fn evicted(&self) -> usize {
        self.strip_start - self.n_slots
    }

    /// Sizes of a head's cache.
    pub(crate) fn shape_of(model: &ModelConfig, routing: &RoutingConfig) -> HeadShape {
        HeadShape { head_dim: model.head_dim, top_k: routing.top_k, strip: routing.window + routing.route_every - 1 }
    }

    /// Bytes of keys and values.
    pub(crate) fn bytes(&self) -> usize {
        2 * (self.keys.len() + self.values.len())
    }

    /// Continue by `n` positions of one block, the first of them `position`, with a head for each job of the team, or on this thread alone.
    /// Each of the `n` rows of `kv` ends with the position's keys and values, `2 G D` numbers; scores are `[n, G]`, or one for all heads. A
    /// replayed score takes the place of the given one. Where a block begins, the router decides first.
    pub(crate) fn extend(&mut self, team: Option<&mut WorkerTeam>, position: usize, n: usize, kv: &[f32], scores: &[f32]) {
        let (shape, d, g) = (self.shape, self.shape.head_dim, self.n_heads);
        let gone = if position.is_multiple_of(self.routing.route_every) { self.decide(position) } else { 0 };
        let left = self.strip_len;
        scores.chunks_exact(scores.len() / n).for_each(|scores| self.append_scores(scores));
        let width = kv.len() / n;
        let (admitted, n_admitted) = (&self.admitted, &self.n_admitted);
        let one_head = |head: usize, keys: &mut [u16], values: &mut [u16]| {
            let admitted = &admitted[head * shape.strip..][..n_admitted[head]];
            Departure { admitted, n: gone, left }.apply(shape, keys, values);
            let tokens = kv.chunks_exact(width).map(|kv| {
                let (keys, values) = kv[width - 2 * g * d..].split_at(g * d);
                (&keys[head * d..(head + 1) * d], &values[head * d..(head + 1) * d])
            });
            cached_attention::write_rows(shape, keys, values, shape.strip_row() + left, tokens);
        };
        let (key_len, value_len) = (shape.key_len(), shape.value_len());
        match team {
            Some(team) => team.for_each_chunk_pair((&mut self.keys, key_len), (&mut self.values, value_len), one_head),
            None => {
                let heads = self.keys.chunks_exact_mut(key_len).zip(self.values.chunks_exact_mut(value_len));
                heads.enumerate().for_each(|(head, (keys, values))| one_head(head, keys, values));
            }
        }
    }

    /// Decide about the keys that the queries of the block at `start` no longer see locally, the first ones of the strip. Returns how many;
    /// keys and values are still to be moved.
    fn decide(&mut self, start: usize) -> usize {
        let first_local = (start + 1).saturating_sub(self.routing.window);
        let n = first_local.saturating_sub(self.strip_start).min(self.strip_len);
        self.n_admitted.fill(0);
        (0..n).for_each(|row| self.offer(row));
        self.strip_scores.copy_within(n * self.n_heads..self.strip_len * self.n_heads, 0);
        self.strip_start += n;
        self.strip_len -= n;
        self.set_bias();
        n
    }

    /// Offer the key in a row of the strip to the slots of every head.
    fn offer(&mut self, row: usize) {
        let (g, k) = (self.n_heads, self.shape.top_k);
        let position = (self.strip_start + row) as u32;
        if k == 0 {
            return;
        }
        let n_slots = self.n_slots;
        for head in 0..g {
            let score = self.effective(self.strip_scores[row * g + head], position);
            let slots = head * k..(head + 1) * k;
            let slot = if n_slots < k {
                n_slots
            } else {
                let worst = self.heaps[head * k] as usize;
                let held = (self.slot_scores[head * k + worst], self.slot_positions[head * k + worst]);
                if order((score, position), held) == Ordering::Less {
                    continue;
                }
                worst
            };
            self.admitted[head * self.shape.strip + self.n_admitted[head]] = (row as u32, slot as u32);
            self.n_admitted[head] += 1;
            self.slot_scores[head * k + slot] = score;
            self.slot_positions[head * k + slot] = position;
            self.admissions += 1;
            let (heap, scores, positions) = (&mut self.heaps[slots.clone()], &self.slot_scores[slots.clone()], &self.slot_positions[slots]);
            match (n_slots + 1).cmp(&k) {
                Ordering::Less => {}
                Ordering::Equal => make_heap(heap, scores, positions),
                Ordering::Greater => sift_down(heap, 0, scores, positions),
            }
        }
        self.n_slots = (n_slots + 1).min(k);
    }

    /// A score as the order sees it: sinks are +inf, NaN loses to everything, -0 equals 0.
    fn effective(&self, score: f32, position: u32) -> f32 {
        if (position as usize) < self.routing.n_sink {
            f32::INFINITY
        } else if score.is_nan() {
            f32::NEG_INFINITY
        } else {
            score + 0.0
        }
    }

    fn set_bias(&mut self) {
        let k = self.shape.top_k;
        if self.bias.is_empty() {
            return;
        }
        for head in 0..self.n_heads {
            let tau = if self.n_slots == k { self.slot_scores[head * k + self.heaps[head * k] as usize] } else { f32::NEG_INFINITY };
            for slot in head * k..head * k + self.n_slots {
                self.bias[slot] = GateBias::of(self.slot_scores[slot], tau, self.routing.gate_temperature).0;
            }
        }
    }

    fn append_scores(&mut self, scores: &[f32]) {
        let row = self.strip_len;
        assert!(row < self.shape.strip, "a key does not fit behind the {row} of a strip; was its block begun?");
        for head in 0..self.n_heads {
            self.strip_scores[row * self.n_heads + head] = self.replayed.pop_front().unwrap_or(scores[head % scores.len()]);
        }
        self.strip_len += 1;
    }

    /// A head's cache for attention.
    pub(crate) fn head(&self, head: usize) -> Head<'_> {
        let (k, v, top_k) = (self.shape.key_len(), self.shape.value_len(), self.shape.top_k);
        Head {
            shape: self.shape,
            keys: &self.keys[head * k..(head + 1) * k],
            values: &self.values[head * v..(head + 1) * v],
            n_slots: self.n_slots,
            bias: (!self.bias.is_empty()).then(|| &self.bias[head * top_k..][..self.n_slots]),
        }
    }

    /// Rows of the strip that a query at `position` sees.
    pub(crate) fn seen_by(&self, position: usize) -> usize {
        position + 1 - self.strip_start
    }

    /// Positions that any head holds, in no order, some of them more than once.
    pub(crate) fn held_positions(&self) -> impl Iterator<Item = usize> + '_ {
        let slots = self.slot_positions.chunks(self.shape.top_k.max(1)).flat_map(|head| &head[..self.n_slots]);
        slots.map(|&position| position as usize).chain(self.strip_start..self.strip_start + self.strip_len)
    }

    /// Positions that a head holds, ascending.
    pub(crate) fn kept_positions(&self, head: usize) -> Vec<u32> {
        let k = self.shape.top_k;
        let mut kept = self.slot_positions[head * k..][..self.n_slots].to_vec();
        kept.extend((self.strip_start..self.strip_start + self.strip_len).map(|p| p as u32));
        kept.sort_unstable();
        kept
    }

    /// What follows from the slots, after they were read from a snapshot.
    pub(crate) fn rebuild(&mut self) {
        let k = self.shape.top_k;
        if self.n_slots == k && k > 0 {
            for head in 0..self.n_heads {
                let slots = head * k..(head + 1) * k;
                make_heap(&mut self.heaps[slots.clone()], &self.slot_scores[slots.clone()], &self.slot_positions[slots]);
            }
        }
        self.set_bias();
    }
}

/// By score, ties to the larger position.
fn order(a: (f32, u32), b: (f32, u32)) -> Ordering {
    a.0.total_cmp(&b.0).then(a.1.cmp(&b.1))
}

/// Order all slots as a heap, the least by [`order`] first.
fn make_heap(heap: &mut [u32], scores: &[f32], positions: &[u32]) {
    heap.iter_mut().zip(0..).for_each(|(place, slot)| *place = slot);
    for place in (0..heap.len() / 2).rev() {
        sift_down(heap, place, scores, positions);
    }
}

/// Move the slot at a place of the heap down until none below it is less.
fn sift_down(heap: &mut [u32], mut place: usize, scores: &[f32], positions: &[u32]) {
    let key = |slot: u32| (scores[slot as usize], positions[slot as usize]);
    let less = |a: u32, b: u32| order(key(a), key(b)) == Ordering::Less;
    let slot = heap[place];
    loop {
        let mut child = 2 * place + 1;
        if child >= heap.len() {
            break;
        }
        if child + 1 < heap.len() && less(heap[child + 1], heap[child]) {
            child += 1;
        }
        if !less(heap[child], slot) {
            break;
        }
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = slot;
}

#[cfg(test)]
mod tests {
    use sluice_kernels::top_k_routing::{Budget, RouterState};
    use sluice_spec::{Architecture, GateHeads};
    use sluice_testkit::{Rng, small_model};

    use super::*;

    fn model(g: usize) -> ModelConfig {
        ModelConfig {
            n_layers: 1,
            d_model: 4,
            d_ff: 4,
            n_heads: g,
            n_kv_heads: g,
            head_dim: 2,
            vocab_size: 8,
            max_seq_len: 64,
            ..small_model(Architecture::Llama)
        }
    }

    /// Against the float model's router, with ties, NaN and every shape of budget.
    #[test]
    fn keeps_what_the_router_of_the_float_model_keeps() {
        let g = 3;
        for (window, top_k, route_every, n_sink) in
            [(8, 5, 4, 2), (1, 7, 1, 0), (16, 32, 64, 4), (3, 0, 2, 4), (5, 1, 3, 1), (2, 400, 8, 4)]
        {
            let routing = RoutingConfig { window, top_k, route_every, n_sink, gate_heads: GateHeads::KvHead, gate_temperature: 0.0 };
            let mut cache = LayerCache::new(&model(g), &routing);
            let mut router = RouterState::new(g, Budget { window, top_k, route_every, n_sink });
            let mut rng = Rng::new(3);
            for t in 0..500 {
                let score = |rng: &mut Rng| if rng.below(40) == 0 { f32::NAN } else { rng.below(30) as f32 };
                let scores: Vec<f32> = (0..g).map(|_| score(&mut rng)).collect();
                router.route_chunk(&scores);
                // The key tells its position and head, so that a wrong row is seen.
                let key: Vec<f32> = (0..g).flat_map(|head| [t as f32, head as f32]).collect();
                cache.extend(None, t, 1, &[&key[..], &key].concat(), &scores);
                for head in 0..g {
                    let mut want: Vec<u32> = router.kept(head).iter().map(|&p| p as u32).collect();
                    let mut slots = cache.slot_positions[head * top_k..][..cache.n_slots].to_vec();
                    slots.sort_unstable();
                    assert_eq!(slots, want, "slots of head {head} at {t} for {routing:?}");
                    let first_local = (t / route_every * route_every + 1).saturating_sub(window) as u32;
                    want.extend(first_local..=t as u32);
                    assert_eq!(cache.kept_positions(head), want, "head {head} at {t} for {routing:?}");
                    assert!(want.len() <= routing.cached_keys());
                    let h = cache.head(head);
                    for slot in 0..cache.n_slots {
                        let held = half_to_f32(h.keys[slot]);
                        assert_eq!(held as u32, cache.slot_positions[head * top_k + slot]);
                        assert_eq!(half_to_f32(h.values[slot * cache.shape.value_width() + 1]) as usize, head);
                    }
                }
            }
        }
    }

    #[test]
    fn replayed_scores_decide_in_place_of_the_given_ones() {
        let routing = RoutingConfig { window: 8, top_k: 5, route_every: 4, n_sink: 1, ..RoutingConfig::default() };
        let (mut given, mut replayed) = (LayerCache::new(&model(2), &routing), LayerCache::new(&model(2), &routing));
        let mut rng = Rng::new(9);
        for t in 0..200 {
            let scores = [rng.normal(), rng.normal()];
            // The last ones are not replayed: the given ones count again.
            let other = if t < 150 { [0.0; 2] } else { scores };
            if t < 150 {
                replayed.replayed.extend(scores);
            }
            for (cache, scores) in [(&mut given, scores), (&mut replayed, other)] {
                cache.extend(None, t, 1, &[0.0; 8], &scores);
            }
            assert!((0..2).all(|head| given.kept_positions(head) == replayed.kept_positions(head)), "at {t}");
        }
        assert_ne!(given.slot_positions, [0; 10]);
    }

    /// Pieces of blocks on a team, against one position after the other on one thread: all that a later pass reads.
    #[test]
    fn pieces_on_any_number_of_threads_leave_what_single_positions_leave() {
        let (g, d) = (3, 20);
        let model = ModelConfig { head_dim: d, ..model(g) };
        for (top_k, gate_temperature) in [(12, 0.5), (200, 0.0), (0, 0.0)] {
            let routing = RoutingConfig { window: 9, top_k, route_every: 8, n_sink: 2, gate_heads: GateHeads::KvHead, gate_temperature };
            let mut single = LayerCache::new(&model, &routing);
            let mut rng = Rng::new(4);
            let n = 150;
            // Rows are wider than keys and values, as those of the projections are; scores have ties.
            let kv: Vec<f32> = (0..n * (2 * g * d + 5)).map(|_| rng.normal()).collect();
            let scores: Vec<f32> = (0..n * g).map(|_| rng.below(20) as f32).collect();
            let (kv, scores): (Vec<_>, Vec<_>) = (kv.chunks_exact(2 * g * d + 5).collect(), scores.chunks_exact(g).collect());
            for t in 0..n {
                single.extend(None, t, 1, kv[t], scores[t]);
            }
            for threads in [1, 2, 3, 5] {
                let mut team = WorkerTeam::new(threads);
                let (mut cache, mut t) = (LayerCache::new(&model, &routing), 0);
                while t < n {
                    let piece = (1 + rng.below(8)).min(8 - t % 8).min(n - t);
                    cache.extend(Some(&mut team), t, piece, &kv[t..t + piece].concat(), &scores[t..t + piece].concat());
                    t += piece;
                }
                assert_eq!((cache.n_slots, cache.strip_start, cache.strip_len), (single.n_slots, single.strip_start, single.strip_len));
                assert_eq!(cache.admissions, single.admissions);
                assert_eq!(cache.strip_scores[..cache.strip_len * g], single.strip_scores[..cache.strip_len * g]);
                for head in 0..g {
                    let slots = head * top_k..head * top_k + cache.n_slots;
                    assert_eq!(cache.slot_positions[slots.clone()], single.slot_positions[slots.clone()]);
                    assert_eq!(cache.slot_scores[slots.clone()], single.slot_scores[slots]);
                    let (got, want) = (cache.head(head), single.head(head));
                    assert_eq!(got.bias, want.bias);
                    let strip = got.shape.strip_row();
                    for row in (0..got.n_slots).chain(strip..strip + cache.strip_len) {
                        let key = |head: &Head<'_>| (0..d).map(|i| head.keys[i * head.shape.rows() + row]).collect::<Vec<_>>();
                        assert_eq!(key(&got), key(&want), "row {row} of head {head}, {threads} threads, {routing:?}");
                        let values = row * got.shape.value_width()..row * got.shape.value_width() + d;
                        assert_eq!(got.values[values.clone()], want.values[values], "row {row} of head {head}, {threads} threads");
                    }
                }
            }
        }
    }

    /// Whole numbers up to 2048 are exact in f16.
    fn half_to_f32(bits: u16) -> f32 {
        let exponent = (bits >> 10) as i32;
        if exponent == 0 { 0.0 } else { (1.0 + (bits & 1023) as f32 / 1024.0) * 2f32.powi(exponent - 15) }
    }
}
