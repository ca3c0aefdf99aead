//! `sluice eval needle`: facts planted at depths of a long text, asked for at its end.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use sluice_data::embedded::{self, Split};
use sluice_eval::bootstrap::Bootstrap;
use sluice_eval::needle::{Continuation, Filler, NeedleConfig, NeedleScore, ask, prompts, summarise};
use sluice_eval::report::Recall;
use sluice_kernels::output_head::{self, Wanted};
use sluice_model::{AttentionPlan, Cache, Decoder, Policy};
use sluice_tensor::Tensor;

use crate::models::{self, RoutingArgs};
use crate::progress;

/// Arguments of `sluice eval needle`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face folder, pulled model or `tiny`
    #[arg(long)]
    model: String,
    /// Text to plant the facts in [default: embedded held-out prose]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Lengths of the prompts in tokens
    #[arg(long, value_name = "N", num_args = 1.., default_values_t = [4096])]
    context: Vec<usize>,
    /// Depths of the fact, 0 (start) to 1 (end)
    #[arg(long, value_name = "X", num_args = 1.., default_values_t = [0.0, 0.25, 0.5, 0.75, 1.0])]
    depth: Vec<f64>,
    /// Prompts for each length and depth
    #[arg(long, value_name = "N", default_value_t = 5)]
    prompts: usize,
    /// Other facts of the same form in the text
    #[arg(long, value_name = "N", default_value_t = 3)]
    distractors: usize,
    /// Seed of keys, values and places
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    routing: RoutingArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let loaded = models::load(&args.model, args.routing.gates.as_deref())?;
    let plan = args.routing.plan(&loaded)?;
    ensure!(
        plan.policy.is_causal_and_static(),
        "policy {} needs the attention of the whole text; choose dense, gate, streaming or random",
        plan.policy.name()
    );
    let text = match &args.text {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("cannot read {} as UTF-8 text", path.display()))?,
        None => embedded::documents()
            .into_iter()
            .filter(|d| d.split == Split::Held && d.domain != "code")
            .map(|d| d.text)
            .collect::<Vec<_>>()
            .join("\n"),
    };
    let tokenize = |text: &str| loaded.tokenizer.encode(text);
    let config = NeedleConfig {
        contexts: args.context.clone(),
        depths: args.depth.clone(),
        n_prompts: args.prompts,
        n_distractors: args.distractors,
        seed: args.seed,
        ..NeedleConfig::default()
    };
    let prompts = prompts(&config, &Filler::new(&text, &tokenize), &tokenize)?;
    let mut plans = vec![AttentionPlan::dense()];
    plans.extend((plan.policy != Policy::Dense).then_some(plan));
    let bar = progress::bar((prompts.len() * plans.len()) as u64, "prompts");
    let mut scores: Vec<NeedleScore> = Vec::new();
    for plan in plans {
        let budget = |context| if plan.policy == Policy::Dense { context } else { plan.routing.kv_budget() };
        let mut answer = |prompt: &[u32], answers: &[&[u32]]| Ok(continuations(&loaded.model, plan, prompt, answers));
        scores.extend(ask(&prompts, plan.policy.name(), budget, &mut answer, &mut |_| bar.inc(1))?);
    }
    bar.finish_and_clear();
    let recall = Recall { n_distractors: args.distractors, rows: summarise(&scores, &Bootstrap::default()), ..Recall::default() };
    if args.json {
        println!("{}", serde_json::to_string(&recall)?);
        return Ok(());
    }
    println!(
        "{:<10} {:>7} {:>8} {:>6} {:>8}  {:>7} {:>12} {:>13}",
        "policy", "budget", "context", "depth", "prompts", "exact", "answer token", "nll - dense"
    );
    for row in &recall.rows {
        let depth = row.depth.map_or("all".into(), |d| format!("{d:.2}"));
        let above = row.nll_above_dense.map_or(String::new(), |e| format!("{:+.3}", e.mean));
        println!(
            "{:<10} {:>7} {:>8} {:>6} {:>8}  {:>5.0} % {:>10.0} % {:>13}",
            row.policy,
            row.kv_budget,
            row.context,
            depth,
            row.n_prompts,
            100.0 * row.exact_match.mean,
            100.0 * row.token_accuracy.mean,
            above
        );
    }
    Ok(())
}

/// The model's view of every answer after a prompt that is read once.
fn continuations(model: &Decoder, plan: AttentionPlan, prompt: &[u32], answers: &[&[u32]]) -> Vec<Continuation> {
    let m = model.config.d_model;
    let mut cache = Cache::new(&model.config, plan);
    let mut last = Vec::new();
    for chunk in prompt.chunks(512) {
        let h = model.forward_cached(chunk, &mut cache); // [1, T, M]
        last = h.f32()[(chunk.len() - 1) * m..].to_vec();
    }
    let view = |answer: &&[u32]| {
        let mut rows = last.clone();
        if answer.len() > 1 {
            rows.extend_from_slice(model.forward_cached(&answer[..answer.len() - 1], &mut cache.clone()).f32());
        }
        let h = Tensor::from_vec(rows, [answer.len(), m]);
        let scored = output_head::cross_entropy(&h, &model.head().value, answer, &vec![1.0; answer.len()], Wanted::NOTHING);
        Continuation { nll: scored.nll, top1: scored.top1 }
    };
    answers.iter().map(view).collect()
}
