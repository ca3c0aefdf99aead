//! Chunks of rows: a product, one kernel that turns logits into losses and their own gradient, two products back.
//! The figures per row and their weighted sum stay on the GPU.

use std::sync::Arc;

use sluice_tensor::cuda::{Arg, Buffer, Epilogue, Gpu, KernelSource, Mat, gemm, or_raise};
use sluice_tensor::{DType, Tensor};

use super::{DistillTerms, Queued, RowWeights, Wanted, even_chunks, neighbours};
use crate::launch::{act, act_mut, factor, formats, launch, of_format, output, over_elements, run};

static SOURCES: [KernelSource; 2] = formats!("output_head", "output_head.cu");

/// Threads of `cross_entropy`.
const WIDE: u32 = 1024;

/// Bytes of logits held at a time: enough rows that reading all of `w` is cheap beside the product.
pub(super) const CHUNK_BYTES: usize = 512 << 20;

fn per_chunk(n: usize, row_bytes: usize) -> usize {
    even_chunks(n, (CHUNK_BYTES / row_bytes.max(1)).max(1))
}

/// The given ascending rows of an `[n, M]`: where they lie, if they are neighbours, or a copy.
struct Rows<'a> {
    all: &'a [usize],
    ids: Option<Buffer>,
}

impl<'a> Rows<'a> {
    fn new(gpu: &Arc<Gpu>, all: &'a [usize]) -> Self {
        let ids = || or_raise(gpu.upload_slice(&all.iter().map(|&i| i as u32).collect::<Vec<_>>()));
        Self { all, ids: neighbours(all).is_none().then(ids) }
    }

    /// Work on `[rows, M]` of `h`.
    fn of<R>(&self, gpu: &Arc<Gpu>, h: &Tensor, work: impl FnOnce(Mat<'_>) -> R) -> R {
        let (n, m) = (self.all.len(), h.last_dim());
        let Some(ids) = &self.ids else {
            return work(Mat::within(h, self.all[0] * m, n, m, m));
        };
        let mut gathered = Tensor::empty_on(gpu, [n, m], h.dtype());
        let args = [act(h), ids.into(), act_mut(&mut gathered), ((n * m) as u64).into(), (m as u32).into()];
        // SAFETY: `ids` are rows of `h`.
        unsafe { run(gpu, of_format(&SOURCES, h.dtype()), "gather_rows", over_elements(n * m), &args) };
        work(Mat::new(&gathered, n, m))
    }

    /// `dh[rows] = dz w`.
    fn project_back(&self, gpu: &Arc<Gpu>, dz: &Tensor, w: &Tensor, dh: &mut Tensor) {
        let ([vocab, m], n) = (w.dims(), self.all.len());
        let w = &factor(gpu, w);
        let (dz, w) = (Mat::within(dz, 0, n, vocab, vocab), Mat::new(w, vocab, m));
        let Some(ids) = &self.ids else {
            return gemm(dz, w, dh, self.all[0] * m, m, Epilogue::default());
        };
        let mut rows = Tensor::empty_on(gpu, [n, m], dh.dtype());
        gemm(dz, w, &mut rows, 0, m, Epilogue::default());
        let args = [act(&rows), ids.into(), act_mut(dh), ((n * m) as u64).into(), (m as u32).into()];
        // SAFETY: `ids` are rows of `dh`, each once.
        unsafe { run(gpu, of_format(&SOURCES, rows.dtype()), "scatter_rows", over_elements(n * m), &args) };
    }
}

struct Gradients {
    dh: Option<Tensor>,
    dw: Option<Tensor>,
    is_zero: bool,
}

impl Gradients {
    /// `dh` in the format of `h`.
    fn new(gpu: &Arc<Gpu>, h: &Tensor, w: &Tensor, wanted: Wanted) -> Self {
        let zeros = |x: &Tensor, dtype| Tensor::zeros_on_gpu(gpu, x.shape(), dtype);
        Self { dh: wanted.input.then(|| zeros(h, h.dtype())), dw: wanted.weight.then(|| zeros(w, DType::F32)), is_zero: true }
    }

