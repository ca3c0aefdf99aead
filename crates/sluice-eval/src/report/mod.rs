//! The report of a run as plain data, and the three files made of it: `report.json` (this data), `report.md` and `report.html`.
//! Knows nothing about models: whoever measures fills it in. Every section is optional; what is absent is not rendered.
//!
//! Names are those of ARCHITECTURE.md (`kv_budget`, `window`, `top_k`) and stay stable, since programs read `report.json`. Shares are
//! fractions (0.125, not 12.5), times seconds, sizes bytes, losses nats per token.

mod html;
mod markdown;

mod cost;
mod kept;
mod quality;
mod recall;
pub mod scaling;
mod sections;
mod training;

mod numbers;
mod plots;
mod style;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sluice_spec::RoutingConfig;

use crate::bootstrap::{Estimate, nan_as_null};

/// Version of the layout of `report.json`; rises when a name or a meaning changes, not when one is added.
pub const FORMAT_VERSION: u32 = 1;

/// Everything that a run has to show.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// Heading of the page.
    pub title: String,
    /// What ran, on what.
    pub run: RunSummary,
    /// Loss above dense against the budget, one table per text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub quality: Vec<QualityTable>,
    /// Recall of planted facts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recall: Option<Recall>,
    /// Cache bytes and speed by context length.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<CostTable>,
    /// Training curves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub curves: Option<Curves>,
    /// Whether routing is stable.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// What each layer keeps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heat_map: Option<HeatMap>,
    /// A passage, token by token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<Sample>,
}

/// What ran, on what, from which command. Empty fields are not shown.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunSummary {
    /// Name of the student.
    pub model: String,
    /// Name of the teacher, when it is not the student's own dense weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// Parameters of the base model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_params: Option<u64>,
    /// Parameters of the gates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_gate_params: Option<u64>,
    /// Name of the routing preset.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub preset: String,
    /// The routing that the preset and the options came to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing: Option<RoutingConfig>,
    /// Stages in the order in which they ran.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<StageRun>,
    /// Texts trained on, in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<String>,
    /// Seed of the run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Threads used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    /// Name of the CPU.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cpu: String,
    /// Largest memory of the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
    /// What a training step holds on its device, and how it was made to fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_memory: Option<StepMemory>,
    /// When the run began, ISO 8601.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub started: String,
    /// Versions of what produced the numbers: (name, version).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub versions: Vec<(String, String)>,
    /// The command of the run.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub command: String,
}

/// What a training step holds on its device, and how it was made to fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepMemory {
    /// Documents that go through the stack together.
    pub documents_at_a_time: usize,
    /// Layers whose activations are computed again in the backward pass.
    pub recomputed_layers: usize,
    /// Largest number of bytes that a step holds, counted from shapes.
    pub counted_peak_bytes: u64,
    /// The same, measured.
    pub measured_peak_bytes: u64,
}

/// One stage of a distillation run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageRun {
    /// Name, for instance `features`.
    pub name: String,
    /// What it trained, in words: `gates` or `gates and base weights`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub trained: String,
    /// Wall time.
    #[serde(with = "nan_as_null")]
    pub seconds: f64,
    /// Tokens read.
    pub tokens: u64,
    /// Optimizer steps; 0 for a closed form.
    pub steps: u64,
    /// How often the host waited for a GPU inside all these items together, before their figures were read.
    #[serde(default)]
    pub host_waits: u64,
}

/// Loss above dense at several budgets, on one text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QualityTable {
    /// The text, for instance `prose: Persuasion`.
    pub text: String,
    /// Whether it was kept out of training.
    #[serde(default)]
    pub held_out: bool,
    /// Tokens of one document.
    pub context: usize,
    /// Documents read.
    pub n_documents: usize,
    /// Loss of dense attention on all positions past the smallest budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense_nll: Option<Estimate>,
    /// The same loss in bits per byte of text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense_bits_per_byte: Option<f64>,
    /// Command that made the numbers; empty when it is the run's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command: String,
    /// One row per budget and policy.
    pub rows: Vec<QualityRow>,
}

/// One policy at one budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QualityRow {
    /// `dense`, `gate`, `streaming`, `random`, `h2o`, `oracle`, or a name of your own.
    pub policy: String,
    /// Tokens kept per KV head in all: `window + top_k`.
    pub kv_budget: usize,
    /// First position counted: only positions past the budget say anything.
    pub positions_from: usize,
    /// Nats per token above dense on the same positions.
    pub delta_nll: Estimate,
    /// `KL(dense || policy)`, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<Estimate>,
    /// Share of positions whose most likely token is dense's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1_agreement: Option<Estimate>,
    /// Share of StreamingLLM's gap to dense that this policy closes at the same budget ([`crate::bootstrap::Bootstrap::gap_closed`]);
    /// when absent it is computed from the means, without an interval.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap_closed: Option<Estimate>,
    /// Nats per token above StreamingLLM at the same budget, token by token; negative is better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub above_streaming: Option<Estimate>,
}

