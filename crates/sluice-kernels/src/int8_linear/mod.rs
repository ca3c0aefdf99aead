//! `y = x W^T + b` with int8 weights and activations that are rounded to thirteen bits on the fly.
//!
//! ```text
//! W[n, k] ~ ws[n, g] wq[n, k]      wq in -127..=127, ws an f16, g the group of `group` inputs that holds k
//! x[t, k] ~ as[t, g] aq[t, k]      aq in -4095..=4095, as = max |x| of the group / 4095
//! y[t, n] = b[n] + sum over g of (ws[n, g] as[t, g]) (sum over k of group g of wq[n, k] aq[t, k])
//! ```
//!
//! The inner sums are exact in i32; the outer one runs over the groups in ascending order, one fused multiply-add
//! each. So every instruction set, every split into rows or tokens and every thread count gives the same bits.
//!
//! Weights lie in the order in which the kernels read them: tiles of [`TILE_ROWS`] rows, in a tile four inputs of
//! each row after the other, so that one vector holds four products for each of its rows and nothing is ever summed
//! across lanes. They are stored as `wq + 128`, so that a mask and a shift widen them; the surplus `128 sum aq` is known once per token and group.

mod activations;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512_vnni;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
mod naive;
mod pack;
mod plain;
#[cfg(test)]
mod tests;

pub use activations::{LARGEST, QuantisedRows};
pub use pack::{PackError, pack};

use crate::worker_team::WorkerTeam;

/// Output rows of a tile.
pub const TILE_ROWS: usize = 16;

/// Inputs that share a scale: what [`Layout::new`] accepts.
pub const GROUPS: [usize; 2] = [32, 64];

/// Shape of a packed matrix. Rows are padded to whole tiles and inputs to whole groups, both with zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// `N`, outputs.
    pub rows: usize,
    /// `K`, inputs.
    pub cols: usize,
    /// Inputs that share a scale.
    pub group: usize,
}

impl Layout {
    /// Panics for an empty matrix or a group that is not one of [`GROUPS`].
    #[track_caller]
    pub fn new(rows: usize, cols: usize, group: usize) -> Self {
        assert!(rows > 0 && cols > 0 && GROUPS.contains(&group), "int8 matrix of {rows} x {cols} in groups of {group}");
        Self { rows, cols, group }
    }

    /// Tiles of [`TILE_ROWS`] rows.
    pub fn n_tiles(&self) -> usize {
        self.rows.div_ceil(TILE_ROWS)
    }

    /// Groups of inputs.
    pub fn n_groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// Inputs, padding included.
    pub fn padded_cols(&self) -> usize {
        self.n_groups() * self.group
    }

    /// Bytes of one tile's weights.
    pub fn tile_bytes(&self) -> usize {
        TILE_ROWS * self.padded_cols()
    }

    /// Bytes of all weights.
    pub fn n_values(&self) -> usize {
        self.n_tiles() * self.tile_bytes()
    }

    /// Number of all scales.
    pub fn n_scales(&self) -> usize {
        self.n_tiles() * self.n_groups() * TILE_ROWS
    }
}

/// A matrix as the kernels read it.
#[derive(Clone, Copy)]
pub struct PackedMatrix<'a> {
    layout: Layout,
    /// `[n_tiles, padded_cols / 4, TILE_ROWS, 4]`, each weight plus 128.
    values: &'a [u8],
    /// `[n_tiles, n_groups, TILE_ROWS]`, the bits of f16 scales.
    scales: &'a [u16],
}

impl<'a> PackedMatrix<'a> {
    /// Panics when the slices do not have the sizes of the layout.
    #[track_caller]
    pub fn new(layout: Layout, values: &'a [u8], scales: &'a [u16]) -> Self {
        assert_eq!(values.len(), layout.n_values(), "int8 weights of {layout:?}");
        assert_eq!(scales.len(), layout.n_scales(), "int8 scales of {layout:?}");
        Self { layout, values, scales }
    }

