//! `sluice generate`: continue a text token by token, streaming, in the bounded cache.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use sluice_model::{AttentionPlan, Cache};

use crate::models::{self, Loaded, RoutingArgs};
use crate::progress::bytes;
use crate::sampling::{Sampler, SamplingArgs};

/// Prompt tokens that go through the model at once.
const CHUNK: usize = 512;

/// Arguments of `sluice generate`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face folder, pulled model or `tiny`
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
    let loaded = models::load(&args.model, args.routing.gates.as_deref())?;
    let plan = args.routing.plan(&loaded)?;
    let ids = loaded.tokenizer.encode(&prompt);
    ensure!(!ids.is_empty(), "the prompt has no tokens");
    let mut generation = Generation::new(&loaded, plan, Sampler::new(&args.sampling))?;
    if !args.json {
        print!("{prompt}");
    }
    let outcome = generation.extend(&ids, args.tokens, |text| {
        if !args.json {
            print!("{text}");
            let _ = std::io::stdout().flush();
        }
    });
    let cache_bytes = generation.cache.bytes() as u64;
    if args.json {
        let report = json!({
            "text": outcome.text, "token_ids": outcome.ids, "prompt_token_ids": ids, "policy": plan.policy.name(),
            "prefill_tokens_per_second": outcome.prefill_speed, "decode_tokens_per_second": outcome.decode_speed, "cache_bytes": cache_bytes,
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
            bytes(cache_bytes),
            plan.policy.name()
        );
    }
    Ok(())
}

/// One sequence that grows by prompts and answers; chat keeps it across turns.
pub(crate) struct Generation<'a> {
    loaded: &'a Loaded,
    sampler: Sampler,
    pub(crate) cache: Cache,
}

/// What one call of [`Generation::extend`] produced.
pub(crate) struct Outcome {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    pub(crate) prefill_speed: f64,
    pub(crate) decode_speed: f64,
}

impl<'a> Generation<'a> {
    pub(crate) fn new(loaded: &'a Loaded, plan: AttentionPlan, sampler: Sampler) -> Result<Self> {
        ensure!(
            plan.policy.is_causal_and_static(),
            "policy {} needs the attention of the whole text and cannot generate; choose dense, gate, streaming or random",
            plan.policy.name()
        );
        Ok(Self { loaded, sampler, cache: Cache::new(&loaded.model.config, plan) })
    }

    /// Read `prompt`, then generate up to `n` tokens or an end token; `show` gets the text as it comes.
    pub(crate) fn extend(&mut self, prompt: &[u32], n: usize, mut show: impl FnMut(&str)) -> Outcome {
        let model = &self.loaded.model;
        let started = Instant::now();
        let mut last = None;
        for chunk in prompt.chunks(CHUNK) {
            let h = model.forward_cached(chunk, &mut self.cache); // [1, T, M]
            let m = model.config.d_model;
            last = Some(sluice_tensor::Tensor::from_vec(h.f32()[(chunk.len() - 1) * m..].to_vec(), [1, m]));
        }
        let prefill_speed = prompt.len() as f64 / started.elapsed().as_secs_f64();
        let started = Instant::now();
        let mut decoder = self.loaded.tokenizer.stream();
        let (mut ids, mut text) = (Vec::new(), String::new());
        let mut h = last.expect("the prompt has tokens");
        while ids.len() < n {
            let id = self.sampler.sample(model.logits(&h).f32());
            ids.push(id);
            if self.loaded.checkpoint.text.eos.contains(&id) {
                break;
            }
            let piece = decoder.push(id);
            show(&piece);
            text.push_str(&piece);
            if ids.len() < n {
                h = model.forward_cached(&[id], &mut self.cache).reshape([1, model.config.d_model]);
            }
        }
        let rest = decoder.finish();
        show(&rest);
        text.push_str(&rest);
        let decode_speed = ids.len() as f64 / started.elapsed().as_secs_f64();
        Outcome { text, ids, prefill_speed, decode_speed }
    }
}
