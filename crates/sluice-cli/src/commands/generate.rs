//! `sluice generate`: continue a text token by token, streaming, in the bounded cache.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use sluice_engine::Sampler;

use crate::generation::Backend;
use crate::models::RoutingArgs;
use crate::progress::bytes;
use crate::sampling::SamplingArgs;

/// Arguments of `sluice generate`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Artifact, GGUF file, Hugging Face folder, pulled model or `tiny`
    #[arg(long)]
    model: String,
    /// Text to continue
    #[arg(long, conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// File with the text to continue
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Tokens to generate
    #[arg(long, short = 'n', value_name = "N", default_value_t = 64)]
    tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    routing: RoutingArgs,
    /// Print JSON with the text, the token ids and the speed, instead of streaming
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => std::fs::read_to_string(path).with_context(|| format!("cannot read {} as UTF-8 text", path.display()))?,
        (None, None) => bail!("nothing to continue; give --prompt TEXT or --prompt-file FILE"),
    };
    let mut backend = Backend::open(&args.model, &args.routing)?;
    let ids = backend.tokenizer().encode(&prompt);
    ensure!(!ids.is_empty(), "the prompt has no tokens");
    let mut state = backend.begin();
    let mut sampler = Sampler::new(args.sampling.config(), backend.vocab_size());
    if !args.json {
        print!("{prompt}");
    }
    let outcome = backend.extend(&mut state, &mut sampler, &ids, args.tokens, |text| {
        if !args.json {
            print!("{text}");
            let _ = std::io::stdout().flush();
        }
    })?;
    if args.json {
        let report = json!({
            "text": outcome.text, "token_ids": outcome.ids, "prompt_token_ids": ids, "policy": backend.policy().name(),
            "prefill_tokens_per_second": outcome.prefill_speed, "decode_tokens_per_second": outcome.decode_speed,
            "cache_bytes": state.cache_bytes(),
        });
        println!("{report}");
    } else {
        println!();
        eprintln!(
            "\n{} prompt tokens at {:.0}/s, {} tokens at {:.1}/s, cache {} ({})",
            ids.len(),
            outcome.prefill_speed,
            outcome.ids.len(),
            outcome.decode_speed,
            bytes(state.cache_bytes()),
            backend.describe()
        );
    }
    Ok(())
}
