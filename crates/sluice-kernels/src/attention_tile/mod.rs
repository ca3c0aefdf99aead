//! The engine of dense and routed attention: a tile of at most 64 consecutive queries, with all query heads of
//! one KV head, against a list of key rows. Knows nothing about who chose the keys.
//!
//! Queries lie along the lanes of a vector and keys along the rows of a register block:
//! `S^T = K Q^T`, `P^T = softmax`, `O^T += V^T P^T`. Keys and values are only ever broadcast one number at a
//! time, so their rows are read in place wherever they are (nothing is gathered or transposed), maxima and
//! sums of the softmax are lane by lane, and only queries and outputs are transposed, once per tile.
//!
//! A *panel* is up to three vectors of queries, the unit of work: its transposed queries and outputs and one
//! step of keys stay in the first-level cache. Vectors are ordered by query first and head second, so that a
//! panel covers few positions and can skip keys that none of them sees.

mod bwd;
mod few;
mod fwd;
mod products;
mod run;

use std::f32::consts::LOG2_E;

use sluice_tensor::memory::Scratch;

use crate::routed_attention::Dims;
use crate::simd::Simd;

pub(crate) use run::{Grads, Tiler, bwd, bwd_scores, fwd};

/// Queries of a tile at most.
pub(crate) const QUERIES: usize = 64;

/// Lanes of a panel at most: three of the widest vectors.
const LANES: usize = 48;

/// Keys that go through the softmax together.
const STEP: usize = 64;

/// Queries and the keys that they see.
pub(crate) struct Tile<'a> {
    /// First query, a row of `q`.
    pub(crate) first: usize,
    /// Queries, 1..=64.
    pub(crate) n: usize,
    /// Rows of `k` and `v`, each one once.
    pub(crate) rows: &'a [u32],
    /// So many rows at the beginning are seen by every query, without bias.
    pub(crate) n_plain: usize,
    /// The others.
    pub(crate) masks: &'a Masks,
}

/// How each query of a tile sees each of the keys that are not plain.
pub(crate) struct Masks {
    /// `[1 + n, 64]` added to the logit of a query, in units of log2; -inf hides the key. Row 0 is zero.
    pub(crate) add: Vec<f32>,
    /// `[1 + n, 64]` derivative of the bias by the key's score, or empty when nothing has a bias. Row 0 is zero.
    pub(crate) dbias: Vec<f32>,
    /// `[n]` first and last query that see the key.
    pub(crate) span: Vec<(u8, u8)>,
}

impl Masks {
    pub(crate) fn new() -> Self {
        Self { add: vec![0.0; QUERIES], dbias: Vec::new(), span: Vec::new() }
    }

    /// Forget all keys. `biased`: there will be some with a bias.
    pub(crate) fn clear(&mut self, biased: bool) {
        self.add.truncate(QUERIES);
        self.dbias.clear();
        self.dbias.resize(if biased { QUERIES } else { 0 }, 0.0);
        self.span.clear();
    }

    /// Append a key that nobody sees yet; returns its row in `add`.
    pub(crate) fn push_hidden(&mut self) -> usize {
        let row = self.add.len() / QUERIES;
        self.add.resize(self.add.len() + QUERIES, f32::NEG_INFINITY);
        if !self.dbias.is_empty() {
            self.dbias.resize(self.add.len(), 0.0);
        }
        self.span.push((QUERIES as u8, 0));
        row
    }

    /// Let queries `first..=last` see the key of `row` without bias.
    pub(crate) fn show(&mut self, row: usize, first: usize, last: usize) {
        self.add[row * QUERIES..][first..=last].fill(0.0);
        self.widen(row, first, last);
    }

    /// Let those of the queries `first..=last` that do not see the key yet see it with `bias` (in units of ln).
    pub(crate) fn show_biased(&mut self, row: usize, first: usize, last: usize, (bias, dbias): (f32, f32)) {
        for i in row * QUERIES + first..=row * QUERIES + last {
            if self.add[i] == f32::NEG_INFINITY {
                self.add[i] = bias * LOG2_E;
                self.dbias[i] = dbias;
            }
        }
        self.widen(row, first, last);
    }

    fn widen(&mut self, row: usize, first: usize, last: usize) {
        let span = &mut self.span[row - 1];
        *span = (span.0.min(first as u8), span.1.max(last as u8));
    }
}

/// Inputs of an attention, whole tensors: `q [B, T, H, D]`, `k, v [B, S, G, D]`.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub(crate) dims: Dims,
    pub(crate) q: &'a [f32],
    pub(crate) k: &'a [f32],
    pub(crate) v: &'a [f32],
}

impl Inputs<'_> {
    /// Offset in `q` of query row `t` of head `i` of the group of KV head `g`.
    #[inline(always)]
    fn query_at(&self, b: usize, t: usize, g: usize, i: usize) -> usize {
        ((b * self.dims.t + t) * self.dims.h + g * self.dims.group() + i) * self.dims.d
    }

    /// Offset in `k` and `v` of a key row.
    #[inline(always)]
    fn key_at(&self, b: usize, row: u32, g: usize) -> usize {
        ((b * self.dims.s + row as usize) * self.dims.g + g) * self.dims.d
    }
}

/// A slice that several tasks write, each its own rows.
#[derive(Clone, Copy)]
struct SharedRows<'a> {
    data: *mut f32,
    len: usize,
    lives: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: the only access is through `row`, whose contract forbids overlap between threads.
unsafe impl Send for SharedRows<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedRows<'_> {}

impl<'a> SharedRows<'a> {
    fn new(data: &'a mut [f32]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), lives: std::marker::PhantomData }
    }

