//! Section: recall of planted facts by depth and budget.

use std::collections::BTreeSet;

use super::numbers::{count, estimate_cell, nats, percent};
use super::plots::{self, Axis, Line, Plot, Point, Scale, Spread};
use super::sections::{Cell, Figure, Part, Row, Section, Table, budgets, describe, estimate_point, policies, strings};
use super::style::{Look, Looks};
use super::{Recall, RecallRow};

pub(super) fn section(recall: &Recall, looks: &Looks) -> Section {
    let mut parts = Vec::new();
    if !recall.example.is_empty() {
        parts.push(Part::Note(format!("Example: {}", recall.example)));
    }
    let contexts: BTreeSet<usize> = recall.rows.iter().map(|r| r.context).collect();
    for context in contexts {
        let rows: Vec<&RecallRow> = recall.rows.iter().filter(|r| r.context == context).collect();
        let questions = rows.iter().map(|r| r.n_prompts).max().unwrap_or(0);
        parts.push(Part::Heading(format!("Texts of {} tokens", count(context))));
        parts.push(Part::Figures(recall_figures(&rows, looks)));
        parts.push(Part::Table(recall_by_depth(&rows, looks, context, questions)));
        parts.push(Part::Table(recall_in_full(&rows, looks, context)));
    }
    let distractors = match recall.n_distractors {
        0 => String::new(),
        1 => ", beside another of the same form that is not asked for".into(),
        n => format!(", beside {n} others of the same form that are not asked for"),
    };
    let lead = format!(
        "Made-up facts are planted in a long text{distractors}; the questions stand at its end. Depth 0 % is the start of the text, 100 % \
         right before the question, where the window may still see the fact. Good: the gate as high as dense at every depth. A model that \
         cannot answer with dense attention cannot show anything here: look at the dense row first. Intervals are 95 %, with answers as \
         independent trials."
    );
    Section { id: "recall", title: "Recall of planted facts", lead, command: recall.command.clone(), parts }
}

fn recall_figures(rows: &[&RecallRow], looks: &Looks) -> Vec<Figure> {
    let names = policies(rows.iter().map(|r| r.policy.as_str()), looks);
    let y = || Axis {
        label: String::new(),
        scale: Scale::Linear,
        include: vec![0.0, 1.0],
        ticks: vec![0.0, 0.25, 0.5, 0.75, 1.0],
        format: percent,
    };
    let dense = rows.iter().find(|r| r.policy == "dense" && r.depth.is_none());
    let mut figures = Vec::new();
    let all_budgets = budgets(rows.iter().filter(|r| r.policy != "dense").map(|r| r.kv_budget));

    if all_budgets.len() > 1 && rows.iter().any(|r| r.depth.is_none() && r.policy != "dense") {
        let mut lines: Vec<Line> = Vec::new();
        for &policy in names.iter().filter(|p| **p != "dense") {
            let mut points: Vec<Point> = rows
                .iter()
                .filter(|r| r.policy == policy && r.depth.is_none())
                .map(|r| estimate_point(r.kv_budget as f64, r.token_accuracy))
                .collect();
            points.sort_by(|a, b| a.x.total_cmp(&b.x));
            lines.push(Line { look: looks.policy(policy), points, spread: Spread::Whiskers });
        }
        lines.retain(|l| !l.points.is_empty());
        let title = "Answer tokens right, all depths together";
        let alt = describe(title, "kv_budget", &lines, |v| count(v as usize), percent);
        let mut legend: Vec<Look> = lines.iter().map(|l| l.look.clone()).collect();
        legend.extend(dense.map(|_| Look { label: "Dense (dotted line)".into(), ..looks.policy("dense") }));
        let plot = Plot {
            x: Axis {
                label: "total budget, tokens per KV head".into(),
                scale: Scale::Log,
                include: vec![],
                ticks: all_budgets.iter().map(|&b| b as f64).collect(),
                format: |v| count(v as usize),
            },
            y: y(),
            lines,
            reference: dense.map(|d| d.token_accuracy.mean),
        };
        figures.push(Figure { title: title.into(), drawing: plots::draw(&plot, &alt), legend, wide: false });
    }
    for budget in all_budgets {
        let mut lines: Vec<Line> = Vec::new();
        for &policy in &names {
            let mut points: Vec<Point> = rows
                .iter()
                .filter(|r| r.policy == policy && (policy == "dense" || r.kv_budget == budget))
                .filter_map(|r| r.depth.map(|d| estimate_point(d, r.token_accuracy)))
                .collect();
            points.sort_by(|a, b| a.x.total_cmp(&b.x));
            lines.push(Line { look: looks.policy(policy), points, spread: Spread::Whiskers });
        }
        lines.retain(|l| l.points.len() > 1);
        if lines.is_empty() {
            continue;
        }
        let title = format!("Answer tokens right by depth, {} tokens kept", count(budget));
        let alt = describe(&title, "depth", &lines, percent, percent);
        let legend = lines.iter().map(|l| l.look.clone()).collect();
        let ticks = lines.iter().flat_map(|l| &l.points).map(|p| p.x).collect();
        let x = Axis { label: "depth of the fact in the text".into(), scale: Scale::Linear, include: vec![], ticks, format: percent };
        let drawing = plots::draw(&Plot { x, y: y(), lines, reference: None }, &alt);
        figures.push(Figure { title, drawing, legend, wide: false });
    }
    figures
}

