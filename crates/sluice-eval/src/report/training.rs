//! Sections: training curves, and whether routing is healthy.

use super::numbers::{count, loss, nats, percent, short_count, short_nats, times, whole};
use super::plots::{self, Axis, Line, Plot, Point, Scale, Spread};
use super::sections::{Cell, Figure, Part, Row, Section, Table, describe, plain, strings};
use super::style::Look;
use super::{Curves, Health, LayerHealth, StageCurve};

pub(super) fn curves(curves: &Curves) -> Section {
    let mut figures = Vec::new();
    for stage in curves.stages.iter().filter(|s| !s.points.is_empty()) {
        figures.push(loss_figure(stage));
        let speeds: Vec<Point> = stage.points.iter().filter_map(|p| p.tokens_per_s.map(|s| Point::plain(p.step as f64, s))).collect();
        if speeds.len() > 1 {
            let look = plain("Tokens/s", false);
            let lines = vec![Line { look, points: condense(&speeds), spread: Spread::Band }];
            let title = format!("{}: tokens/s", stage.stage);
            figures.push(step_figure(title, lines, vec![0.0], short_count));
        }
    }
    let mut rows = Vec::new();
    for stage in curves.stages.iter().filter(|s| !s.points.is_empty()) {
        let (first, last) = (&stage.points[0], &stage.points[stage.points.len() - 1]);
        let held_out = stage.points.iter().rev().find_map(|p| p.held_out).map_or(String::new(), loss);
        let cells = [stage.stage.clone(), stage.loss.clone(), count(last.step as usize), loss(first.loss), loss(last.loss), held_out];
        rows.push(Row { cells: cells.map(Cell::from).to_vec(), ..Row::default() });
    }
    let columns = strings(&["Stage", "Loss", "Last step", "First", "Last", "Last on held-out text"]);
    let table = Table { caption: "Where each curve begins and ends.".into(), columns, n_names: 2, rows, folded: false };
    let lead = "Loss against step, stage by stage; the stages measure different things, so their heights do not compare. Where steps are \
                many, a point is the mean of several and the band shows their range. Good: falling, then flat, with the held-out line along \
                the other. A rise in the first half is expected where the budget is still shrinking.";
    Section {
        id: "curves",
        title: "Training",
        lead: lead.into(),
        command: curves.command.clone(),
        parts: vec![Part::Figures(figures), Part::Table(table)],
    }
}

fn loss_figure(stage: &StageCurve) -> Figure {
    let points: Vec<Point> = stage.points.iter().map(|p| Point::plain(p.step as f64, p.loss)).collect();
    let held_out: Vec<Point> = stage.points.iter().filter_map(|p| p.held_out.map(|h| Point::plain(p.step as f64, h))).collect();
    let mut lines = vec![Line { look: plain("Training", false), points: condense(&points), spread: Spread::Band }];
    if !held_out.is_empty() {
        lines.push(Line { look: plain("Held-out text", true), points: held_out, spread: Spread::Band });
    }
    step_figure(format!("{}: {}", stage.stage, stage.loss), lines, vec![], loss)
}

fn step_figure(title: String, lines: Vec<Line>, include: Vec<f64>, format: fn(f64) -> String) -> Figure {
    let alt = describe(&title, "step", &lines, |v| count(v as usize), format);
    let legend = if lines.len() > 1 { lines.iter().map(|l| l.look.clone()).collect() } else { Vec::new() };
    let x = Axis { label: "step".into(), scale: Scale::Linear, include: vec![], ticks: vec![], format: short_count };
    let y = Axis { label: String::new(), scale: Scale::Linear, include, ticks: vec![], format };
    Figure { title, drawing: plots::draw(&Plot { x, y, lines, reference: None }, &alt), legend, wide: false }
}

/// At most 150 points, each the mean of its neighbours with their range.
fn condense(points: &[Point]) -> Vec<Point> {
    let each = points.len().div_ceil(150);
    points
        .chunks(each.max(1))
        .filter_map(|chunk| {
            let finite: Vec<&Point> = chunk.iter().filter(|p| p.y.is_finite()).collect();
            let n = finite.len() as f64;
            (n > 0.0).then(|| Point {
                x: finite.iter().map(|p| p.x).sum::<f64>() / n,
                y: finite.iter().map(|p| p.y).sum::<f64>() / n,
                low: finite.iter().map(|p| p.y).fold(f64::INFINITY, f64::min),
                high: finite.iter().map(|p| p.y).fold(f64::NEG_INFINITY, f64::max),
            })
        })
        .collect()
}

