//! Sections: what each layer keeps, as a heat map of the text and token by token in a passage.
//!
//! Shade is the stretched share kept (square root), in eleven steps, `k0` to `k10` of the style sheet; every shade has its number beside it
//! in words: as a title under the pointer, and in a table.

use std::fmt::Write as _;

use super::html::escape;
use super::numbers::{count, percent};
use super::sections::{Cell, Figure, Part, Row, Section, Table};
use super::{HeatMap, HeatRow, Sample};

/// Columns drawn at most; finer bins are averaged.
const MAX_COLUMNS: usize = 64;
const CELL_WIDTH: usize = 12;
const LABEL_WIDTH: usize = 52;

pub(super) fn heat_map(map: &HeatMap) -> Section {
    let kv_heads = map.rows.iter().filter_map(|r| r.kv_head).max().map_or(1, |g| g + 1);
    let what = if kv_heads > 1 { "layer and KV head" } else { "layer" };
    let title = format!("Share of tokens kept, by {what} (rows) and place in the text (columns)");
    let figure = Figure { title, drawing: draw_heat_map(map, kv_heads), legend: Vec::new(), wide: true };
    let lead = format!(
        "{} of {} tokens, with a budget of {} per KV head: which of them are still kept at the end. The window shows as the full right edge, \
         the sinks at the left one. Good: rows that differ, since layers need different tokens, and strong shades where the text says \
         something new. Rows with shade on the right only keep nothing but the newest tokens, as StreamingLLM would.",
        map.text,
        count(map.context),
        count(map.kv_budget)
    );
    let parts = vec![Part::Figures(vec![figure]), Part::Table(thirds(map))];
    Section { id: "kept", title: "What each layer keeps", lead, command: map.command.clone(), parts }
}

/// The map in words: first, middle and last third of the text, row by row.
fn thirds(map: &HeatMap) -> Table {
    let rows = map
        .rows
        .iter()
        .map(|r| {
            let n = r.share.len();
            let mean = |from: usize, to: usize| {
                let part = &r.share[from.min(n)..to.min(n)];
                if part.is_empty() { String::new() } else { percent(part.iter().map(|&v| f64::from(v)).sum::<f64>() / part.len() as f64) }
            };
            let (a, b) = (n.div_ceil(3), (2 * n).div_ceil(3));
            let cells = [row_name(r), mean(0, a), mean(a, b), mean(b, n), mean(0, n)];
            Row { cells: cells.map(Cell::from).to_vec(), ..Row::default() }
        })
        .collect();
    Table {
        caption: "Share kept in each third of the text".into(),
        columns: ["Layer", "First third", "Middle third", "Last third", "Whole text"].map(str::to_string).to_vec(),
        n_names: 1,
        rows,
        folded: true,
    }
}

fn row_name(row: &HeatRow) -> String {
    match row.kv_head {
        Some(head) => format!("layer {}, KV head {head}", row.layer),
        None => format!("layer {}", row.layer),
    }
}

fn draw_heat_map(map: &HeatMap, kv_heads: usize) -> String {
    let n_bins = map.rows.iter().map(|r| r.share.len()).max().unwrap_or(0);
    let each = n_bins.div_ceil(MAX_COLUMNS).max(1);
    let n_columns = n_bins.div_ceil(each);
    // Wide texts need no wider page: a row is as high as keeps the whole readable.
    let (row_height, gap) = if kv_heads > 1 { (5, 3) } else { (9, 1) };
    let width = LABEL_WIDTH + n_columns * CELL_WIDTH + 4;
    let mut y = 4;
    let mut body = String::new();
    let mut layer_before = None;
    for row in &map.rows {
        let new_layer = layer_before.replace(row.layer) != Some(row.layer);
        if new_layer {
            y += gap;
            // A label on every layer would overlap when rows are low.
            if kv_heads > 2 || row.layer % 2 == 0 {
                let _ = write!(body, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">layer {}</text>", LABEL_WIDTH - 5, y + 9, row.layer);
            }
        }
        let name = match row.kv_head {
            Some(head) => format!("{}.{head}", row.layer),
            None => row.layer.to_string(),
        };
        for (column, bins) in row.share.chunks(each).enumerate() {
            let share = f64::from(bins.iter().sum::<f32>()) / bins.len() as f64;
            let first = column * each * map.bin;
            let last = (first + each * map.bin).min(map.context.max(first + 1)) - 1;
            let _ = write!(
                body,
                "<path class=\"k{}\" d=\"M{} {y}h{CELL_WIDTH}v{row_height}h-{CELL_WIDTH}z\"><title>{name}, tokens {} to {}: {}</title></path>",
                shade(share),
                LABEL_WIDTH + column * CELL_WIDTH,
                count(first),
                count(last),
                percent(share)
            );
        }
        body.push('\n');
        y += row_height;
    }
    y += 16;
    // Five places along the text, the ends included.
    for i in 0..=4 {
        let anchor = ["start", "middle", "middle", "middle", "end"][i];
        let x = LABEL_WIDTH + n_columns * CELL_WIDTH * i / 4;
        let _ = write!(body, "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{}</text>", count(map.context * i / 4));
    }
    let height = y + 8;
    let alt = format!(
        "Heat map with {} rows and {n_columns} columns: share of tokens kept by layer and place in the text. The shares by thirds of the text are in the table below.",
        map.rows.len()
    );
    format!(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Heat map, scrolls sideways\"><svg class=\"heat\" viewBox=\"0 0 {width} {height}\" \
         role=\"img\" aria-label=\"{}\" xmlns=\"http://www.w3.org/2000/svg\">\n{body}</svg></div>{}",
        escape(&alt),
        scale_legend("share kept", percent)
    )
}

