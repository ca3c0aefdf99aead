//! Section: loss above dense against the budget, text by text.

use std::collections::BTreeSet;

use super::numbers::{count, estimate_cell, nats, nats_with_interval, percent, short_nats};
use super::plots::{self, Axis, Line, Plot, Point, Scale, Spread};
use super::sections::{Cell, Figure, Part, Row, Section, Table, budgets, describe, estimate_point, policies, strings};
use super::style::Looks;
use super::{QualityRow, QualityTable, Report};
use crate::bootstrap::Estimate;

pub(super) fn section(report: &Report, looks: &Looks) -> Option<Section> {
    let tables: Vec<&QualityTable> = report.quality.iter().filter(|t| !t.rows.is_empty()).collect();
    let mut parts = Vec::new();
    for table in &tables {
        let held_out = if table.held_out { " (held out from training)" } else { "" };
        parts.push(Part::Heading(format!("{}{held_out}", table.text)));
        parts.push(Part::Note(quality_note(table, report)));
        let mut figures = vec![quality_figure(table, looks, "Nats per token above dense (lower is better)", Scale::Root, Some(0.0), |r| {
            Some(r.delta_nll)
        })];
        if table.rows.iter().any(|r| r.top1_agreement.is_some()) {
            figures.push(quality_figure(table, looks, "Same most likely token as dense (higher is better)", Scale::Linear, None, |r| {
                r.top1_agreement
            }));
        } else if table.rows.iter().any(|r| r.kl.is_some()) {
            figures.push(quality_figure(table, looks, "KL to dense, nats per token (lower is better)", Scale::Root, Some(0.0), |r| r.kl));
        }
        parts.push(Part::Figures(figures));
        parts.push(Part::Table(quality_by_budget(table, looks)));
        parts.push(Part::Table(quality_in_full(table, looks)));
    }
    let lead = "What is lost by reading a few kept tokens instead of all of them, against how many are kept (the total budget per KV head: \
                window plus routed keys). Only positions past the budget count, since before it nothing has been dropped yet. Good: the gate \
                well below StreamingLLM and random at the same budget, close to the oracle, and at most about 0.01 nats per token at half of \
                the text, 0.03 at a quarter, 0.08 at an eighth. The upright axis is stretched near zero. An interval that crosses zero means no loss could be shown. Intervals are 95 %, from a bootstrap \
                over documents and blocks of neighbouring tokens. H2O sees the full cache while it decides and the oracle sees the future: \
                both are references, not methods that run in bounded memory.";
    // Texts measured by different commands say so one by one.
    let commands: BTreeSet<&str> = tables.iter().map(|t| t.command.as_str()).filter(|c| !c.is_empty()).collect();
    let command = commands.into_iter().collect::<Vec<_>>().join("\n");
    (!tables.is_empty()).then(|| Section { id: "quality", title: "Quality against budget", lead: lead.into(), command, parts })
}

fn quality_note(table: &QualityTable, report: &Report) -> String {
    let documents = if table.n_documents == 1 { "One document".into() } else { format!("{} documents", count(table.n_documents)) };
    let mut note = format!("{documents} of {} tokens.", count(table.context));
    if let Some(dense) = table.dense_nll {
        note.push_str(&format!(" Dense attention itself: {} nats per token", nats(dense.mean)));
        note.push_str(&table.dense_bits_per_byte.map_or(".".to_string(), |b| format!(", {b:.3} bits per byte.")));
    }
    let own = report.run.routing.map(|r| r.kv_budget());
    if let Some(row) = headline_row(table, own) {
        let e = row.delta_nll;
        note.push_str(&format!(" With {} tokens kept the gate loses {}", count(row.kv_budget), nats_with_interval(e)));
        match table.gap_closed(row) {
            Some(closed) if closed >= 0.0 => note.push_str(&format!(" and closes {} of StreamingLLM's gap.", percent(closed))),
            Some(_) => note.push_str(", more than StreamingLLM does."),
            None => note.push('.'),
        }
    }
    note
}

fn quality_figure(
    table: &QualityTable,
    looks: &Looks,
    title: &str,
    scale: Scale,
    reference: Option<f64>,
    value: impl Fn(&QualityRow) -> Option<Estimate>,
) -> Figure {
    let budgets = budgets(table.rows.iter().filter(|r| r.policy != "dense").map(|r| r.kv_budget));
    let mut lines = Vec::new();
    for policy in policies(table.rows.iter().map(|r| r.policy.as_str()), looks) {
        let mut points: Vec<Point> = table
            .rows
            .iter()
            .filter(|r| r.policy == policy && policy != "dense")
            .filter_map(|r| value(r).map(|e| estimate_point(r.kv_budget as f64, e)))
            .collect();
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        if !points.is_empty() {
            lines.push(Line { look: looks.policy(policy), points, spread: Spread::Whiskers });
        }
    }
    let format = if scale == Scale::Root { short_nats } else { percent };
    let alt = describe(title, "kv_budget", &lines, |v| count(v as usize), format);
    let legend = lines.iter().map(|l| l.look.clone()).collect();
    let plot = Plot {
        x: Axis {
            label: "total budget, tokens per KV head".into(),
            scale: Scale::Log,
            include: vec![],
            ticks: budgets.iter().map(|&b| b as f64).collect(),
            format: |v| count(v as usize),
        },
        y: Axis { label: String::new(), scale, include: reference.into_iter().collect(), ticks: vec![], format },
        lines,
        reference,
    };
    Figure { title: title.into(), drawing: plots::draw(&plot, &alt), legend, wide: false }
}

