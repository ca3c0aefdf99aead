//! Measures a finished student and fills in the report.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use sluice_eval::inside::Inside;
use sluice_eval::measured::Measured;
use sluice_eval::quality::{Comparison, quality_table};
use sluice_eval::recall::recall_rows;
use sluice_eval::report::{CostRow, CostSide, CostTable, CurvePoint, Curves, Recall, Report, RunSummary, StageCurve, StageRun};
use sluice_model::{AttentionPlan, Cache, Decoder, Policy, cost};
use sluice_spec::RoutingConfig;
use sluice_tensor::Device;
use sluice_train::distill::{Distiller, StepReport};

use crate::commands::devices::cpu_name;
use crate::distill_data::{DistillData, held_windows};
use crate::models::Loaded;
use crate::progress;

/// Tokens generated to measure decoding.
const DECODED: usize = 32;

/// What the report compares.
pub(crate) struct ReportPlan {
    /// Windows of each held-out text.
    pub(crate) windows: usize,
    /// Policies beside dense attention.
    pub(crate) policies: Vec<Policy>,
    /// Folder where finished comparisons are kept.
    pub(crate) measured: PathBuf,
}

/// Every section of the report, on held-out text.
pub(crate) fn measure(
    teacher: &str,
    loaded: &Loaded,
    distiller: &Distiller,
    data: &DistillData,
    plan: &ReportPlan,
    started: Instant,
) -> Result<Report> {
    let (model, config) = (&distiller.model, &distiller.config);
    let routing = RoutingConfig { gate_temperature: 0.0, ..config.routing };
    let mut budgets = config.budgets.clone();
    budgets.sort_unstable();
    let comparison = Comparison { routing, budgets, policies: plan.policies.clone() };
    let held: Vec<_> =
        data.held.iter().map(|(domain, documents)| (domain, held_windows(documents, config.context, plan.windows, 0))).collect();
    let recall = data.recall(loaded, config.context, plan.windows as u64);

    let cells = comparison.cells().len();
    let measured = Measured::new(&plan.measured, model);
    let passes =
        held.iter().map(|(_, w)| w.len() * cells).sum::<usize>() + recall.iter().map(|(_, d)| d.len() * (cells + 1)).sum::<usize>();
    let bar = progress::bar(passes as u64, "passes");
    bar.set_message("measuring on held-out text");
    let quality = held
        .iter()
        .filter(|(_, windows)| !windows.is_empty())
        .map(|(domain, windows)| quality_table(model, domain, windows, &comparison, &measured, || bar.inc(1)))
        .collect::<Result<_>>()?;
    let recall_section = (!recall.is_empty()).then(|| Recall {
        n_distractors: 8,
        example: example(loaded, &recall),
        rows: recall_rows(model, &recall, &comparison, || bar.inc(1)),
        ..Recall::default()
    });
    bar.finish_and_clear();

    let shown = held.iter().find_map(|(domain, windows)| Some(((*domain).clone(), windows.first()?.clone())));
    let shown = recall.first().and_then(|(_, docs)| Some(("recall document".to_string(), docs.first()?.tokens.clone()))).or(shown);
    let inside = shown.as_ref().map(|(_, tokens)| Inside::of(model, tokens, &routing));
    let mut report = Report::new(format!("Routed student of {teacher}"), summary(loaded, distiller, data, &routing));
    report.quality = quality;
    report.recall = recall_section;
    report.curves = Some(curves(&distiller.reports));
    report.cost = Some(costs(model, &routing, config.context));
    if let (Some(inside), Some((name, tokens))) = (inside, shown) {
        report.health = Some(inside.health());
        report.heat_map = Some(inside.heat_map(&name));
        report.sample = Some(inside.sample(&name, |i| loaded.tokenizer.decode(&tokens[i..=i])));
    }
    report.run.versions.push(("total seconds".into(), format!("{:.0}", started.elapsed().as_secs_f64())));
    Ok(report)
}

/// The command line of this process, as somebody would type it again.
pub(crate) fn command() -> String {
    let quoted = |arg: String| if arg.contains(char::is_whitespace) { format!("'{arg}'") } else { arg };
    std::iter::once("sluice".to_string()).chain(std::env::args().skip(1).map(quoted)).collect::<Vec<_>>().join(" ")
}

