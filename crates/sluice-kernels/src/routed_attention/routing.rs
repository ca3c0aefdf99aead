//! The routing as a value: which keys each block of queries may read, decided elsewhere.

/// Shape of the local part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    /// Query `t` of block `b` sees local positions `[max(0, b r - w + 1), t]`.
    Causal,
    /// Query `t` sees the `w` positions centred on it, `[t - (w - 1) / 2, t + w / 2]`, cut at the sequence's ends.
    Bidirectional,
}

/// Which keys each block of queries reads, for a batch of sequences and every KV head.
#[derive(Clone, Debug, PartialEq)]
pub struct Routing {
    /// `B`.
    pub batch: usize,
    /// Blocks per sequence; the first one holds position `start`.
    pub n_blocks: usize,
    /// `G`.
    pub n_kv_heads: usize,
    /// `N`, places for routed keys per block and KV head.
    pub n_routed: usize,
    /// `[B, n_blocks, G, N]` row numbers in the key and value tensors, padded with -1 at the end.
    pub indices: Vec<i32>,
    /// `[B, n_blocks, G]` the k-th best score of the block's candidates; -inf while there are fewer.
    pub tau: Vec<f32>,
    /// `w`, local keys, the query's own included.
    pub window: usize,
    /// `r`, positions per block.
    pub route_every: usize,
    /// Position of the first query.
    pub start: usize,
    /// The local key at position `p` is in row `p - key_offset`.
    pub key_offset: usize,
    /// Valid queries per sequence; the rest of each row of the batch is padding.
    pub lens: Vec<usize>,
    /// Causal or bidirectional.
    pub visibility: Visibility,
}

impl Routing {
    /// Block, counted from the first one here, of the query `t` rows after `start`.
    pub fn block_of(&self, t: usize) -> usize {
        match self.visibility {
            Visibility::Causal => (self.start + t) / self.route_every - self.start / self.route_every,
            Visibility::Bidirectional => 0,
        }
    }

    /// Routed rows of a block, without the padding.
    pub fn routed(&self, batch: usize, block: usize, kv_head: usize) -> &[i32] {
        let at = ((batch * self.n_blocks + block) * self.n_kv_heads + kv_head) * self.n_routed;
        let row = &self.indices[at..at + self.n_routed];
        let n = row.iter().position(|&i| i < 0).unwrap_or(self.n_routed);
        &row[..n]
    }

    /// `tau` of a block.
    pub fn tau_of(&self, batch: usize, block: usize, kv_head: usize) -> f32 {
        self.tau[(batch * self.n_blocks + block) * self.n_kv_heads + kv_head]
    }

    /// First local position that the block of the query `t` rows after `start` sees (causal).
    pub fn first_local(&self, t: usize) -> usize {
        ((self.start + t) / self.route_every * self.route_every + 1).saturating_sub(self.window)
    }
}