fn quality_by_budget(table: &QualityTable, looks: &Looks) -> Table {
    let budgets = budgets(table.rows.iter().filter(|r| r.policy != "dense").map(|r| r.kv_budget));
    let find = |policy: &str, budget: usize| table.rows.iter().find(|r| r.policy == policy && r.kv_budget == budget);
    let mut rows: Vec<Row> = policies(table.rows.iter().map(|r| r.policy.as_str()).filter(|p| *p != "dense"), looks)
        .into_iter()
        .map(|policy| {
            let look = looks.policy(policy);
            let cells = budgets.iter().map(|&b| find(policy, b).map_or(Cell::default(), |r| estimate_cell(r.delta_nll, nats)));
            Row { cells: [look.label.as_str().into()].into_iter().chain(cells).collect(), look: Some(look), opens_group: false }
        })
        .collect();
    let mut extra = |name: &str, cell: &dyn Fn(&QualityRow) -> Cell| {
        let cells: Vec<Cell> = budgets.iter().map(|&b| find("gate", b).map_or(Cell::default(), cell)).collect();
        if cells.iter().any(|c| !c.main.is_empty()) {
            rows.push(Row { cells: [name.into()].into_iter().chain(cells).collect(), opens_group: true, look: None });
        }
    };
    extra("StreamingLLM's gap closed by the gate", &|row| match (row.gap_closed, table.gap_closed(row)) {
        (Some(estimate), _) => estimate_cell(estimate, percent),
        (None, Some(mean)) => percent(mean).into(),
        (None, None) => Cell::default(),
    });
    extra("Gate minus StreamingLLM, token by token", &|row| row.above_streaming.map_or(Cell::default(), |e| estimate_cell(e, nats)));
    extra("Positions counted", &|row| Cell { main: count(row.delta_nll.n), sub: format!("from {} on", count(row.positions_from)) });
    let columns = budgets.iter().map(|&b| format!("{} ({})", count(b), percent(b as f64 / table.context.max(1) as f64)));
    Table {
        caption: format!(
            "{}: nats per token above dense, by total budget (share of the text in brackets), with 95 % intervals.",
            table.text
        ),
        columns: ["Policy".to_string()].into_iter().chain(columns).collect(),
        n_names: 1,
        rows,
        folded: false,
    }
}

fn quality_in_full(table: &QualityTable, looks: &Looks) -> Table {
    let mut sorted: Vec<&QualityRow> = table.rows.iter().collect();
    sorted.sort_by_key(|r| (r.kv_budget, looks.rank(&r.policy)));
    let any = |has: fn(&QualityRow) -> bool| table.rows.iter().any(has);
    let (kl, top1) = (any(|r| r.kl.is_some()), any(|r| r.top1_agreement.is_some()));
    let gap = sorted.iter().any(|r| table.gap_closed(r).is_some());
    let mut columns = strings(&["Budget", "Policy", "Nats above dense"]);
    columns.extend(kl.then(|| "KL to dense".into()));
    columns.extend(top1.then(|| "Same top token".into()));
    columns.extend(gap.then(|| "Gap to StreamingLLM closed".into()));
    columns.extend(strings(&["Positions", "From position"]));
    let mut before = None;
    let rows = sorted
        .into_iter()
        .map(|r| {
            let look = looks.policy(&r.policy);
            let mut cells: Vec<Cell> = vec![count(r.kv_budget).into(), look.label.as_str().into(), estimate_cell(r.delta_nll, nats)];
            cells.extend(kl.then(|| r.kl.map_or(Cell::default(), |e| estimate_cell(e, nats))));
            cells.extend(top1.then(|| r.top1_agreement.map_or(Cell::default(), |e| estimate_cell(e, percent))));
            cells.extend(gap.then(|| match r.gap_closed {
                Some(e) => estimate_cell(e, percent),
                None => table.gap_closed(r).map_or(Cell::default(), |v| percent(v).into()),
            }));
            cells.extend([count(r.delta_nll.n).into(), count(r.positions_from).into()]);
            let opens_group = before.replace(r.kv_budget).is_some_and(|b| b != r.kv_budget);
            Row { cells, look: Some(look), opens_group }
        })
        .collect();
    Table { caption: format!("{}: every measured number", table.text), columns, n_names: 2, rows, folded: true }
}

/// The gate's row that stands for the whole table: at the run's own budget, else at the one nearest to an eighth of the text.
pub(super) fn headline_row(table: &QualityTable, own: Option<usize>) -> Option<&QualityRow> {
    let of_gate = || table.rows.iter().filter(|r| r.policy == "gate");
    of_gate().find(|r| Some(r.kv_budget) == own).or_else(|| of_gate().min_by_key(|r| r.kv_budget.abs_diff(table.context / 8)))
}
