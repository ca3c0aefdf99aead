//! What the router is asked to keep: the budget of a routed attention layer.
//! Semantics: ARCHITECTURE.md, "Routed attention". Knows nothing about scores or kernels.

use serde::{Deserialize, Serialize};

use crate::model::ConfigError;

/// How many gate scores a layer computes per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateHeads {
    /// One score per KV head.
    KvHead,
    /// One score per layer, shared by its KV heads.
    Shared,
}

/// Budget and rhythm of routed attention, the same for every layer of a model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoutingConfig {
    /// Keys visible locally, the query's own included. At least 1.
    pub window: usize,
    /// Routed keys per KV head, sinks included. 0 leaves the window alone.
    pub top_k: usize,
    /// The router decides at positions that are multiples of this. At least 1.
    pub route_every: usize,
    /// The first `n_sink` tokens have score +inf, so they are always kept.
    pub n_sink: usize,
    /// One score per KV head or one per layer.
    pub gate_heads: GateHeads,
    /// `T_g` of the bias `log sigmoid((s - tau) / T_g)` on routed keys; 0 switches the bias off.
    pub gate_temperature: f32,
}

impl Default for RoutingConfig {
    fn default() -> Self {
        Self { window: 128, top_k: 256, route_every: 64, n_sink: 4, gate_heads: GateHeads::KvHead, gate_temperature: 0.0 }
    }
}

/// Larger windows and budgets are nobody's: their sums would overflow, or their caches fill every memory.
const MAX_SIZE: usize = 1 << 24;

/// Names of the presets, in the order of their budgets.
pub const PRESETS: [&str; 4] = ["paper", "edge", "default", "long"];

impl RoutingConfig {
    /// A preset is a name for a config: `paper`, `edge`, `default` or `long`.
    pub fn preset(name: &str) -> Result<Self, ConfigError> {
        let base = Self::default();
        match name {
            "paper" => Ok(Self { window: 8, top_k: 32, gate_heads: GateHeads::Shared, ..base }),
            "edge" => Ok(Self { window: 64, top_k: 192, ..base }),
            "default" => Ok(base),
            "long" => Ok(Self { window: 256, top_k: 1024, ..base }),
            _ => Err(ConfigError::new(format!("unknown routing preset `{name}`; expected one of {}", PRESETS.join(", ")))),
        }
    }

    /// Tokens that one query can see at least: `window + top_k`.
    pub fn kv_budget(&self) -> usize {
        self.window + self.top_k
    }

    /// Keys that decoding caches per KV head, for any length of text.
    pub fn cached_keys(&self) -> usize {
        self.top_k + self.window + self.route_every - 1
    }

    /// The same routing at another total budget: `window` stays, `top_k` takes the rest.
    pub fn with_kv_budget(&self, kv_budget: usize) -> Result<Self, ConfigError> {
        if kv_budget <= self.window {
            return Err(ConfigError::new(format!(
                "a total budget of {kv_budget} tokens leaves no routed keys beside a window of {}; expected more than the window",
                self.window
            )));
        }
        Ok(Self { top_k: kv_budget - self.window, ..*self })
    }

    /// Check the invariants that everything downstream relies on.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.window == 0 {
            return Err(ConfigError::new("routing window is 0; expected at least 1, since a query always sees itself"));
        }
        if self.route_every == 0 {
            return Err(ConfigError::new("route_every is 0; expected at least 1"));
        }
        for (name, size) in [("window", self.window), ("top_k", self.top_k), ("route_every", self.route_every), ("n_sink", self.n_sink)] {
            if size > MAX_SIZE {
                return Err(ConfigError::new(format!("{name} is {size}; expected at most {MAX_SIZE}")));
            }
        }
        if !(self.gate_temperature >= 0.0 && self.gate_temperature.is_finite()) {
            return Err(ConfigError::new(format!("gate_temperature is {}; expected a finite number >= 0", self.gate_temperature)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid_and_unknown_names_are_refused() {
        for name in PRESETS {
            RoutingConfig::preset(name).unwrap().validate().unwrap();
        }
        let error = RoutingConfig::preset("tiny").unwrap_err().to_string();
        assert!(error.contains("tiny") && error.contains("paper"), "{error}");
    }

    #[test]
    fn budget_must_exceed_the_window() {
        let config = RoutingConfig::default();
        assert_eq!(config.with_kv_budget(512).unwrap().top_k, 384);
        assert!(config.with_kv_budget(128).is_err());
    }
    #[test]
    fn sizes_whose_sums_overflow_are_refused() {
        for size in [usize::MAX, MAX_SIZE + 1] {
            for config in [
                RoutingConfig { window: size, ..Default::default() },
                RoutingConfig { top_k: size, ..Default::default() },
                RoutingConfig { route_every: size, ..Default::default() },
                RoutingConfig { n_sink: size, ..Default::default() },
            ] {
                assert!(config.validate().unwrap_err().to_string().contains("at most"));
            }
        }
        RoutingConfig { window: MAX_SIZE, top_k: MAX_SIZE, ..Default::default() }.validate().unwrap();
    }
}