pub(super) fn health(health: &Health) -> Section {
    let layers = &health.layers;
    let line = |look: Look, points: Vec<Point>| Line { look, points, spread: Spread::Band };
    let at = |f: &dyn Fn(&LayerHealth) -> Option<f64>| -> Vec<Point> {
        layers.iter().filter_map(|l| f(l).map(|y| Point::plain(l.layer as f64, y))).collect()
    };
    let figure = |title: &str, lines: Vec<Line>, scale: Scale, include: Vec<f64>, format: fn(f64) -> String| {
        let lines: Vec<Line> = lines.into_iter().filter(|l| !l.points.is_empty()).collect();
        let alt = describe(title, "layer", &lines, |v| format!("{v:.0}"), format);
        let legend = if lines.len() > 1 { lines.iter().map(|l| l.look.clone()).collect() } else { Vec::new() };
        let x = Axis { label: "layer".into(), scale: Scale::Linear, include: vec![], ticks: vec![], format: whole };
        let ticks = if include.contains(&1.0) { vec![0.0, 0.25, 0.5, 0.75, 1.0] } else { vec![] };
        let y = Axis { label: String::new(), scale, include, ticks, format };
        Figure { title: title.into(), drawing: plots::draw(&Plot { x, y, lines, reference: None }, &alt), legend, wide: false }
    };
    let mut figures = Vec::new();
    if layers.iter().any(|l| l.kept_mass.is_some()) {
        let lines = vec![line(plain("Kept", false), at(&|l| l.kept_mass))];
        figures.push(figure("Attention mass of dense that falls on kept tokens", lines, Scale::Linear, vec![0.0, 1.0], percent));
    }
    figures.push(figure(
        "Overlap of consecutive kept sets (Jaccard)",
        vec![line(plain("Jaccard", false), at(&|l| Some(l.jaccard)))],
        Scale::Linear,
        vec![0.0, 1.0],
        percent,
    ));
    let admissions = vec![
        line(plain("Admitted", false), at(&|l| Some(l.admissions))),
        line(plain("Expected of unordered scores", true), at(&|l| Some(l.expected_admissions))),
    ];
    figures.push(figure("Tokens admitted per KV head", admissions, Scale::Linear, vec![0.0], short_count));
    let margins = layers.iter().map(|l| Point { x: l.layer as f64, y: l.margin.p50, low: l.margin.p25, high: l.margin.p75 }).collect();
    figures.push(figure(
        "Margin of the decision: median, band 25 to 75 %",
        vec![line(plain("Median", false), margins)],
        Scale::Root,
        vec![0.0],
        short_nats,
    ));

    let mass = layers.iter().any(|l| l.kept_mass.is_some());
    let mut columns = strings(&["Layer"]);
    columns.extend(mass.then(|| "Kept mass".into()));
    columns.extend(strings(&["Jaccard", "Admitted", "Expected", "Ratio", "Margin 5 %", "25 %", "50 %", "75 %", "95 %"]));
    let rows = layers
        .iter()
        .map(|l| {
            let mut cells: Vec<Cell> = vec![l.layer.to_string().into()];
            cells.extend(mass.then(|| l.kept_mass.map_or(String::new(), percent).into()));
            cells.extend(
                [percent(l.jaccard), count(l.admissions.round() as usize), count(l.expected_admissions.round() as usize)].map(Cell::from),
            );
            let ratio = if l.expected_admissions > 0.0 { times(l.admissions / l.expected_admissions) } else { String::new() };
            cells.push(ratio.into());
            let m = l.margin;
            cells.extend([m.p05, m.p25, m.p50, m.p75, m.p95].map(|v| Cell::from(nats(v))));
            Row { cells, ..Row::default() }
        })
        .collect();
    let table = Table { caption: "Layer by layer".into(), columns, n_names: 1, rows, folded: true };
    let mut parts = vec![Part::Figures(figures), Part::Table(table)];
    let weakest = layers.iter().filter_map(|l| l.kept_mass.map(|m| (m, l.layer))).min_by(|a, b| a.0.total_cmp(&b.0));
    if let Some((mass, layer)) = weakest {
        parts.insert(0, Part::Note(format!("Least attention is kept in layer {layer}: {}.", percent(mass))));
    }
    let lead = "Whether the gates decide calmly and keep what attention wants. Good: kept mass near 100 % in every layer; kept sets that \
                change slowly (Jaccard above 80 %); admissions no more than a few times what scores without order in time would give, \
                k (1 + ln((T - w) / k)); more means that the gate prefers each newest token, which is what StreamingLLM does. Margins \
                near zero mean decisions that rounding could flip.";
    Section { id: "health", title: "Routing health", lead: lead.into(), command: health.command.clone(), parts }
}