pub(super) fn sample(sample: &Sample) -> Section {
    let mut body = String::from("<p class=\"tokens\">");
    let most = sample.n_layer_heads.max(1);
    for token in &sample.tokens {
        let share = token.kept_in as f64 / most as f64;
        let text = escape(&visible(&token.text));
        let _ = write!(body, "<span class=\"k{}\" title=\"kept in {} of {most}\">{text}</span>", shade(share), token.kept_in);
        // Spans that touch would never let the line break between words of a script without spaces.
        body.push_str("<wbr/>");
    }
    body.push_str("</p>");
    body.push_str(&scale_legend("of all layer-heads keep the token", percent));
    let figure = Figure {
        title: format!("{} tokens of {}", count(sample.tokens.len()), sample.text),
        drawing: body,
        legend: Vec::new(),
        wide: true,
    };

    let mut ranked: Vec<(usize, usize)> = sample.tokens.iter().enumerate().map(|(i, t)| (t.kept_in, i)).collect();
    ranked.sort_by_key(|&(kept, i)| (std::cmp::Reverse(kept), i));
    let rows = ranked
        .iter()
        .take(20)
        .map(|&(kept, i)| {
            let around: String =
                sample.tokens[i.saturating_sub(4)..(i + 4).min(sample.tokens.len())].iter().map(|t| visible(&t.text)).collect();
            let cells =
                [i.to_string(), visible(&sample.tokens[i].text), around, format!("{kept} of {most}"), percent(kept as f64 / most as f64)];
            Row { cells: cells.map(Cell::from).to_vec(), ..Row::default() }
        })
        .collect();
    let table = Table {
        caption: "The tokens kept most".into(),
        columns: ["Place in the passage", "Token", "Around it", "Layer-heads that keep it", "Share"].map(str::to_string).to_vec(),
        n_names: 3,
        rows,
        folded: true,
    };
    let lead = format!(
        "A passage as the gates see it {} tokens into the text, with {} kept per KV head: the stronger the shade of a token, the more of the {most} \
         layer-heads still keep it. Good: names, numbers and turning points strong, filler words faint.",
        count(sample.context),
        count(sample.kv_budget)
    );
    Section {
        id: "sample",
        title: "Token by token",
        lead,
        command: sample.command.clone(),
        parts: vec![Part::Figures(vec![figure]), Part::Table(table)],
    }
}

/// Line ends as a sign that can carry a shade.
fn visible(text: &str) -> String {
    text.replace('\n', "\u{21B5}").replace('\t', "  ")
}

/// 0 only for nothing at all.
fn shade(share: f64) -> usize {
    if share > 0.0 { ((share.min(1.0).sqrt() * 10.0).round() as usize).max(1) } else { 0 }
}

/// The eleven shades with the share that each stands for.
fn scale_legend(what: &str, format: fn(f64) -> String) -> String {
    let mut legend = String::from("<p class=\"scale\"><span>none</span>");
    for step in 0..=10usize {
        let share = (step * step) as f64 / 100.0;
        let _ = write!(legend, "<i class=\"k{step}\" title=\"{}\"></i>", format(share));
    }
    let _ = write!(legend, "<span>all: {what}; a quarter is the middle shade</span></p>");
    legend
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_nothing_is_blank_and_only_everything_is_full() {
        assert_eq!([0.0, 1e-6, 0.25, 0.9, 1.0, 2.0].map(shade), [0, 1, 5, 9, 10, 10]);
    }

    #[test]
    fn fine_bins_are_averaged_into_columns() {
        let share: Vec<f32> = (0..256).map(|i| if i < 128 { 1.0 } else { 0.0 }).collect();
        let map = HeatMap { context: 4096, bin: 16, rows: vec![HeatRow { layer: 3, kv_head: None, share }], ..HeatMap::default() };
        let svg = draw_heat_map(&map, 1);
        assert_eq!(svg.matches("<path").count(), 64);
        assert!(svg.contains("3, tokens 0 to 63: 100 %") && svg.contains("3, tokens 4,032 to 4,095: 0 %"));
    }
}