    /// # Safety
    /// While the result lives, nobody else may hold a row that overlaps `[at, at + len)`.
    #[inline(always)]
    unsafe fn row(&self, at: usize, len: usize) -> &'a mut [f32] {
        assert!(at + len <= self.len, "row {at}..{} of {}", at + len, self.len);
        // SAFETY: in bounds by the assert, exclusive by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), len) }
    }
}

/// Counted scratch that starts at a cache line: vector loads that straddle two lines cost double.
struct Buffer {
    scratch: Scratch,
    at: usize,
    len: usize,
}

impl Buffer {
    fn zeros(len: usize) -> Self {
        let scratch = Scratch::zeros(len + 16);
        let at = scratch.as_ptr().align_offset(64);
        Self { scratch, at, len }
    }

    /// Numbers `at..at + len`.
    fn row(&self, at: usize, len: usize) -> &[f32] {
        &self.scratch[self.at..][at..at + len]
    }

    /// Pointer to `len` numbers; panics when there are fewer.
    #[inline(always)]
    fn ptr(&mut self, len: usize) -> *mut f32 {
        assert!(len <= self.len, "{len} numbers of scratch, found {}", self.len);
        self.scratch[self.at..].as_mut_ptr()
    }
}

/// Scratch of one thread.
struct Workspace {
    /// Transposed, scaled queries of a panel `[D, lanes]`.
    q: Buffer,
    /// Transposed outputs, forward, or query gradients, backward, of a panel `[D, lanes]`.
    o: Buffer,
    /// Logits, then weights, of a step `[keys, lanes]`.
    p: Buffer,
    /// Backward only: transposed output gradients `[D, lanes]`.
    dout: Buffer,
    /// Backward only: gradients of the weights, then of the logits, of a step `[keys, lanes]`.
    dp: Buffer,
    /// Backward only: queries and output gradients as rows `[lanes, D rounded up]`.
    q_rows: Buffer,
    dout_rows: Buffer,
    /// Few queries: their logits `[heads, keys]`, the one array that grows with the number of keys.
    logits: Buffer,
    /// Few queries: the rows that one query sees and what is added to its logits.
    seen: Vec<(u32, f32)>,
}

impl Workspace {
    fn fwd(dims: &Dims) -> Self {
        let none = || Buffer::zeros(0);
        Self {
            q: Buffer::zeros(dims.d * LANES),
            o: Buffer::zeros(dims.d * LANES),
            p: Buffer::zeros(STEP * LANES),
            dout: none(),
            dp: none(),
            q_rows: none(),
            dout_rows: none(),
            logits: none(),
            seen: Vec::new(),
        }
    }

    fn bwd(dims: &Dims) -> Self {
        let width = padded(dims.d);
        Self {
            dout: Buffer::zeros(dims.d * LANES),
            dp: Buffer::zeros(STEP * LANES),
            q_rows: Buffer::zeros(width * LANES),
            dout_rows: Buffer::zeros(width * LANES),
            ..Self::fwd(dims)
        }
    }
}

/// Width of a row in whole vectors of any machine.
fn padded(d: usize) -> usize {
    d.next_multiple_of(16)
}

/// Vectors of the next panel when `left` remain: as many as the machine's registers allow, but never leaving a single one
/// of several behind.
#[inline(always)]
fn panel_width<V: Simd>(left: usize) -> usize {
    match left {
        1 => 1,
        2 | 4 => 2,
        _ => V::WIDE,
    }
}

/// Rows of a register block two vectors wide where no block is wider: 6 x 2 sums, two vectors and a broadcast in 16 registers.
const ROWS_OF_TWO: usize = 6;

/// The keys of one step of a panel, by address.
struct Step {
    n: usize,
    /// So many at the beginning need nothing added.
    n_plain: usize,
    /// Offsets of the rows in `k` and `v`.
    at: [usize; STEP],
    /// Row numbers.
    row: [u32; STEP],
    /// Rows of [`Masks::add`], 0 for a plain key.
    mask: [u32; STEP],
}

impl Step {
    #[inline(always)]
    fn new() -> Self {
        Self { n: 0, n_plain: 0, at: [0; STEP], row: [0; STEP], mask: [0; STEP] }
    }
}

/// Walks over the keys of a tile that at least one query in `first..=last` sees.
struct Keys<'a> {
    tile: &'a Tile<'a>,
    next: usize,
    first: u8,
    last: u8,
}

impl<'a> Keys<'a> {
    #[inline(always)]
    fn new(tile: &'a Tile<'a>, first: usize, last: usize) -> Self {
        Self { tile, next: 0, first: first as u8, last: last as u8 }
    }

    /// Fill `step`; false when no key is left.
    #[inline(always)]
    fn fill(&mut self, step: &mut Step, x: &Inputs<'_>, b: usize, g: usize) -> bool {
        let tile = self.tile;
        step.n = 0;
        while step.n < STEP && self.next < tile.n_plain {
            step.at[step.n] = x.key_at(b, tile.rows[self.next], g);
            step.row[step.n] = tile.rows[self.next];
            step.mask[step.n] = 0;
            step.n += 1;
            self.next += 1;
        }
        step.n_plain = step.n;
        while step.n < STEP && self.next < tile.rows.len() {
            let i = self.next - tile.n_plain;
            let (first, last) = tile.masks.span[i];
            if first <= self.last && self.first <= last {
                step.at[step.n] = x.key_at(b, tile.rows[self.next], g);
                step.row[step.n] = tile.rows[self.next];
                step.mask[step.n] = i as u32 + 1;
                step.n += 1;
            }
            self.next += 1;
        }
        step.n > 0
    }
}