fn summary(loaded: &Loaded, distiller: &Distiller, data: &DistillData, routing: &RoutingConfig) -> RunSummary {
    let model = &distiller.model.config;
    let mut stages: Vec<StageRun> = Vec::new();
    for report in &distiller.reports {
        let name = report.work.name();
        if stages.last().is_none_or(|s| s.name != name) {
            stages.push(StageRun { name: name.into(), trained: "gates".into(), ..StageRun::default() });
        }
        let stage = stages.last_mut().expect("just pushed");
        stage.seconds += report.seconds;
        stage.tokens += report.tokens as u64;
        stage.steps += u64::from(report.loss.is_some());
        stage.host_waits += report.host_waits;
    }
    RunSummary {
        model: loaded.checkpoint.path.display().to_string(),
        teacher: distiller.teacher.as_ref().map(|_| "a second model".to_string()),
        n_params: Some(model.n_params() as u64),
        n_gate_params: Some(
            distiller.model.params().iter().filter(|p| sluice_model::decoder::is_gate(&p.name)).map(|p| p.value.len() as u64).sum(),
        ),
        routing: Some(*routing),
        stages,
        data: data.sources.clone(),
        seed: Some(distiller.config.seed),
        threads: Some(rayon::current_num_threads()),
        cpu: cpu_name(),
        peak_memory_bytes: peak_memory(),
        versions: vec![("sluice".into(), env!("CARGO_PKG_VERSION").into())],
        command: command(),
        ..RunSummary::default()
    }
}

fn example(loaded: &Loaded, recall: &[(f64, Vec<sluice_data::recall::RecallDocument>)]) -> String {
    let Some(document) = recall.first().and_then(|(_, d)| d.first()) else { return String::new() };
    let Some(answer) = document.answers.first() else { return String::new() };
    let text = |from: usize, to: usize| loaded.tokenizer.decode(&document.tokens[from..to]);
    format!(
        "planted: \"{}\"; asked {} tokens later: \"{}\"",
        text(answer.fact_pos.saturating_sub(8), answer.fact_pos + answer.len).trim(),
        answer.start - answer.fact_pos,
        text(answer.start.saturating_sub(8), answer.start + answer.len).trim()
    )
}

fn curves(reports: &[StepReport]) -> Curves {
    let mut stages: Vec<StageCurve> = Vec::new();
    for report in reports {
        let Some(loss) = report.loss else { continue };
        let name = report.work.name();
        if stages.last().is_none_or(|s| s.stage != name) {
            let loss =
                if report.work.stage() == 1 { "relative squared error of attention blocks" } else { "KL to the teacher, nats per token" };
            stages.push(StageCurve { stage: name.into(), loss: loss.into(), points: Vec::new() });
        }
        let points = &mut stages.last_mut().expect("just pushed").points;
        points.push(CurvePoint {
            step: points.len() as u64,
            loss: loss as f64,
            held_out: None,
            tokens_per_s: Some(report.tokens as f64 / report.seconds),
            kv_budget: Some(report.kv_budget),
        });
    }
    Curves { stages, ..Curves::default() }
}

/// Counted cost at several contexts; speed at the one of the run, measured on the CPU, where a bounded cache decodes.
fn costs(model: &Decoder, routing: &RoutingConfig, context: usize) -> CostTable {
    let model = &model.clone().to(&Device::Cpu);
    let rows = [context / 4, context, 4 * context, 16 * context, 256 * context].into_iter().map(|n| {
        let (dense, routed) = (cost::dense(&model.config, n), cost::routed(&model.config, routing, n));
        let side = |c: cost::Cost, policy| {
            let speed = (n == context).then(|| speed(model, AttentionPlan::new(policy, *routing), n));
            CostSide {
                cache_bytes: c.cache_bytes,
                attention_flops: c.attention_flops,
                prefill_tokens_per_s: speed.map(|s| s.0),
                decode_tokens_per_s: speed.map(|s| s.1),
                peak_memory_bytes: None,
            }
        };
        CostRow { context: n, dense: side(dense, Policy::Dense), routed: side(routed, Policy::Gate) }
    });
    CostTable {
        rows: rows.collect(),
        hardware: format!("{}, {} threads, f32", cpu_name(), rayon::current_num_threads()),
        ..CostTable::default()
    }
}

/// Prefill and decode speed in tokens per second at the end of a context of arbitrary tokens.
fn speed(model: &Decoder, plan: AttentionPlan, context: usize) -> (f64, f64) {
    let token = |i: usize| (i * 31 % model.config.vocab_size) as u32;
    let tokens: Vec<u32> = (0..context).map(token).collect();
    let mut cache = Cache::new(&model.config, plan);
    let started = Instant::now();
    for chunk in tokens.chunks(512) {
        model.forward_cached(chunk, &mut cache);
    }
    let prefill = context as f64 / started.elapsed().as_secs_f64();
    let started = Instant::now();
    for i in 0..DECODED {
        let h = model.forward_cached(&[token(i)], &mut cache);
        model.logits(&h.reshape([1, model.config.d_model]));
    }
    (prefill, DECODED as f64 / started.elapsed().as_secs_f64())
}

/// Largest resident memory of this process, where the operating system tells it.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}