    /// Shape.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Row `row` as f32 into `out [K]`: an embedding.
    #[track_caller]
    pub fn dequantise_row(&self, row: usize, out: &mut [f32]) {
        let Layout { rows, cols, group } = self.layout;
        assert!(row < rows && out.len() == cols, "row {row} of {rows} into {} of {cols} numbers", out.len());
        let (tile, lane) = (row / TILE_ROWS, row % TILE_ROWS);
        let values = &self.values[tile * self.layout.tile_bytes()..];
        let scales = &self.scales[tile * self.layout.n_groups() * TILE_ROWS..];
        for (k, out) in out.iter_mut().enumerate() {
            let value = values[(k / 4 * TILE_ROWS + lane) * 4 + k % 4] as i32 - 128;
            *out = value as f32 * half::f16::from_bits(scales[k / group * TILE_ROWS + lane]).to_f32();
        }
    }

    /// Weights and scales of a tile.
    fn tile(&self, tile: usize) -> (&'a [u8], &'a [u16]) {
        let (bytes, n_scales) = (self.layout.tile_bytes(), self.layout.n_groups() * TILE_ROWS);
        (&self.values[tile * bytes..(tile + 1) * bytes], &self.scales[tile * n_scales..(tile + 1) * n_scales])
    }
}

/// What the inner loops can use; `best` is the fastest one of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    /// `vpdpwssd` on 512 bits.
    Avx512Vnni,
    /// `vpdpwssd` on 256 bits.
    AvxVnni,
    /// `vpmaddwd` on 256 bits.
    Avx2,
    /// Any machine.
    Plain,
}

impl InstructionSet {
    /// All, fastest first.
    pub const ALL: [Self; 4] = [Self::Avx512Vnni, Self::AvxVnni, Self::Avx2, Self::Plain];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Vnni => "avx512-vnni",
            Self::AvxVnni => "avx-vnni",
            Self::Avx2 => "avx2",
            Self::Plain => "plain",
        }
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("fma")
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512Vnni | Self::AvxVnni | Self::Avx2 => false,
            Self::Plain => true,
        }
    }

    /// The fastest one that this machine has.
    pub fn best() -> Self {
        Self::ALL.into_iter().find(|set| set.is_available()).expect("the plain one is always available")
    }
}

/// Some tiles of a matrix times some quantised tokens, written into rows `ld` apart: what an inner loop computes.
struct Task<'a> {
    weights: PackedMatrix<'a>,
    tiles: std::ops::Range<usize>,
    tokens: &'a [i32],
    n_tokens: usize,
    bias: Option<&'a [f32]>,
    ld: usize,
}