    fn add(&mut self, gpu: &Arc<Gpu>, dz: &Tensor, rows: &Rows<'_>, h: &Tensor, w: &Tensor) {
        let [vocab, m] = w.dims();
        // Rounded once for both products, where the precision rounds factors.
        let dz = &dz.to_dtype(gpu.precision().activations());
        if let Some(dh) = &mut self.dh {
            rows.project_back(gpu, dz, w, dh);
        }
        if let Some(dw) = &mut self.dw {
            let dz = Mat::within(dz, 0, rows.all.len(), vocab, vocab);
            rows.of(gpu, h, |h| gemm(dz.t(), h, dw, 0, m, Epilogue { accumulate: !self.is_zero, bias: None }));
        }
        self.is_zero = false;
    }
}

/// `z [rows, V] = h[rows] w^T`.
fn project(gpu: &Arc<Gpu>, rows: &Rows<'_>, h: &Tensor, w: &Tensor, z: &mut Tensor) {
    let [vocab, m] = w.dims();
    let w = &factor(gpu, w);
    rows.of(gpu, h, |h| gemm(h, Mat::new(w, vocab, m).t(), z, 0, vocab, Epilogue::default()));
}

fn pick<T: Copy>(values: &[T], rows: &[usize]) -> Vec<T> {
    rows.iter().map(|&i| values[i]).collect()
}

/// `sum_i weights[i] (factors . figures[i])` over the first three figures of a row, and the same of the first figure alone.
fn weighted_sums(gpu: &Arc<Gpu>, figures: &Tensor, weights: &RowWeights, factors: [f32; 3]) -> (Tensor, Tensor) {
    let (mut loss, mut first) = (output(gpu, []), output(gpu, []));
    let [rows, width] = figures.dims::<2>().map(|n| n as u32);
    let [a, b, c] = factors.map(Arg::from);
    let args = [figures.into(), weights.values().into(), rows.into(), width.into(), a, b, c, (&mut loss).into(), (&mut first).into()];
    // SAFETY: a weight per row of at least three figures, two sums of one element.
    unsafe { run(gpu, &SOURCES[0], "weighted_sums", [1, 1, 1], &args) };
    (loss, first)
}

pub(super) fn cross_entropy(gpu: &Arc<Gpu>, h: &Tensor, w: &Tensor, targets: &[u32], weights: &RowWeights, grads: Wanted) -> Queued {
    let vocab = w.shape()[0];
    let active = weights.rows();
    // Where the precision rounds factors, logits that become a gradient are rounded as well; a loss by itself is of f32 logits.
    let format = if grads.any() { gpu.precision().activations() } else { DType::F32 };
    let per_chunk = per_chunk(active.len(), format.size() * vocab);
    let mut gradients = Gradients::new(gpu, h, w, grads);
    let mut figures = output(gpu, [active.len(), 3]);
    let (to_figures, row_weights) = (figures.address_mut(), weights.values().address());
    let row_targets = or_raise(gpu.upload_slice(&pick(targets, active)));
    let mut z = Tensor::empty_on(gpu, [per_chunk.min(active.len()), vocab], format);
    for (i, chunk) in active.chunks(per_chunk).enumerate() {
        let rows = Rows::new(gpu, chunk);
        project(gpu, &rows, h, w, &mut z);
        let first = (i * per_chunk) as u64;
        let args: [Arg; 6] = [
            act_mut(&mut z),
            (row_targets.address() + 4 * first).into(),
            (row_weights + 4 * first).into(),
            (to_figures + 12 * first).into(),
            (vocab as u32).into(),
            u32::from(grads.any()).into(),
        ];
        // SAFETY: a block per row of the chunk; the caller checked the targets.
        unsafe { launch(gpu, of_format(&SOURCES, format), "cross_entropy", [chunk.len(), 1, 1], WIDE, 0, &args) };
        if grads.any() {
            gradients.add(gpu, &z, &rows, h, w);
        }
    }
    let (loss, first) = weighted_sums(gpu, &figures, weights, [1.0, 0.0, 0.0]);
    Queued { loss, first, figures, dh: gradients.dh, dw: gradients.dw, weights: weights.clone() }
}

pub(super) fn distill(
    gpu: &Arc<Gpu>,
    [h_s, w_s, h_t, w_t]: [&Tensor; 4],
    targets: Option<&[u32]>,
    weights: &RowWeights,
    terms: DistillTerms,
    grads: Wanted,
) -> Queued {
    let vocab = w_s.shape()[0];
    let active = weights.rows();
    let per_chunk = per_chunk(active.len(), 2 * DType::F32.size() * vocab);
    let mut gradients = Gradients::new(gpu, h_s, w_s, grads);
    let mut figures = output(gpu, [active.len(), 6]);
    let (to_figures, row_weights) = (figures.address_mut(), weights.values().address());
    let row_targets = targets.map(|t| or_raise(gpu.upload_slice(&pick(t, active))));
    let shape = [per_chunk.min(active.len()), vocab];
    let (mut z_s, mut z_t) = (output(gpu, shape), output(gpu, shape));
    for (i, chunk) in active.chunks(per_chunk).enumerate() {
        let rows = Rows::new(gpu, chunk);
        project(gpu, &rows, h_s, w_s, &mut z_s);
        project(gpu, &rows, h_t, w_t, &mut z_t);
        let first = (i * per_chunk) as u64;
        let args: [Arg; 14] = [
            (&mut z_s).into(),
            (&z_t).into(),
            row_targets.as_ref().map_or(0, |t| t.address() + 4 * first).into(),
            (row_weights + 4 * first).into(),
            (to_figures + 24 * first).into(),
            (vocab as u32).into(),
            u32::from(grads.any()).into(),
            terms.kl.into(),
            terms.ce.into(),
            terms.boundary.into(),
            terms.temperature.into(),
            terms.margin_cap.into(),
            terms.boundary_delta.into(),
            terms.boundary_width.into(),
        ];
        // SAFETY: a block per row of the chunk; the caller checked the targets.
        unsafe { run(gpu, &SOURCES[0], "distill", [chunk.len() as u32, 1, 1], &args) };
        if grads.any() {
            gradients.add(gpu, &z_s, &rows, h_s, w_s);
        }
    }
    let (loss, first) = weighted_sums(gpu, &figures, weights, [terms.kl, terms.boundary, terms.ce]);
    Queued { loss, first, figures, dh: gradients.dh, dw: gradients.dw, weights: weights.clone() }
}
