//! `sluice serve`: an artifact behind OpenAI-compatible HTTP.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use sluice_server::{ApiKeys, ConnectionLimits, ServerConfig};

use crate::generation::{artifact_folder, open_artifact};
use crate::models::RoutingArgs;

/// Arguments of `sluice serve`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Artifact made by `sluice quantize`
    #[arg(long)]
    model: String,
    /// Address to listen on; other machines reach only what is not a loopback address
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Name of the model in the API [default: name of its folder]
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// File with one API key a line; without it every client is let in
    #[arg(long, value_name = "F")]
    api_key_file: Option<PathBuf>,
    /// Texts that are computed together
    #[arg(long, value_name = "N", default_value_t = 16)]
    max_sequences: usize,
    /// Tokens of a prompt and its answer at most [default: what the model was trained for]
    #[arg(long, value_name = "N")]
    max_context: Option<usize>,
    /// Requests that may wait; more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 64)]
    queue: usize,
    /// Sessions that are held; the one that was not used for longest leaves
    #[arg(long, value_name = "N", default_value_t = 16)]
    sessions: usize,
    /// Stored states of earlier prompts, each as large as a sequence's cache; 0 stores none
    #[arg(long, value_name = "N", default_value_t = 8)]
    prefixes: usize,
    /// Seconds that running answers may take after SIGTERM
    #[arg(long, value_name = "S", default_value_t = 30)]
    drain: u64,
    /// Check the digests of the artifact's files first
    #[arg(long)]
    verify: bool,
    /// Write the log as JSON, a line an event
    #[arg(long)]
    log_json: bool,
    #[command(flatten)]
    routing: RoutingArgs,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let Some(folder) = artifact_folder(&args.model) else {
        bail!("{} is no artifact; make one with `sluice quantize --model MODEL --out DIR`", args.model);
    };
    ensure!((1..=1024).contains(&args.max_sequences), "--max-sequences is {}; expected 1 to 1024", args.max_sequences);
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false);
    if args.log_json {
        log.json().init()
    } else {
        log.init()
    }
    let keys = match &args.api_key_file {
        Some(path) => read_keys(path)?,
        None => ApiKeys::default(),
    };
    if args.api_key_file.is_none() && !args.listen.ip().is_loopback() {
        eprintln!("warning: {} is no loopback address and there is no --api-key-file: whoever reaches it may use it", args.listen);
    }
    // Before the model, which takes longer to load than an address to be refused.
    let listener = TcpListener::bind(args.listen).with_context(|| format!("cannot listen on {}", args.listen))?;
    let (engine, tokenizer) = open_artifact(&folder, &args.routing, args.verify, args.max_sequences)?;
    let folder_name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
    let name = args.model_name.clone().or(folder_name).unwrap_or_else(|| "model".into());
    let max_context = args.max_context.unwrap_or(engine.model().max_seq_len);
    // Room for everyone who may wait, and for those who are told that there is none.
    let connections = ConnectionLimits::default();
    let connections = ConnectionLimits { most: connections.most.max(2 * (args.queue + args.max_sequences)), ..connections };
    let config = ServerConfig {
        connections,
        queue: args.queue,
        sessions: args.sessions,
        prefixes: args.prefixes,
        drain: Duration::from_secs(args.drain),
        keys,
        ..ServerConfig::new(name.as_str(), max_context)
    };
    let cache = engine.new_sequence().cache_bytes();
    eprintln!(
        "{name} on http://{}: {} sequences of {} each, up to {max_context} tokens, {} threads, {}",
        listener.local_addr()?,
        args.max_sequences,
        crate::progress::bytes(cache as u64),
        engine.threads(),
        engine.instructions().name()
    );
    sluice_server::serve(engine, tokenizer, config, listener, sluice_server::stop_signal())?;
    Ok(())
}

fn read_keys(path: &Path) -> Result<ApiKeys> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {} as UTF-8 text", path.display()))?;
    ApiKeys::parse(&text).map_err(|e| anyhow!("{}: {e}", path.display()))
}
