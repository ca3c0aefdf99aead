//! Section: cache bytes and speed by context length, dense beside routed.

use super::numbers::{bytes, compared, count, flop_count, short_count, speed};
use super::plots::{self, Axis, Line, Plot, Point, Scale, Spread};
use super::sections::{Cell, Figure, Part, Row, Section, Table, describe, strings};
use super::style::{Look, Mark, PLAIN, SECOND};
use super::{CostSide, CostTable};

pub(super) fn section(cost: &CostTable) -> Section {
    let mut rows = cost.rows.clone();
    rows.sort_by_key(|r| r.context);
    let side = |f: &dyn Fn(&CostSide) -> Option<f64>, spread: Spread| {
        let line = |label: &str, dense: bool, ink, mark| Line {
            look: Look { label: label.into(), ink, mark, dashed: dense, strong: !dense },
            points: rows
                .iter()
                .filter_map(|r| f(if dense { &r.dense } else { &r.routed }).map(|y| Point::plain(r.context as f64, y)))
                .collect(),
            spread,
        };
        let mut lines = vec![line("Dense", true, SECOND, Mark::Square), line("Routed", false, PLAIN, Mark::Circle)];
        lines.retain(|l| !l.points.is_empty());
        lines
    };
    let figure = |title: &str, scale: Scale, format: fn(f64) -> String, lines: Vec<Line>| {
        let alt = describe(title, "context", &lines, |v| count(v as usize), format);
        let legend = lines.iter().map(|l| l.look.clone()).collect();
        let x = Axis {
            label: "context, tokens".into(),
            scale: Scale::Log,
            include: vec![],
            ticks: rows.iter().map(|r| r.context as f64).collect(),
            format: |v| short_count(v),
        };
        let include = if scale == Scale::Linear { vec![0.0] } else { vec![] };
        let y = Axis { label: String::new(), scale, include, ticks: vec![], format };
        Figure { title: title.into(), drawing: plots::draw(&Plot { x, y, lines, reference: None }, &alt), legend, wide: false }
    };
    let mut figures = Vec::new();
    let cache = side(&|s| (s.cache_bytes > 0).then_some(s.cache_bytes as f64), Spread::Band);
    if !cache.is_empty() && rows.len() > 1 {
        figures.push(figure("Cache (lower is better)", Scale::Log, |v| bytes(v as u64), cache));
    }
    for (title, speed_of) in [
        ("Decoding, tokens/s (higher is better)", (|s| s.decode_tokens_per_s) as fn(&CostSide) -> Option<f64>),
        ("Reading the prompt, tokens/s (higher is better)", |s| s.prefill_tokens_per_s),
    ] {
        let lines = side(&speed_of, Spread::Band);
        if !lines.is_empty() && rows.len() > 1 {
            figures.push(figure(title, Scale::Linear, short_count, lines));
        }
    }

    let mut columns = strings(&["Context", "Attention"]);
    let has = |f: fn(&CostSide) -> bool| rows.iter().any(|r| f(&r.dense) || f(&r.routed));
    let (flops, prefill) = (has(|s| s.attention_flops > 0), has(|s| s.prefill_tokens_per_s.is_some()));
    let (decode, memory) = (has(|s| s.decode_tokens_per_s.is_some()), has(|s| s.peak_memory_bytes.is_some()));
    columns.push("Cache".into());
    columns.extend(flops.then(|| "Attention FLOPs, whole prompt".into()));
    columns.extend(prefill.then(|| "Prompt tokens/s".into()));
    columns.extend(decode.then(|| "Decoded tokens/s".into()));
    columns.extend(memory.then(|| "Peak memory".into()));
    let mut table_rows = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        for (name, is_routed) in [("Dense", false), ("Routed", true)] {
            let (this, dense) = (if is_routed { &row.routed } else { &row.dense }, &row.dense);
            let cell = |v: Option<f64>, of_dense: Option<f64>, (below, above): (&str, &str), format: &dyn Fn(f64) -> String| {
                let sub = match (v, of_dense) {
                    (Some(v), Some(d)) if is_routed && v > 0.0 && d > 0.0 => compared(v, d, below, above),
                    _ => String::new(),
                };
                Cell { main: v.map_or(String::new(), format), sub }
            };
            let (amount, rate) = (("less", "more"), ("slower", "faster"));
            let number = |v: u64| (v > 0).then_some(v as f64);
            let mut cells: Vec<Cell> = vec![count(row.context).into(), name.into()];
            cells.push(cell(number(this.cache_bytes), number(dense.cache_bytes), amount, &|v| bytes(v as u64)));
            cells.extend(flops.then(|| cell(number(this.attention_flops), number(dense.attention_flops), amount, &flop_count)));
            cells.extend(prefill.then(|| cell(this.prefill_tokens_per_s, dense.prefill_tokens_per_s, rate, &speed)));
            cells.extend(decode.then(|| cell(this.decode_tokens_per_s, dense.decode_tokens_per_s, rate, &speed)));
            let peak = |s: &CostSide| s.peak_memory_bytes.map(|v| v as f64);
            cells.extend(memory.then(|| cell(peak(this), peak(dense), amount, &|v| bytes(v as u64))));
            table_rows.push(Row { cells, look: None, opens_group: i > 0 && !is_routed });
        }
    }
    let table = Table {
        caption: "Dense beside routed attention, by length of the context.".into(),
        columns,
        n_names: 2,
        rows: table_rows,
        folded: false,
    };
    let mut parts = vec![Part::Figures(figures), Part::Table(table)];
    if !cost.hardware.is_empty() {
        parts.insert(0, Part::Note(format!("Measured on {}.", cost.hardware)));
    }
    let lead = "What the model costs as the text grows. Cache and FLOPs are counted from shapes; tokens/s and memory are measured where \
                they stand. Good: a routed cache that stays flat from the budget on, and a decoding speed that does too. At short contexts \
                routing saves nothing and may cost a little.";
    Section { id: "cost", title: "Memory and speed", lead: lead.into(), command: cost.command.clone(), parts }
}
