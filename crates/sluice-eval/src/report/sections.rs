//! From the data of a report to what a reader sees, once for both markdown and HTML: sections of text, tables and figures. Decides what is
//! shown, in which order and in which words; knows neither syntax.

use std::collections::BTreeSet;

use super::numbers::{bytes, count, duration, nats, percent, range, speed, times};
use super::plots::{Line, Point};
use super::style::{Look, Looks, Mark, PLAIN, SECOND};
use super::{QualityRow, QualityTable, Report, cost, kept, quality, recall, training};
use crate::bootstrap::Estimate;

/// One heading of the page.
pub(super) struct Section {
    pub(super) id: &'static str,
    pub(super) title: &'static str,
    /// What is shown and what good looks like.
    pub(super) lead: String,
    /// Command that made the numbers.
    pub(super) command: String,
    pub(super) parts: Vec<Part>,
}

/// What a section is made of.
pub(super) enum Part {
    Heading(String),
    Note(String),
    /// Figures side by side where there is room.
    Figures(Vec<Figure>),
    Table(Table),
    /// (name, value).
    Facts(Vec<(String, String)>),
}

/// A drawing; markdown leaves it out.
pub(super) struct Figure {
    pub(super) title: String,
    /// HTML below the title: the drawing itself.
    pub(super) drawing: String,
    pub(super) legend: Vec<Look>,
    /// Takes the full width.
    pub(super) wide: bool,
}

/// A table.
pub(super) struct Table {
    pub(super) caption: String,
    pub(super) columns: Vec<String>,
    /// The first so many columns are text and name the row, the others are numbers.
    pub(super) n_names: usize,
    pub(super) rows: Vec<Row>,
    /// Closed at first: more than most readers want.
    pub(super) folded: bool,
}

/// A row of a table.
#[derive(Default)]
pub(super) struct Row {
    pub(super) cells: Vec<Cell>,
    /// Look of the policy that the row is about.
    pub(super) look: Option<Look>,
    /// First row of a group.
    pub(super) opens_group: bool,
}

/// A cell: what counts, and its small print.
#[derive(Clone, Default)]
pub(super) struct Cell {
    pub(super) main: String,
    pub(super) sub: String,
}

/// A figure for the top of the page.
pub(super) struct Headline {
    pub(super) value: String,
    pub(super) label: String,
}

impl From<String> for Cell {
    fn from(main: String) -> Self {
        Self { main, sub: String::new() }
    }
}

impl From<&str> for Cell {
    fn from(main: &str) -> Self {
        main.to_string().into()
    }
}

/// All sections that have something to show.
pub(super) fn sections(report: &Report) -> Vec<Section> {
    let looks = Looks::of(report);
    let mut sections = Vec::new();
    sections.extend(run(report));
    sections.extend(quality::section(report, &looks));
    sections.extend(report.recall.as_ref().filter(|r| !r.rows.is_empty()).map(|r| recall::section(r, &looks)));
    sections.extend(report.cost.as_ref().filter(|c| !c.rows.is_empty()).map(cost::section));
    sections.extend(report.curves.as_ref().filter(|c| c.stages.iter().any(|s| !s.points.is_empty())).map(training::curves));
    sections.extend(report.health.as_ref().filter(|h| !h.layers.is_empty()).map(training::health));
    sections.extend(report.heat_map.as_ref().filter(|h| h.rows.iter().any(|r| !r.share.is_empty())).map(kept::heat_map));
    sections.extend(report.sample.as_ref().filter(|s| !s.tokens.is_empty()).map(kept::sample));
    for section in &mut sections {
        if section.command.is_empty() {
            section.command.clone_from(&report.run.command);
        }
    }
    sections
}

