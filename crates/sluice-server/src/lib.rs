//! OpenAI-compatible HTTP in front of the int8 engine, and a chat page. The only crate that knows HTTP; it knows no training, no
//! tapes and no float models. The engine computes on a thread of its own ([`worker`]), which no request ever blocks.
//!
//! A request's way: [`http`] reads the body, [`api`] parses it, [`plan`] measures it against the model, `worker` computes it,
//! `answer` writes what comes back. No name or path from a request reaches the file system: sessions live in a map.

pub mod api;
pub mod plan;

mod answer;
mod auth;
mod connections;
mod error;
mod http;
mod metrics;
mod openapi;
mod sessions;
mod stop;
mod worker;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

pub use auth::ApiKeys;
pub use connections::ConnectionLimits;
pub use error::{ApiError, ErrorDetail};
use sluice_data::{ChatTemplate, Tokenizer};
use sluice_engine::scheduler::{Limits, Scheduler};
use sluice_engine::{Engine, EngineError};

use crate::http::App;
use crate::metrics::Metrics;
use crate::plan::ModelFacts;
use crate::sessions::Sessions;
use crate::worker::Worker;

/// Choices of whoever runs a server.
#[derive(Clone)]
pub struct ServerConfig {
    /// Name of the model in the API.
    pub model: String,
    /// Keys of which a client must have one.
    pub keys: ApiKeys,
    /// Tokens of a prompt and its answer at most. The cache does not grow with it; the model's training does not reach beyond its own.
    pub max_context: usize,
    /// Requests that may wait for slots.
    pub queue: usize,
    /// Prompt tokens in a pass in which others decode.
    pub prompt_tokens: usize,
    /// Stored states of earlier prompts.
    pub prefixes: usize,
    /// Sessions that are held.
    pub sessions: usize,
    /// Bytes of a JSON body at most.
    pub max_body: usize,
    /// How long a body may take.
    pub body_timeout: Duration,
    /// What clients may do with their connections.
    pub connections: ConnectionLimits,
    /// How long running answers may take after the signal to stop.
    pub drain: Duration,
}

impl ServerConfig {
    /// What `sluice serve` does when it is told nothing.
    pub fn new(model: impl Into<String>, max_context: usize) -> Self {
        Self {
            model: model.into(),
            keys: ApiKeys::default(),
            max_context,
            queue: 64,
            prompt_tokens: 64,
            prefixes: 8,
            sessions: 16,
            max_body: 4 << 20,
            body_timeout: Duration::from_secs(30),
            connections: ConnectionLimits::default(),
            drain: Duration::from_secs(30),
        }
    }
}

/// Threads that parse requests and turn their text into tokens.
const PLANNERS: usize = 2;

/// A server that cannot start, or that stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The engine cannot serve.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The system refused.
    #[error("cannot serve: {0}")]
    Io(#[from] std::io::Error),
    /// The model's chat template does not parse.
    #[error(transparent)]
    Template(#[from] sluice_data::ChatError),
}

/// Serve until `shutdown` completes, then finish what runs. Blocks; starts the engine's thread and those of HTTP.
pub fn serve(
    engine: Engine,
    tokenizer: Tokenizer,
    config: ServerConfig,
    listener: TcpListener,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let template = match tokenizer.text_config().chat_template {
        Some(_) => Some(ChatTemplate::of(&tokenizer)?),
        None => None,
    };
    let tokenizer = Arc::new(tokenizer);
    let facts = ModelFacts {
        name: config.model.clone(),
        tokenizer: Arc::clone(&tokenizer),
        template,
        vocab_size: engine.model().vocab_size,
        max_context: config.max_context,
        max_choices: engine.sequences(),
    };
    let metrics = Arc::new(Metrics::new());
    let (empty, model, routing) = (engine.new_sequence(), engine.model().clone(), *engine.routing());
    // The worker counts what waits; the scheduler's own bound is behind it and never met first.
    let limits = Limits { queue: config.queue + engine.sequences(), prompt_tokens: config.prompt_tokens, prefixes: config.prefixes };
    let scheduler = Scheduler::new(engine, limits)?;
    let (worker, thread) = Worker::start(scheduler, tokenizer, Arc::clone(&metrics), config.queue);
    // Few threads, since each keeps what it frees for itself for a while: with one for every request in a burst, the process grows.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).max_blocking_threads(PLANNERS).thread_name("http").enable_all().build()?;
    let sessions = Arc::new(Sessions::new(config.sessions));
    let app = Arc::new(App::new(facts, worker, sessions, metrics, config, empty, &model, routing));
    let result = runtime.block_on(http::run(app, listener, shutdown));
    // What still runs after the time to drain is dropped here, which cancels it and ends the engine's thread.
    runtime.shutdown_timeout(Duration::from_secs(1));
    let _ = thread.join();
    Ok(result?)
}

/// Completes at SIGTERM or Ctrl-C. Panics outside of a server's `shutdown`, which is polled inside its runtime.
pub async fn stop_signal() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut terminate) => {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt => {}
                }
            }
            Err(error) => {
                tracing::warn!(%error, "SIGTERM cannot be caught; only Ctrl-C drains");
                let _ = interrupt.await;
            }
        }
    }
    #[cfg(not(unix))]
    let _ = interrupt.await;
}
