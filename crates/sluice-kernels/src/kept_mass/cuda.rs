//! Sums of every block, then over the blocks, in f64 and in one order.

use std::sync::Arc;

use sluice_tensor::Tensor;
use sluice_tensor::cuda::{Gpu, KernelSource, or_raise};

use super::NOTHING;
use crate::launch::{THREADS, launch, output};
use crate::routed_attention::{GpuRouting, PlacedRouting};

const SOURCE: KernelSource = KernelSource { name: "kept_mass", code: include_str!("kept_mass.cu") };

pub(super) fn kept_share(gpu: &Arc<Gpu>, mass: &Tensor, routing: &PlacedRouting) -> Tensor {
    let [b, n_blocks, g, s] = mass.dims();
    let routing = match routing {
        PlacedRouting::Gpu(routing) => Arc::clone(routing),
        PlacedRouting::Host(routing) => Arc::new(GpuRouting::upload(gpu, routing)),
    };
    assert_eq!((routing.batch, routing.n_blocks, routing.n_kv_heads), (b, n_blocks, g), "kept_share of another routing");
    let partial = or_raise(gpu.alloc(b * g * n_blocks * 16));
    let mut share = output(gpu, [b, g]);
    let args = [
        mass.into(),
        (&routing.indices).into(),
        (&partial).into(),
        (s as u32).into(),
        (routing.n_routed as u32).into(),
        (routing.window as u32).into(),
        (routing.route_every as u32).into(),
    ];
    // SAFETY: a block for every row of `mass` and of the routing, whose indices are keys; two sums each in `partial`.
    unsafe { launch(gpu, &SOURCE, "block_sums", [n_blocks, g, b], THREADS, 0, &args) };
    let args = [(&partial).into(), (&mut share).into(), (n_blocks as u32).into(), (NOTHING as f32).into()];
    // SAFETY: a block for every element of `share`, which reads its `n_blocks` pairs.
    unsafe { launch(gpu, &SOURCE, "shares", [b * g, 1, 1], THREADS, 0, &args) };
    share
}
