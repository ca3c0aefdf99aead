//! How much of the attention that queries pay to keys outside their window a routing keeps.

pub(crate) mod cases;
mod cuda;
pub mod naive;

use sluice_tensor::Tensor;

use crate::routed_attention::PlacedRouting;

/// Added to the denominator: a head that pays no attention outside its window has kept nothing.
const NOTHING: f64 = 1e-9;

/// `[B, G]` of `mass [B, n_blocks, G, S]` ([`block_mass`](crate::attention_mass::block_mass)): the sum over the routed keys of every block,
/// divided by the sum over all keys before the block's window. The routing is causal and begins at position 0.
#[track_caller]
pub fn kept_share(mass: &Tensor, routing: &PlacedRouting) -> Tensor {
    let [b, n_blocks, g, s] = mass.dims();
    if let Some(gpu) = mass.gpu() {
        return cuda::kept_share(gpu, mass, routing);
    }
    let (routing, mass) = (routing.download(), mass.f32());
    assert_eq!((routing.batch, routing.n_blocks, routing.n_kv_heads), (b, n_blocks, g), "kept_share of another routing");
    let share = |at: usize| {
        let (bi, head) = (at / g, at % g);
        let (mut kept, mut all) = (0.0, NOTHING);
        for block in 0..n_blocks {
            let row = &mass[((bi * n_blocks + block) * g + head) * s..][..s];
            let first_local = (block * routing.route_every + 1).saturating_sub(routing.window).min(s);
            all += row[..first_local].iter().map(|&m| m as f64).sum::<f64>();
            kept += routing.routed(bi, block, head).iter().map(|&j| row[j as usize] as f64).sum::<f64>();
        }
        (kept / all) as f32
    };
    Tensor::from_vec((0..b * g).map(share).collect(), [b, g])
}