fn sorted_recall<'a>(rows: &[&'a RecallRow], looks: &Looks) -> Vec<&'a RecallRow> {
    let mut sorted = rows.to_vec();
    // Dense first, as the bar; then budget by budget; all depths together last.
    sorted.sort_by(|a, b| {
        let key = |r: &RecallRow| (r.policy != "dense", r.kv_budget, looks.rank(&r.policy));
        key(a).cmp(&key(b)).then(a.depth.unwrap_or(2.0).total_cmp(&b.depth.unwrap_or(2.0)))
    });
    sorted
}

fn recall_by_depth(rows: &[&RecallRow], looks: &Looks, context: usize, questions: usize) -> Table {
    let mut depths: Vec<Option<f64>> = rows.iter().map(|r| r.depth).collect();
    depths.sort_by(|a, b| a.unwrap_or(2.0).total_cmp(&b.unwrap_or(2.0)));
    depths.dedup();
    let sorted = sorted_recall(rows, looks);
    let mut table_rows: Vec<Row> = Vec::new();
    let mut keys: Vec<(usize, &str)> = sorted.iter().map(|r| (r.kv_budget, r.policy.as_str())).collect();
    keys.dedup();
    let mut before = None;
    for (budget, policy) in keys {
        let look = looks.policy(policy);
        let cells = depths.iter().map(|&depth| {
            let row = sorted.iter().find(|r| r.policy == policy && r.kv_budget == budget && r.depth == depth);
            row.map_or(Cell::default(), |r| estimate_cell(r.token_accuracy, percent))
        });
        let cells = [count(budget).into(), look.label.as_str().into()].into_iter().chain(cells).collect();
        let opens_group = before.replace(budget).is_some_and(|b| b != budget);
        table_rows.push(Row { cells, look: Some(look), opens_group });
    }
    let name = |depth: &Option<f64>| depth.map_or("All depths".to_string(), |d| format!("Depth {}", percent(d)));
    Table {
        caption: format!(
            "Share of answer tokens that are right, by depth; texts of {} tokens, up to {} questions in a cell.",
            count(context),
            count(questions)
        ),
        columns: strings(&["Budget", "Policy"]).into_iter().chain(depths.iter().map(name)).collect(),
        n_names: 2,
        rows: table_rows,
        folded: false,
    }
}

fn recall_in_full(rows: &[&RecallRow], looks: &Looks, context: usize) -> Table {
    let ranked = rows.iter().any(|r| r.ranked_first.is_some());
    let above = rows.iter().any(|r| r.nll_above_dense.is_some());
    let mut columns = strings(&["Budget", "Policy", "Depth", "Answer tokens right", "Whole answer right"]);
    columns.extend(ranked.then(|| "True value ranked first".into()));
    columns.extend(above.then(|| "Nats per answer token above dense".into()));
    columns.push("Questions".into());
    let mut before: Option<(usize, &str)> = None;
    let rows = sorted_recall(rows, looks)
        .into_iter()
        .map(|r| {
            let look = looks.policy(&r.policy);
            let mut cells: Vec<Cell> = vec![
                count(r.kv_budget).into(),
                look.label.as_str().into(),
                r.depth.map_or("all".to_string(), percent).into(),
                estimate_cell(r.token_accuracy, percent),
                estimate_cell(r.exact_match, percent),
            ];
            cells.extend(ranked.then(|| r.ranked_first.map_or(Cell::default(), |e| estimate_cell(e, percent))));
            cells.extend(above.then(|| r.nll_above_dense.map_or(Cell::default(), |e| estimate_cell(e, nats))));
            cells.push(count(r.n_prompts).into());
            let key = (r.kv_budget, r.policy.as_str());
            let opens_group = before.replace(key).is_some_and(|b| b != key);
            Row { cells, look: Some(look), opens_group }
        })
        .collect();
    Table { caption: format!("Texts of {} tokens: every measured number", count(context)), columns, n_names: 3, rows, folded: true }
}
