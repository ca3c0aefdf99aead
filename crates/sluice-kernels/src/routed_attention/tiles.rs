//! Cuts routed attention into tiles: which keys at most 64 consecutive queries see, and which of them each one sees.
//!
//! A tile may span several blocks. Consecutive blocks mostly keep the same keys, so for a small `route_every` the
//! union of a few blocks is hardly longer than one of them, and the keys of 64 queries still form one tile. Blocks
//! whose keys differ too much get a tile each.

use std::ops::Range;

use super::{GateBias, Routing, Visibility};
use crate::attention_tile::{Masks, Tile, Tiler};

pub(super) struct Routed<'a> {
    pub(super) routing: &'a Routing,
    pub(super) bias: Option<GateBias<'a>>,
    pub(super) n_keys: usize,
}

/// The tile under construction.
pub(super) struct State {
    /// Keys of the tile.
    rows: Vec<u32>,
    /// Keys that are not plain, appended to `rows` in the end; the i-th has row `i + 1` of `masks`.
    masked: Vec<u32>,
    masks: Masks,
    /// Queries of the tile, by runs of equal routing, with the block that has it.
    runs: Vec<(Range<usize>, usize)>,
    /// For every key row, a number that is valid when the first component is the current `mark`.
    noted: Vec<(u32, u32)>,
    mark: u32,
}

impl State {
    /// Forget all notes.
    fn forget(&mut self) {
        self.mark += 1;
    }

    fn note(&mut self, row: usize, value: u32) {
        self.noted[row] = (self.mark, value);
    }

    fn noted(&self, row: usize) -> Option<u32> {
        let (mark, value) = self.noted[row];
        (mark == self.mark).then_some(value)
    }

    /// The mask of a key, a hidden one if it has none yet.
    fn mask_of(&mut self, row: usize) -> usize {
        if let Some(mask) = self.noted(row) {
            return mask as usize;
        }
        let mask = self.masks.push_hidden();
        self.note(row, mask as u32);
        self.masked.push(row as u32);
        mask
    }
}

impl Tiler for Routed<'_> {
    type State = State;

    fn state(&self) -> State {
        State { rows: Vec::new(), masked: Vec::new(), masks: Masks::new(), runs: Vec::new(), noted: vec![(0, 0); self.n_keys], mark: 0 }
    }

    fn tiles(&self, state: &mut State, b: usize, g: usize, span: Range<usize>, each: &mut dyn FnMut(&Tile<'_>)) {
        let mut first = span.start;
        while first < span.end {
            let end = self.choose_runs(state, b, g, first..span.end);
            self.build(state, b, g, first..end);
            each(&Tile { first, n: end - first, rows: &state.rows, n_plain: state.rows.len() - state.masked.len(), masks: &state.masks });
            first = end;
        }
    }

    fn end_row(&self, b: usize, g: usize, queries: Range<usize>) -> usize {
        let blocks = self.routing.block_of(queries.start)..=self.routing.block_of(queries.end - 1);
        let routed = blocks.flat_map(|block| self.routing.routed(b, block, g)).map(|&row| row as usize + 1).max();
        let local = self.local_positions(b, &queries);
        routed.unwrap_or(0).max(local.end - self.routing.key_offset.min(local.end))
    }

    fn work_until(&self, t: usize) -> f64 {
        t as f64
    }
}

