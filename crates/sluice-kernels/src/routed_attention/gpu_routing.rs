//! A routing whose choices are on a GPU: what the kernels there read, and what the router there writes.

use std::sync::Arc;

use sluice_tensor::cuda::{Buffer, Gpu, or_raise};

use super::{Routing, Visibility};

/// A [`Routing`] from position 0, whose key rows are positions, in GPU memory.
pub struct GpuRouting {
    pub(crate) batch: usize,
    pub(crate) n_blocks: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) n_routed: usize,
    pub(crate) window: usize,
    pub(crate) route_every: usize,
    pub(crate) lens: Vec<usize>,
    pub(crate) visibility: Visibility,
    /// What leaves a set never comes back, as when a top-k router chose.
    pub(crate) never_returns: bool,
    /// `[B, n_blocks, G, N]` i32.
    pub(crate) indices: Buffer,
    /// `[B, n_blocks, G]` f32.
    pub(crate) tau: Buffer,
    /// `[B]` i32.
    pub(crate) lens_there: Buffer,
}

impl GpuRouting {
    /// Queue a copy of a routing to a GPU. Panics when the kernels there do not serve it.
    #[track_caller]
    pub fn upload(gpu: &Arc<Gpu>, routing: &Routing) -> Self {
        assert!(
            routing.start == 0 && routing.key_offset == 0,
            "routed attention on the GPU begins at position 0; found one from {} with key offset {}",
            routing.start,
            routing.key_offset
        );
        Self {
            batch: routing.batch,
            n_blocks: routing.n_blocks,
            n_kv_heads: routing.n_kv_heads,
            n_routed: routing.n_routed,
            window: routing.window,
            route_every: routing.route_every,
            lens: routing.lens.clone(),
            visibility: routing.visibility,
            never_returns: never_returns(routing),
            indices: or_raise(gpu.upload_slice(&routing.indices)),
            tau: or_raise(gpu.upload_slice(&routing.tau)),
            lens_there: upload_lens(gpu, &routing.lens),
        }
    }

    /// Read it back; waits for the GPU.
    pub fn download(&self) -> Routing {
        let gpu = self.indices.gpu();
        Routing {
            batch: self.batch,
            n_blocks: self.n_blocks,
            n_kv_heads: self.n_kv_heads,
            n_routed: self.n_routed,
            indices: or_raise(gpu.download_slice(&self.indices)),
            tau: or_raise(gpu.download_slice(&self.tau)),
            window: self.window,
            route_every: self.route_every,
            start: 0,
            key_offset: 0,
            lens: self.lens.clone(),
            visibility: self.visibility,
        }
    }
}

/// Whether the blocks that list a key are consecutive, for all keys.
fn never_returns(routing: &Routing) -> bool {
    let Routing { batch, n_blocks, n_kv_heads, n_routed, ref indices, .. } = *routing;
    let rows = indices.iter().max().map_or(0, |&row| row.max(-1) + 1) as usize;
    let mut last_block = vec![usize::MAX; rows];
    (0..batch * n_kv_heads).all(|pair| {
        last_block.fill(usize::MAX);
        (0..n_blocks).all(|block| {
            let list = ((pair / n_kv_heads * n_blocks + block) * n_kv_heads + pair % n_kv_heads) * n_routed;
            indices[list..][..n_routed].iter().filter(|&&row| row >= 0).all(|&row| {
                let before = std::mem::replace(&mut last_block[row as usize], block);
                before == usize::MAX || before + 1 == block
            })
        })
    })
}

pub(crate) fn upload_lens(gpu: &Arc<Gpu>, lens: &[usize]) -> Buffer {
    or_raise(gpu.upload_slice(&lens.iter().map(|&n| n as i32).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_comes_back_is_noticed() {
        let routing = |indices: [i32; 6]| Routing {
            batch: 1,
            n_blocks: 3,
            n_kv_heads: 1,
            n_routed: 2,
            indices: indices.to_vec(),
            tau: vec![0.0; 3],
            window: 8,
            route_every: 8,
            start: 0,
            key_offset: 0,
            lens: vec![24],
            visibility: Visibility::Causal,
        };
        assert!(never_returns(&routing([-1, -1, -1, -1, -1, -1])));
        assert!(never_returns(&routing([0, 1, 1, 4, 4, 7])));
        assert!(never_returns(&routing([0, -1, -1, -1, 4, 7])));
        assert!(!never_returns(&routing([0, 1, 1, 4, 0, 4])));
    }
}