/// The four or five figures that answer "was it worth it?". Taken at the run's own budget where that was measured, else at the one nearest
/// to an eighth of the text.
pub(super) fn headlines(report: &Report) -> Vec<Headline> {
    let mut found = Vec::new();
    let own = report.run.routing.map(|r| r.kv_budget());
    let of_gate: Vec<(&QualityTable, &QualityRow)> =
        report.quality.iter().filter_map(|t| Some((t, quality::headline_row(t, own)?))).collect();
    if let Some((table, row)) = of_gate.first() {
        let value = range(of_gate.iter().map(|(_, r)| r.delta_nll.mean), nats);
        let budgets = range(of_gate.iter().map(|(_, r)| r.kv_budget as f64), |b| count(b as usize));
        let share = if of_gate.len() == 1 {
            format!(", {} of the text", percent(row.kv_budget as f64 / table.context as f64))
        } else {
            String::new()
        };
        found.push(Headline { value, label: format!("nats per token above dense at a budget of {budgets} tokens{share}") });
        let closed: Vec<f64> = of_gate.iter().filter_map(|(t, r)| t.gap_closed(r)).collect();
        if !closed.is_empty() {
            found.push(Headline { value: range(closed.into_iter(), percent), label: "of StreamingLLM's gap to dense closed".into() });
        }
    }
    let all_depths = |policy: &str| {
        let recall = report.recall.as_ref()?;
        let rows = || recall.rows.iter().filter(|r| r.policy == policy && r.depth.is_none());
        let longest = rows().map(|r| r.context).max()?;
        let in_longest = || rows().filter(|r| r.context == longest);
        in_longest().find(|r| Some(r.kv_budget) == own).or_else(|| in_longest().min_by_key(|r| r.kv_budget.abs_diff(longest / 8)))
    };
    if let Some(gate) = all_depths("gate") {
        let beside = all_depths("dense").map_or(String::new(), |d| format!("; dense: {}", percent(d.exact_match.mean)));
        let label = format!("of planted facts recalled, {} of {} tokens kept{beside}", count(gate.kv_budget), count(gate.context));
        found.push(Headline { value: percent(gate.exact_match.mean), label });
    }
    if let Some(cost) = &report.cost {
        if let Some(row) = cost.rows.iter().filter(|r| r.routed.cache_bytes > 0).max_by_key(|r| r.context) {
            let label = format!("smaller cache at {} tokens ({})", count(row.context), bytes(row.routed.cache_bytes));
            found.push(Headline { value: times(row.dense.cache_bytes as f64 / row.routed.cache_bytes as f64), label });
        }
        let speeds = cost.rows.iter().filter_map(|r| Some((r.context, r.routed.decode_tokens_per_s?, r.dense.decode_tokens_per_s?)));
        if let Some((context, routed, dense)) = speeds.max_by_key(|s| s.0) {
            let label = format!("the decoding speed of dense at {} tokens ({} tokens/s)", count(context), speed(routed));
            found.push(Headline { value: times(routed / dense), label });
        }
    }
    found
}

