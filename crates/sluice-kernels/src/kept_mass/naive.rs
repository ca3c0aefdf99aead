//! The specification: every key is asked whether it is outside the window, and whether it is kept.

use sluice_tensor::Tensor;

use crate::routed_attention::Routing;

/// `[B, G]`.
pub fn kept_share(mass: &Tensor, routing: &Routing) -> Vec<f64> {
    let [b, n_blocks, g, s] = mass.dims();
    let mut shares = vec![];
    for bi in 0..b {
        for head in 0..g {
            let (mut kept, mut all) = (0.0, 1e-9);
            for block in 0..n_blocks {
                for j in 0..s {
                    let m = mass.f32()[((bi * n_blocks + block) * g + head) * s + j] as f64;
                    // The window of the block's first query ends with that query.
                    if j + routing.window < block * routing.route_every + 1 {
                        all += m;
                    }
                    if routing.routed(bi, block, head).contains(&(j as i32)) {
                        kept += m;
                    }
                }
            }
            shares.push(kept / all);
        }
    }
    shares
}
