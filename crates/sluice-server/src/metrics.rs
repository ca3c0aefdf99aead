//! What the server counts, in the text format of Prometheus.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Labels of a finished HTTP request. Routes are patterns, so their number is bounded.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(crate) struct RouteLabels {
    pub(crate) route: String,
    pub(crate) status: u16,
}

type Count = Counter<u64, AtomicU64>;

/// All counters, shared by the HTTP side and the engine's thread.
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) requests: Family<RouteLabels, Count>,
    pub(crate) queued: Gauge,
    pub(crate) slots: Gauge,
    pub(crate) cache_bytes: Gauge,
    pub(crate) sessions: Gauge,
    pub(crate) prefixes: Gauge,
    pub(crate) batch: Histogram,
    pub(crate) pass_seconds: Histogram,
    pub(crate) first_token_seconds: Histogram,
    pub(crate) next_token_seconds: Histogram,
    pub(crate) prompt_tokens: Count,
    pub(crate) cached_tokens: Count,
    pub(crate) generated_tokens: Count,
    pub(crate) admissions: Count,
    pub(crate) evictions: Count,
    pub(crate) cancelled: Count,
    pub(crate) refused: Count,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("sluice");
        let metrics = Self {
            requests: Family::default(),
            queued: Gauge::default(),
            slots: Gauge::default(),
            cache_bytes: Gauge::default(),
            sessions: Gauge::default(),
            prefixes: Gauge::default(),
            batch: Histogram::new(exponential_buckets(1.0, 2.0, 9)),
            pass_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 13)),
            first_token_seconds: Histogram::new(exponential_buckets(0.005, 2.0, 14)),
            next_token_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 13)),
            prompt_tokens: Count::default(),
            cached_tokens: Count::default(),
            generated_tokens: Count::default(),
            admissions: Count::default(),
            evictions: Count::default(),
            cancelled: Count::default(),
            refused: Count::default(),
            registry: Registry::default(),
        };
        registry.register("http_requests", "Finished HTTP requests", metrics.requests.clone());
        registry.register("queue_requests", "Requests that wait for slots", metrics.queued.clone());
        registry.register("slots_in_use", "Sequences being computed", metrics.slots.clone());
        registry.register("cache_bytes", "Bytes of keys and values of the slots in use", metrics.cache_bytes.clone());
        registry.register("sessions", "Sessions held", metrics.sessions.clone());
        registry.register("prefixes", "Stored states of earlier prompts", metrics.prefixes.clone());
        registry.register("batch_size", "Sequences that decoded in a pass", metrics.batch.clone());
        registry.register("pass_seconds", "Time of a pass over the model", metrics.pass_seconds.clone());
        registry.register("time_to_first_token_seconds", "From a request to its first token", metrics.first_token_seconds.clone());
        registry.register("inter_token_seconds", "Between tokens of an answer", metrics.next_token_seconds.clone());
        registry.register("prompt_tokens", "Prompt tokens read", metrics.prompt_tokens.clone());
        registry.register("cached_prompt_tokens", "Prompt tokens that stored prefixes saved", metrics.cached_tokens.clone());
        registry.register("generated_tokens", "Tokens generated", metrics.generated_tokens.clone());
        registry.register("cache_admissions", "Keys admitted to slots of the cache", metrics.admissions.clone());
        registry.register("cache_evictions", "Keys that the cache let go", metrics.evictions.clone());
        registry.register("requests_cancelled", "Requests whose client went away", metrics.cancelled.clone());
        registry.register("requests_refused", "Requests refused because the queue was full", metrics.refused.clone());
        Self { registry, ..metrics }
    }

    /// Everything as text.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).expect("a string takes any text");
        text
    }
}