fn run(report: &Report) -> Option<Section> {
    let run = &report.run;
    let mut facts: Vec<(String, String)> = Vec::new();
    let mut fact = |name: &str, value: Option<String>| facts.extend(value.filter(|v| !v.is_empty()).map(|v| (name.to_string(), v)));
    let parameters = |n: u64| if n >= 1_000_000 { format!("{:.1} M", n as f64 / 1e6) } else { count(n as usize) };
    fact("Model", Some(run.model.clone()));
    fact("Teacher", run.teacher.clone());
    fact("Parameters", run.n_params.map(parameters));
    fact("Parameters of the gates", run.n_gate_params.map(parameters));
    fact("Routing preset", Some(run.preset.clone()));
    fact(
        "Routing",
        run.routing.map(|r| {
            format!(
                "window {}, top_k {} (of these {} sinks), route_every {}: a budget of {} tokens, {} cached",
                r.window,
                r.top_k,
                r.n_sink,
                r.route_every,
                count(r.kv_budget()),
                count(r.cached_keys())
            )
        }),
    );
    fact("Training texts", Some(run.data.join(", ")));
    fact("Seed", run.seed.map(|s| s.to_string()));
    fact("CPU", Some(run.cpu.clone()));
    fact("Threads", run.threads.map(|t| t.to_string()));
    fact("Peak memory", run.peak_memory_bytes.map(bytes));
    fact(
        "A training step holds",
        run.step_memory.map(|m| {
            format!(
                "{} counted, {} measured; documents at a time: {}, layers that run again: {}",
                bytes(m.counted_peak_bytes),
                bytes(m.measured_peak_bytes),
                m.documents_at_a_time,
                m.recomputed_layers
            )
        }),
    );
    fact("Started", Some(run.started.clone()));
    fact("Versions", Some(run.versions.iter().map(|(name, version)| format!("{name} {version}")).collect::<Vec<_>>().join(", ")));
    let mut parts = Vec::new();
    if !facts.is_empty() {
        parts.push(Part::Facts(facts));
    }
    if !run.stages.is_empty() {
        let mut rows: Vec<Row> = run.stages.iter().map(|s| stage_row(&s.name, &s.trained, s.steps, s.tokens, s.seconds)).collect();
        let (steps, tokens) = run.stages.iter().fold((0, 0), |(a, b), s| (a + s.steps, b + s.tokens));
        let mut total = stage_row("Together", "", steps, tokens, run.stages.iter().map(|s| s.seconds).sum());
        total.opens_group = true;
        rows.push(total);
        parts.push(Part::Table(Table {
            caption: "Stages in the order in which they ran.".into(),
            columns: strings(&["Stage", "Trained", "Steps", "Tokens", "Time", "Tokens/s"]),
            n_names: 2,
            rows,
            folded: false,
        }));
    }
    (!parts.is_empty()).then(|| Section { id: "run", title: "The run", lead: String::new(), command: String::new(), parts })
}

fn stage_row(name: &str, trained: &str, steps: u64, tokens: u64, seconds: f64) -> Row {
    let rate = if seconds > 0.0 && tokens > 0 { speed(tokens as f64 / seconds) } else { String::new() };
    let steps = if steps == 0 { "closed form".to_string() } else { count(steps as usize) };
    let cells = [name.into(), trained.into(), steps, count(tokens as usize), duration(seconds), rate];
    Row { cells: cells.map(Cell::from).to_vec(), ..Row::default() }
}

pub(super) fn plain(label: &str, second: bool) -> Look {
    Look { label: label.into(), ink: if second { SECOND } else { PLAIN }, mark: Mark::None, dashed: second, strong: false }
}

pub(super) fn policies<'a>(names: impl Iterator<Item = &'a str>, looks: &Looks) -> Vec<&'a str> {
    let mut names: Vec<&str> = names.collect::<BTreeSet<_>>().into_iter().collect();
    names.sort_by_key(|n| looks.rank(n));
    names
}

pub(super) fn budgets(all: impl Iterator<Item = usize>) -> Vec<usize> {
    all.collect::<BTreeSet<_>>().into_iter().collect()
}

pub(super) fn estimate_point(x: f64, e: Estimate) -> Point {
    Point { x, y: e.mean, low: e.low, high: e.high }
}

/// What a plot shows, in words, with each line's ends: the text for those who cannot see it.
pub(super) fn describe(title: &str, x: &str, lines: &[Line], format_x: impl Fn(f64) -> String, format_y: fn(f64) -> String) -> String {
    let ends = |l: &Line| match (l.points.first(), l.points.last()) {
        (Some(a), Some(b)) if l.points.len() > 1 => {
            format!("{} from {} at {x} {} to {} at {}", l.look.label, format_y(a.y), format_x(a.x), format_y(b.y), format_x(b.x))
        }
        (Some(a), _) => format!("{} {} at {x} {}", l.look.label, format_y(a.y), format_x(a.x)),
        _ => l.look.label.clone(),
    };
    format!("{title}: {}. The numbers are in the table below.", lines.iter().map(ends).collect::<Vec<_>>().join("; "))
}

pub(super) fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|n| n.to_string()).collect()
}