impl Routed<'_> {
    /// Fill `state.runs` for a tile that begins at `queries.start`; returns its end.
    fn choose_runs(&self, state: &mut State, b: usize, g: usize, queries: Range<usize>) -> usize {
        let routing = self.routing;
        state.runs.clear();
        state.forget();
        let mut n_union = 0;
        let mut t = queries.start;
        while t < queries.end {
            let block = routing.block_of(t);
            let end = match routing.visibility {
                Visibility::Causal => ((routing.start + t) / routing.route_every + 1) * routing.route_every - routing.start,
                Visibility::Bidirectional => queries.end,
            };
            let run = t..end.min(queries.end);
            let routed = routing.routed(b, block, g);
            let same = state.runs.last().is_some_and(|&(_, last)| {
                routed == routing.routed(b, last, g) && (self.bias.is_none() || routing.tau_of(b, block, g) == routing.tau_of(b, last, g))
            });
            if same {
                state.runs.last_mut().expect("there is a last run").0.end = run.end;
            } else {
                let n_new = routed.iter().filter(|&&row| state.noted(row as usize).is_none()).count();
                // A quarter more keys than needed cost less than another tile with fewer queries.
                if !state.runs.is_empty() && n_union + n_new > routed.len() + (routed.len() + routing.window) / 4 + run.len() {
                    return t;
                }
                for &row in routed {
                    state.note(row as usize, 0);
                }
                n_union += n_new;
                state.runs.push((run.clone(), block));
            }
            t = run.end;
        }
        t
    }

    /// Positions that some query of a range sees locally.
    fn local_positions(&self, b: usize, queries: &Range<usize>) -> Range<usize> {
        let Routing { window, start, .. } = *self.routing;
        match self.routing.visibility {
            Visibility::Causal => {
                let first = self.routing.first_local(queries.start);
                first..(start + queries.end).max(first)
            }
            Visibility::Bidirectional if window == 0 => 0..0,
            Visibility::Bidirectional => {
                queries.start.saturating_sub((window - 1) / 2)..(queries.end + window / 2).min(self.routing.lens[b])
            }
        }
    }

    /// Queries that see the local position `p`; may reach beyond the sequence.
    fn viewers(&self, p: usize) -> Range<usize> {
        let Routing { window, start, route_every, .. } = *self.routing;
        match self.routing.visibility {
            // The last block whose first local position is not beyond p begins at p + w - 1 at the latest.
            Visibility::Causal if p + window == 0 => 0..0,
            Visibility::Causal => p.saturating_sub(start)..(((p + window - 1) / route_every + 1) * route_every).saturating_sub(start),
            Visibility::Bidirectional => p.saturating_sub(window / 2)..p + (window - 1) / 2 + 1,
        }
    }

    /// Fill `state.rows`, `state.masked` and `state.masks` for the tile of `state.runs`.
    fn build(&self, state: &mut State, b: usize, g: usize, queries: Range<usize>) {
        let routing = self.routing;
        state.rows.clear();
        state.masked.clear();
        state.masks.clear(self.bias.is_some());
        state.forget();
        for p in self.local_positions(b, &queries) {
            let viewers = self.viewers(p);
            let row = p - routing.key_offset;
            if viewers.start <= queries.start && viewers.end >= queries.end {
                // Never a mask: whatever else is said about this key, every query sees it as a local one.
                state.note(row, 0);
                state.rows.push(row as u32);
            } else if viewers.start.max(queries.start) < viewers.end.min(queries.end) {
                let mask = state.mask_of(row);
                let last = viewers.end.min(queries.end) - 1 - queries.start;
                state.masks.show(mask, viewers.start.max(queries.start) - queries.start, last);
            }
        }
        let runs = std::mem::take(&mut state.runs);
        for (run, block) in &runs {
            let (first, last) = (run.start - queries.start, run.end - 1 - queries.start);
            let tau = routing.tau_of(b, *block, g);
            for &row in routing.routed(b, *block, g) {
                let row = row as usize;
                if let Some(bias) = self.bias {
                    if state.noted(row) != Some(0) {
                        let [_, s, n_kv] = bias.scores.dims();
                        let beta = GateBias::of(bias.scores.f32()[(b * s + row) * n_kv + g], tau, bias.temperature);
                        let mask = state.mask_of(row);
                        state.masks.show_biased(mask, first, last, beta);
                    }
                } else if runs.len() == 1 && state.noted(row).is_none() {
                    state.rows.push(row as u32);
                } else if state.noted(row) != Some(0) {
                    let mask = state.mask_of(row);
                    state.masks.show(mask, first, last);
                }
            }
        }
        state.runs = runs;
        state.rows.extend_from_slice(&state.masked);
    }
}