impl Task<'_> {
    /// Outputs of a tile that are not padding.
    fn tile_rows(&self, tile: usize) -> usize {
        (self.weights.layout.rows - tile * TILE_ROWS).min(TILE_ROWS)
    }

    /// Where sums start: the bias, or zero.
    fn start(&self, tile: usize) -> [f32; TILE_ROWS] {
        let mut start = [0.0; TILE_ROWS];
        if let Some(bias) = self.bias {
            let n = self.tile_rows(tile);
            start[..n].copy_from_slice(&bias[tile * TILE_ROWS..][..n]);
        }
        start
    }

    /// Write the results of one token and tile; the first column of `out` is the first one of `tiles`.
    fn store(&self, token: usize, tile: usize, result: &[f32; TILE_ROWS], out: &mut [f32]) {
        let n = self.tile_rows(tile);
        out[token * self.ld + (tile - self.tiles.start) * TILE_ROWS..][..n].copy_from_slice(&result[..n]);
    }

    fn run(&self, instructions: InstructionSet, out: &mut [f32]) {
        match instructions {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `linear` checked that the machine has the instructions, `PackedMatrix` and `QuantisedRows` their sizes.
            InstructionSet::Avx512Vnni => unsafe { avx512_vnni::run(self, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            InstructionSet::AvxVnni => unsafe { avx_vnni::run(self, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            InstructionSet::Avx2 => unsafe { avx2::run(self, out) },
            _ => plain::run(self, out),
        }
    }
}

/// Pieces of the outputs for each thread, where they are split by outputs: whoever is disturbed does fewer.
const PIECES: usize = 2;

/// Tiles that an inner loop is given together there.
const TILES_AT_ONCE: usize = 4;

/// Up to so many tokens all go through one piece of the outputs: their activations still fit beside its weights in a core's cache.
const FEW_TOKENS: usize = 32;

/// A matrix whose columns several threads write.
struct Columns<'a> {
    start: *mut f32,
    width: usize,
    len: usize,
    borrowed: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: whoever writes vouches that nobody else writes the same numbers.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    fn new(y: &'a mut [f32], width: usize) -> Self {
        Self { start: y.as_mut_ptr(), width, len: y.len(), borrowed: std::marker::PhantomData }
    }

    /// # Safety
    /// No other thread writes to these numbers of the row meanwhile.
    unsafe fn write(&self, row: usize, column: usize, numbers: &[f32]) {
        let at = row * self.width + column;
        assert!(
            column + numbers.len() <= self.width && at + numbers.len() <= self.len,
            "{} outputs at {column} of row {row}",
            numbers.len()
        );
        // SAFETY: the range lies inside the slice that is borrowed, and `numbers` elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), self.start.add(at), numbers.len()) };
    }
}

/// `y [T, N] = x [T, K] W^T + b` for the first `n_tokens` rows of `x`, on all threads of the team.
///
/// A few tokens are split by outputs, so that weights are read once; many are split by token. Panics when the shapes do not fit, or when the machine
/// lacks the instructions.
#[track_caller]
pub fn linear(
    team: &mut WorkerTeam,
    instructions: InstructionSet,
    weights: PackedMatrix<'_>,
    x: &QuantisedRows,
    n_tokens: usize,
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    let layout = weights.layout;
    assert!(instructions.is_available(), "int8_linear: this machine has no {}", instructions.name());
    assert!(
        x.cols() == layout.cols && x.group() == layout.group,
        "int8_linear: {} inputs in groups of {} for {layout:?}",
        x.cols(),
        x.group()
    );
    assert!(n_tokens <= x.capacity(), "int8_linear: {n_tokens} tokens of {}", x.capacity());
    assert_eq!(y.len(), n_tokens * layout.rows, "int8_linear: y of {n_tokens} tokens for {layout:?}");
    if let Some(bias) = bias {
        assert_eq!(bias.len(), layout.rows, "int8_linear: bias for {layout:?}");
    }
    if n_tokens == 0 {
        return;
    }
    if n_tokens <= FEW_TOKENS {
        // Pieces that follow each other belong to one thread for as long as the threads take turns, so what it has fetched ahead is what it needs next.
        let threads = team.n_threads();
        let piece = layout.n_tiles().div_ceil(PIECES * threads);
        let per_thread = layout.n_tiles().div_ceil(piece * threads);
        let (tokens, columns) = (x.rows(0..n_tokens), Columns::new(y, layout.rows));
        team.run(per_thread * threads, |job| {
            let first = (job % threads * per_thread + job / threads) * piece;
            let end = (first + piece).min(layout.n_tiles());
            let mut part = [0.0; FEW_TOKENS * TILES_AT_ONCE * TILE_ROWS];
            for first in (first..end).step_by(TILES_AT_ONCE) {
                let tiles = first..end.min(first + TILES_AT_ONCE);
                let width = (tiles.len() * TILE_ROWS).min(layout.rows - first * TILE_ROWS);
                Task { weights, tiles, tokens, n_tokens, bias, ld: width }.run(instructions, &mut part);
                for (token, part) in part.chunks_exact(width).take(n_tokens).enumerate() {
                    // SAFETY: each tile belongs to one job, so nobody else writes these outputs.
                    unsafe { columns.write(token, first * TILE_ROWS, part) };
                }
            }
        });
    } else {
        let tokens = n_tokens.div_ceil(2 * team.n_threads()).next_multiple_of(8).min(64);
        team.for_each_chunk(y, tokens * layout.rows, |i, y| {
            let first = i * tokens;
            let n = y.len() / layout.rows;
            let task = Task { weights, tiles: 0..layout.n_tiles(), tokens: x.rows(first..first + n), n_tokens: n, bias, ld: layout.rows };
            task.run(instructions, y);
        });
    }
}