impl QualityTable {
    /// [`QualityRow::gap_closed`], or the same from the means of the table.
    pub fn gap_closed(&self, row: &QualityRow) -> Option<f64> {
        if let Some(estimate) = row.gap_closed {
            return Some(estimate.mean);
        }
        if row.policy == "streaming" || row.policy == "dense" {
            return None;
        }
        let baseline = self.rows.iter().find(|r| r.policy == "streaming" && r.kv_budget == row.kv_budget)?.delta_nll.mean;
        (baseline > 0.0).then(|| 1.0 - row.delta_nll.mean / baseline)
    }
}

/// Recall of planted facts, for instance from [`crate::needle::summarise`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recall {
    /// Command that made the numbers; empty when it is the run's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command: String,
    /// Other facts planted beside the one asked for.
    pub n_distractors: usize,
    /// An example: fact, question and answer in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub example: String,
    /// One row per policy, budget, context and depth.
    pub rows: Vec<RecallRow>,
}

/// One policy at one budget, context and depth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecallRow {
    /// As in [`QualityRow::policy`].
    pub policy: String,
    /// Tokens kept per KV head in all; the context itself for `dense`.
    pub kv_budget: usize,
    /// Tokens of the prompt.
    pub context: usize,
    /// Where the fact stands, 0 = start; absent for all depths together.
    pub depth: Option<f64>,
    /// Questions asked.
    pub n_prompts: usize,
    /// Share of answer tokens that are the most likely ones.
    pub token_accuracy: Estimate,
    /// Share of answers that greedy decoding gives word for word.
    pub exact_match: Estimate,
    /// Share of answers in which the true value is likelier than every other value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranked_first: Option<Estimate>,
    /// Nats per answer token above dense.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nll_above_dense: Option<Estimate>,
}

/// Cache and speed, dense beside routed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CostTable {
    /// Command that made the numbers; empty when it is the run's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command: String,
    /// Hardware of the measured columns; empty when it is the run's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hardware: String,
    /// One row per context length.
    pub rows: Vec<CostRow>,
}

/// One context length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CostRow {
    /// Tokens of context.
    pub context: usize,
    /// Plain causal attention.
    pub dense: CostSide,
    /// Routed attention.
    pub routed: CostSide,
}

/// Counted and measured cost of one side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CostSide {
    /// Bytes of cached keys and values at the end of the context.
    pub cache_bytes: u64,
    /// FLOPs of attention over the whole prompt.
    pub attention_flops: u64,
    /// Measured prefill speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_tokens_per_s: Option<f64>,
    /// Measured decode speed at the end of the context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decode_tokens_per_s: Option<f64>,
    /// Measured largest memory of the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_memory_bytes: Option<u64>,
}

/// Training curves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curves {
    /// Command that made the numbers; empty when it is the run's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command: String,
    /// One curve per stage.
    pub stages: Vec<StageCurve>,
}

/// Curve of one stage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageCurve {
    /// Name, as in [`StageRun::name`].
    pub stage: String,
    /// What the loss is, for instance `KL to the teacher, nats per token`.
    pub loss: String,
    /// Logged steps in order.
    pub points: Vec<CurvePoint>,
}

/// One logged step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Optimizer step.
    pub step: u64,
    /// Loss of the step.
    #[serde(with = "nan_as_null")]
    pub loss: f64,
    /// The same loss on text that is not trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
    /// Training speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_s: Option<f64>,
    /// Budget of the step, while it is ramped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_budget: Option<usize>,
}

/// Whether routing is stable, layer by layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// Command that made the numbers; empty when it is the run's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command: String,
    /// Tokens of the texts looked at.
    pub context: usize,
    /// One row per layer.
    pub layers: Vec<LayerHealth>,
}

/// One layer, mean over its KV heads and the texts looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerHealth {
    /// Layer, from 0.
    pub layer: usize,
    /// Jaccard index of the kept sets of consecutive blocks, of those that are full.
    pub jaccard: f64,
    /// Quantiles of `|score - tau|`.
    pub margin: Quantiles,
    /// Tokens admitted per KV head and text.
    pub admissions: f64,
    /// Admissions that scores without any order in time would give: `k (1 + ln((T - w) / k))`.
    pub expected_admissions: f64,
    /// Share of dense attention mass that falls on kept and local keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_mass: Option<f64>,
}

/// Five quantiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// 5 %.
    pub p05: f64,
    /// 25 %.
    pub p25: f64,
    /// Median.
    pub p50: f64,
    /// 75 %.
    pub p75: f64,
    /// 95 %.
    pub p95: f64,
}

