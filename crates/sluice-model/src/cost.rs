//! What a forward pass costs, counted from shapes alone: FLOPs, bytes of the cache, keys read.
//! The benchmark compares these with what it measured.

use serde::{Deserialize, Serialize};
use sluice_spec::{ModelConfig, RoutingConfig};

/// Counted cost of prefilling `context` tokens and of decoding the next one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Tokens of context.
    pub context: usize,
    /// Bytes of keys and values at the end of the context, all layers, f32.
    pub cache_bytes: u64,
    /// Multiply-adds counted twice, attention scores and values over the whole prefill, all layers.
    pub attention_flops: u64,
    /// Multiply-adds counted twice, projections, MLP and gates over the whole prefill, without the output head.
    pub linear_flops: u64,
    /// Keys that the query after the context reads, per layer and KV head.
    pub keys_read: u64,
}

/// Bytes of one element of an f32 cache.
const ELEMENT: u64 = 4;

/// Cost of plain causal attention.
pub fn dense(config: &ModelConfig, context: usize) -> Cost {
    let t = context as u64;
    Cost {
        context,
        cache_bytes: kv_bytes_per_key(config) * t,
        attention_flops: flops_per_pair(config) * (t * (t + 1) / 2),
        linear_flops: linear_flops_per_token(config, false) * t,
        keys_read: t,
    }
}

/// Cost of routed attention: the cache is allocated once, whatever the context.
pub fn routed(config: &ModelConfig, routing: &RoutingConfig, context: usize) -> Cost {
    let pairs: u64 = (0..context).step_by(routing.route_every).map(|first| block_pairs(routing, first, context)).sum();
    let last_block = context / routing.route_every * routing.route_every;
    let first_local = (last_block + 1).saturating_sub(routing.window);
    Cost {
        context,
        cache_bytes: kv_bytes_per_key(config) * routing.cached_keys() as u64,
        attention_flops: flops_per_pair(config) * pairs,
        linear_flops: linear_flops_per_token(config, true) * context as u64,
        keys_read: (routing.top_k.min(first_local) + context + 1 - first_local) as u64,
    }
}

/// (query, key) pairs of the block that starts at `first`.
fn block_pairs(routing: &RoutingConfig, first: usize, context: usize) -> u64 {
    let end = (first + routing.route_every).min(context);
    let first_local = (first + 1).saturating_sub(routing.window);
    let routed = routing.top_k.min(first_local) as u64;
    let n = (end - first) as u64;
    let local: u64 = (first..end).map(|t| (t + 1 - first_local) as u64).sum();
    n * routed + local
}

/// Keys and values of one position, all layers.
fn kv_bytes_per_key(config: &ModelConfig) -> u64 {
    2 * ELEMENT * (config.n_layers * config.n_kv_heads * config.head_dim) as u64
}

/// `q k` and `p v` of one pair, all layers and query heads.
fn flops_per_pair(config: &ModelConfig) -> u64 {
    4 * (config.n_layers * config.n_heads * config.head_dim) as u64
}

fn linear_flops_per_token(config: &ModelConfig, gated: bool) -> u64 {
    let (m, d) = (config.d_model, config.head_dim);
    let gate = if gated { config.n_kv_heads * m } else { 0 };
    let layer = m * (2 * config.n_heads + 2 * config.n_kv_heads) * d + 3 * m * config.d_ff + gate;
    2 * (config.n_layers * layer) as u64
}

#[cfg(test)]
mod tests {
    use sluice_spec::Architecture;
    use sluice_testkit::small_model;

    use super::*;

    fn config() -> ModelConfig {
        ModelConfig { d_ff: 64, vocab_size: 96, max_seq_len: 4096, ..small_model(Architecture::Llama) }
    }

    #[test]
    fn cache_is_constant_from_4k_to_1m() {
        let routing = RoutingConfig::default();
        let at = |n| routed(&config(), &routing, n).cache_bytes;
        assert_eq!(at(4096), at(1 << 20));
        assert_eq!(at(4096), 2 * 4 * 2 * 2 * 8 * 447);
    }

    #[test]
    fn pairs_equal_a_count_by_hand() {
        let routing = RoutingConfig { window: 3, top_k: 2, route_every: 4, n_sink: 0, ..Default::default() };
        // Query t of block b sees min(k, l_b) routed keys and [l_b, t].
        let by_hand: u64 = (0..23usize)
            .map(|t| {
                let first_local = (t / 4 * 4 + 1).saturating_sub(3);
                (2.min(first_local) + t + 1 - first_local) as u64
            })
            .sum();
        assert_eq!(routed(&config(), &routing, 23).attention_flops, by_hand * flops_per_pair(&config()));
    }

    #[test]
    fn a_budget_of_everything_costs_the_same_attention_as_dense() {
        let routing = RoutingConfig { top_k: 100_000, ..Default::default() };
        assert_eq!(routed(&config(), &routing, 1000).attention_flops, dense(&config(), 1000).attention_flops);
        assert_eq!(routed(&config(), &routing, 1000).keys_read, 1001);
    }
}