impl Quantiles {
    /// Quantiles of `values`, which get sorted; zeros for none.
    pub fn of(values: &mut [f64]) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        values.sort_by(f64::total_cmp);
        let at = |p| crate::bootstrap::quantile(values, p);
        Self { p05: at(0.05), p25: at(0.25), p50: at(0.5), p75: at(0.75), p95: at(0.95) }
    }
}

/// Share of tokens kept, by layer (or layer and KV head) and place in the text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeatMap {
    /// Command that made the numbers; empty when it is the run's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command: String,
    /// The text looked at.
    pub text: String,
    /// Tokens of the text.
    pub context: usize,
    /// Tokens kept per KV head in all.
    pub kv_budget: usize,
    /// Positions per column; the last column may hold fewer.
    pub bin: usize,
    /// Rows from the first layer to the last.
    pub rows: Vec<HeatRow>,
}

/// One layer, or one KV head of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeatRow {
    /// Layer, from 0.
    pub layer: usize,
    /// KV head, or all of the layer together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_head: Option<usize>,
    /// Share kept in each column, 0 to 1.
    pub share: Vec<f32>,
}

/// A passage, token by token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Command that made the numbers; empty when it is the run's.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command: String,
    /// Where the passage is from.
    pub text: String,
    /// Tokens of the text up to the moment looked at; the passage is its beginning or a part of it.
    pub context: usize,
    /// Tokens kept per KV head in all.
    pub kv_budget: usize,
    /// Layers times KV heads: the most that can keep a token.
    pub n_layer_heads: usize,
    /// The passage.
    pub tokens: Vec<SampleToken>,
}

/// One token of a passage.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SampleToken {
    /// Its text, spaces included.
    pub text: String,
    /// Layer-heads that still keep it.
    pub kept_in: usize,
}

/// A report that could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The file system refused.
    #[error("cannot {action} {path}: {source}; check that the folder exists, is writable and has space left", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Not a report.
    #[error("{path} is not a report: {source}; expected the report.json of `sluice distill` or `sluice eval`", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// A report of a later version.
    #[error("{path} has report format {found}; this version reads up to {FORMAT_VERSION}, a newer sluice is needed", path = path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

impl Report {
    /// A report without sections.
    pub fn new(title: impl Into<String>, run: RunSummary) -> Self {
        Self { format_version: FORMAT_VERSION, title: title.into(), run, ..Self::default() }
    }

    /// `report.json`.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain data with string keys is always JSON")
    }

    /// `report.md`: the same tables as text.
    pub fn to_markdown(&self) -> String {
        markdown::page(self)
    }

    /// `report.html`: one page that needs nothing beside it, neither network nor scripts.
    pub fn to_html(&self) -> String {
        html::page(self)
    }

    /// Write `report.json`, `report.md` and `report.html` into `dir`, which is made if missing. A file is either complete or, after a
    /// crash, still the previous one. Returns the three paths.
    pub fn write(&self, dir: impl AsRef<Path>) -> Result<[PathBuf; 3], ReportError> {
        let dir = dir.as_ref();
        fs::create_dir_all(dir).map_err(|source| ReportError::Io { action: "create", path: dir.to_path_buf(), source })?;
        let files = [("report.json", self.to_json()), ("report.md", self.to_markdown()), ("report.html", self.to_html())];
        for (name, text) in &files {
            write_atomically(&dir.join(name), text.as_bytes())?;
        }
        Ok(files.map(|(name, _)| dir.join(name)))
    }

    /// Read a `report.json`.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, ReportError> {
        let path = path.as_ref();
        let text = fs::read_to_string(path).map_err(|source| ReportError::Io { action: "read", path: path.to_path_buf(), source })?;
        let report: Self = serde_json::from_str(&text).map_err(|source| ReportError::Json { path: path.to_path_buf(), source })?;
        if report.format_version > FORMAT_VERSION {
            return Err(ReportError::Version { path: path.to_path_buf(), found: report.format_version });
        }
        Ok(report)
    }
}

/// Write beside the target, flush to disk, rename over it, then flush the folder so that the rename lasts too.
fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), ReportError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}.partial", std::process::id()));
    let aside = PathBuf::from(aside);
    let written = (|| {
        let mut file = File::create(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    })();
    if let Err(source) = written {
        // The first error is the one to tell; a leftover that cannot be removed either adds nothing.
        let _ = fs::remove_file(&aside);
        return Err(ReportError::Io { action: "write", path: path.to_path_buf(), source });
    }
    #[cfg(unix)]
    if let Some(dir) = path.parent() {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        File::open(dir).and_then(|d| d.sync_all()).map_err(|source| ReportError::Io {
            action: "flush",
            path: dir.to_path_buf(),
            source,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
