//! Line plots as inline SVG. Knows points, axes and looks; nothing about what they mean.
//!
//! The light colours are written into the SVG; [`dark_rules`] gives the style sheet that turns them dark, by matching the very
//! attributes, so that a plot needs no second copy.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::prelude::*;

use super::style::{ALL_INKS, AXIS, GRID, Ink, Look, Mark, TEXT, hex};

/// A plot in the making.
pub(super) struct Plot {
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) lines: Vec<Line>,
    /// A thin horizontal line at this height.
    pub(super) reference: Option<f64>,
}

/// One axis.
pub(super) struct Axis {
    pub(super) label: String,
    pub(super) scale: Scale,
    /// Values that must be inside.
    pub(super) include: Vec<f64>,
    /// Where to put ticks; chosen from the data when empty.
    pub(super) ticks: Vec<f64>,
    pub(super) format: fn(f64) -> String,
}

/// How a value becomes a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    Linear,
    /// Equal ratios, equal distances; values must be positive.
    Log,
    /// Signed square root: room near zero, where good results are, and zero itself still on the axis.
    Root,
}

/// One line.
pub(super) struct Line {
    pub(super) look: Look,
    pub(super) points: Vec<Point>,
    /// How `low` and `high` are drawn.
    pub(super) spread: Spread,
}

/// A point with its interval.
#[derive(Clone, Copy)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// How an interval is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spread {
    /// A whisker at each point.
    Whiskers,
    /// A band along the line.
    Band,
}

/// Drawn at four times the size that is meant, since plotters rounds to whole units: lines stay straight and dashes even.
const UNIT: u32 = 4;
const WIDTH: u32 = 480 * UNIT;
const HEIGHT: u32 = 300 * UNIT;
/// plotters divides by 1.24 to get the size of the letters.
const FONT: u32 = 15 * UNIT;

impl Point {
    /// A point without interval.
    pub(super) fn plain(x: f64, y: f64) -> Self {
        Self { x, y, low: y, high: y }
    }
}

impl Scale {
    fn can_show(self, v: f64) -> bool {
        v.is_finite() && (self != Self::Log || v > 0.0)
    }

    fn place(self, v: f64) -> f64 {
        match self {
            Self::Linear => v,
            Self::Log => v.log2(),
            Self::Root => v.signum() * v.abs().sqrt(),
        }
    }
}

/// Style rules for dark pages: each light colour of a plot, wherever it stands, to its dark twin.
pub(super) fn dark_rules() -> String {
    let mut rules = String::new();
    for Ink { light, dark } in ALL_INKS {
        let (light, dark) = (hex(light), hex(dark));
        rules.push_str(&format!("svg [fill=\"{light}\"]{{fill:{dark}}}svg [stroke=\"{light}\"]{{stroke:{dark}}}\n"));
    }
    rules
}

/// The plot as `<svg>`, of flexible width. `alt` says in words what it shows.
pub(super) fn draw(plot: &Plot, alt: &str) -> String {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        draw_on(&root, plot).and_then(|()| root.present()).expect("drawing into a string cannot fail");
    }
    // Flexible width, a role and a name, instead of fixed pixels.
    let body = svg.find('>').map_or("", |end| svg[end + 1..].trim_start());
    format!(
        "<svg class=\"plot\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{alt}\" xmlns=\"http://www.w3.org/2000/svg\">\n{body}",
        alt = super::html::escape(alt)
    )
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type DrawError<'a> = DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>;

fn draw_on<'a>(root: &Area<'a>, plot: &Plot) -> Result<(), DrawError<'a>> {
    let all = || plot.lines.iter().flat_map(|l| &l.points);
    let x = Extent::of(&plot.x, all().map(|p| p.x), 0.04);
    let y = Extent::of(&plot.y, all().flat_map(|p| [p.y, p.low, p.high]).chain(plot.reference), 0.05);

    let (left, right) = (x.from, x.to);
    let widest = y.ticks.iter().map(|t| t.label.chars().count()).max().unwrap_or(0) as u32;
    let mut chart = ChartBuilder::on(root)
        .margin_top(10 * UNIT)
        .margin_right(20 * UNIT)
        .margin_bottom(2 * UNIT)
        .margin_left(2 * UNIT)
        .x_label_area_size(44 * UNIT)
        .y_label_area_size((16 + widest * 8) * UNIT)
        .build_cartesian_2d(x, y)?;

    let text = ("sans-serif", FONT).into_font().color(&color(TEXT));
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(0)
        .bold_line_style(color(GRID).stroke_width(UNIT))
        .axis_style(color(AXIS).stroke_width(UNIT))
        .set_all_tick_mark_size((5 * UNIT) as i32)
        .label_style(text.clone())
        .axis_desc_style(text)
        .x_desc(plot.x.label.clone())
        .draw()?;
    if let Some(height) = plot.reference {
        let at = plot.y.scale.place(height);
        chart.draw_series(DashedLineSeries::new([(left, at), (right, at)], 2 * UNIT, 3 * UNIT, color(TEXT).stroke_width(UNIT)))?;
    }

    // Whiskers at the same x stand side by side, else they hide each other.
    let whiskered = plot.lines.iter().filter(|l| l.spread == Spread::Whiskers).count();
    let mut order: Vec<usize> = (0..plot.lines.len()).collect();
    order.sort_by_key(|&i| plot.lines[i].look.strong);
    for i in order {
        let line = &plot.lines[i];
        let aside = match line.spread {
            Spread::Whiskers => (i as f64 - (whiskered as f64 - 1.0) / 2.0) * 0.009 * (right - left),
            Spread::Band => 0.0,
        };
        let at = |px: f64, py: f64| (plot.x.scale.place(px) + aside, plot.y.scale.place(py));
        let points: Vec<&Point> = line.points.iter().filter(|p| plot.x.scale.can_show(p.x) && plot.y.scale.can_show(p.y)).collect();
        let path: Vec<(f64, f64)> = points.iter().map(|p| at(p.x, p.y)).collect();
        let ink = color(line.look.ink);
        if line.spread == Spread::Band && points.iter().any(|p| p.low < p.high) {
            let edge = points.iter().map(|p| at(p.x, p.low)).chain(points.iter().rev().map(|p| at(p.x, p.high)));
            chart.draw_series([Polygon::new(edge.collect::<Vec<_>>(), ink.mix(0.18).filled())])?;
        }
        let stroke = ink.stroke_width(if line.look.strong { 3 * UNIT } else { 2 * UNIT });
        if line.look.dashed {
            chart.draw_series(DashedLineSeries::new(path.iter().copied(), 6 * UNIT, 4 * UNIT, stroke))?;
        } else {
            chart.draw_series(LineSeries::new(path.iter().copied(), stroke))?;
        }
        if line.spread == Spread::Whiskers {
            for p in points.iter().filter(|p| p.low < p.high) {
                chart.draw_series([PathElement::new([at(p.x, p.low), at(p.x, p.high)], ink.stroke_width(UNIT))])?;
            }
        }
        for &(px, py) in &path {
            draw_mark(&mut chart, (px, py), line.look.mark, ink, line.look.strong)?;
        }
    }
    Ok(())
}

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<Extent, Extent>>;

fn draw_mark<'b>(chart: &mut Chart<'_, 'b>, at: (f64, f64), mark: Mark, ink: RGBColor, strong: bool) -> Result<(), DrawError<'b>> {
    // In units of the page, as if drawn at size.
    let r = if strong { 5 } else { 4 };
    let corners: Vec<(i32, i32)> = match mark {
        Mark::None => return Ok(()),
        Mark::Circle => return chart.draw_series([Circle::new(at, r * UNIT as i32, ink.filled())]).map(drop),
        Mark::Square => vec![(-r, -r), (r, -r), (r, r), (-r, r)],
        Mark::Diamond => vec![(0, -r - 2), (r + 1, 0), (0, r + 2), (-r - 1, 0)],
        Mark::TriangleUp => vec![(0, -r - 1), (r + 1, r), (-r - 1, r)],
        Mark::TriangleDown => vec![(0, r + 1), (r + 1, -r), (-r - 1, -r)],
        Mark::Cross => vec![(-5, -3), (-3, -5), (0, -2), (3, -5), (5, -3), (2, 0), (5, 3), (3, 5), (0, 2), (-3, 5), (-5, 3), (-2, 0)],
        Mark::Bar => vec![(-2, -r - 2), (2, -r - 2), (2, r + 2), (-2, r + 2)],
    };
    let corners: Vec<(i32, i32)> = corners.into_iter().map(|(x, y)| (x * UNIT as i32, y * UNIT as i32)).collect();
    chart.draw_series([EmptyElement::at(at) + Polygon::new(corners, ink.filled())]).map(drop)
}

fn color(ink: Ink) -> RGBColor {
    let (r, g, b) = ink.light;
    RGBColor(r, g, b)
}

/// Range of an axis in places, that is, after [`Scale::place`].
struct Extent {
    from: f64,
    to: f64,
    ticks: Vec<Tick>,
}

struct Tick {
    place: f64,
    label: String,
}

impl Ranged for Extent {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, (first, last): (i32, i32)) -> i32 {
        first + ((place - self.from) / (self.to - self.from) * f64::from(last - first)).round() as i32
    }

    fn key_points<H: KeyPointHint>(&self, hint: H) -> Vec<f64> {
        // The finer points between the labelled ones are not wanted.
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.iter().map(|t| t.place).collect() }
    }

    fn range(&self) -> Range<f64> {
        self.from..self.to
    }
}

impl ValueFormatter<f64> for Extent {
    fn format_ext(&self, place: &f64) -> String {
        self.ticks.iter().find(|t| t.place == *place).map_or(String::new(), |t| t.label.clone())
    }
}

impl Extent {
    fn of(axis: &Axis, values: impl Iterator<Item = f64>, margin: f64) -> Self {
        let values: Vec<f64> =
            values.chain(axis.include.iter().copied()).chain(axis.ticks.iter().copied()).filter(|v| axis.scale.can_show(*v)).collect();
        let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
        let (low, high) = if values.is_empty() { (1.0, 2.0) } else { (low, high) };
        let (mut from, mut to) = (axis.scale.place(low), axis.scale.place(high));
        if to - from < 1e-9 * to.abs().max(1e-3) {
            // A single value: give it room on both sides.
            let room = if axis.scale == Scale::Log { 1.0 } else { 0.5 * to.abs().max(1e-3) };
            (from, to) = (from - room, to + room);
        }
        let room = margin * (to - from);
        // Zero as the lowest value is the floor, not a point to keep away from.
        let from_zero = low == 0.0 && axis.scale != Scale::Log && margin > 0.045;
        let (from, to) = (if from_zero { 0.0 } else { from - room }, to + room);
        let values = if axis.ticks.is_empty() { ticks(axis.scale, from, to, low, high) } else { axis.ticks.clone() };
        let mut ticks: Vec<Tick> = values.into_iter().map(|v| Tick { place: axis.scale.place(v), label: (axis.format)(v) }).collect();
        ticks.retain(|t| t.place >= from && t.place <= to);
        Self { from, to, ticks: thin_out(ticks, (to - from) * 0.11) }
    }
}

/// Round numbers for an axis between the places `from` and `to`, with data from `low` to `high`.
fn ticks(scale: Scale, from: f64, to: f64, low: f64, high: f64) -> Vec<f64> {
    match scale {
        Scale::Linear => {
            let rough = (to - from) / 5.0;
            let magnitude = 10f64.powf(rough.log10().floor());
            let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * magnitude).find(|&s| s >= rough).unwrap_or(10.0 * magnitude);
            // Whole multiples: adding the step up would collect rounding errors and print 0.30000000000000004.
            ((from / step).ceil() as i64..=(to / step).floor() as i64).map(|i| i as f64 * step).collect()
        }
        Scale::Log => {
            let every = ((to - from) / 6.0).ceil().max(1.0) as i32;
            (from.floor() as i32..=to.ceil() as i32).filter(|i| i % every == 0).map(|i| 2f64.powi(i)).collect()
        }
        Scale::Root => {
            let top = high.abs().max(low.abs());
            let mut positive: Vec<f64> =
                (-5..4).flat_map(|e| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(e))).filter(|&v| v <= top * 1.1).collect();
            positive.reverse();
            let negative: Vec<f64> = positive.iter().map(|v| -v).collect();
            [vec![0.0], positive, negative].concat()
        }
    }
}

/// Drop ticks that would come closer than `apart` to one kept before; sorted by place.
fn thin_out(ticks: Vec<Tick>, apart: f64) -> Vec<Tick> {
    let mut kept: Vec<Tick> = Vec::new();
    for tick in ticks {
        if kept.iter().all(|k| (k.place - tick.place).abs() >= apart) {
            kept.push(tick);
        }
    }
    kept.sort_by(|a, b| a.place.total_cmp(&b.place));
    kept
}

/// A small line with its mark, for legends.
pub(super) fn swatch(look: &Look) -> String {
    let ink = hex(look.ink.light);
    let dash = if look.dashed { " stroke-dasharray=\"5 3\"" } else { "" };
    let mark = match look.mark {
        Mark::None => String::new(),
        Mark::Circle => format!("<circle cx=\"14\" cy=\"7\" r=\"4.5\" fill=\"{ink}\"/>"),
        Mark::Square => format!("<path d=\"M10 3h8v8h-8z\" fill=\"{ink}\"/>"),
        Mark::Diamond => format!("<path d=\"M14 1l5 6-5 6-5-6z\" fill=\"{ink}\"/>"),
        Mark::TriangleUp => format!("<path d=\"M14 2l5 9h-10z\" fill=\"{ink}\"/>"),
        Mark::TriangleDown => format!("<path d=\"M14 12l5-9h-10z\" fill=\"{ink}\"/>"),
        Mark::Cross => format!("<path d=\"M10 3l8 8M18 3l-8 8\" stroke=\"{ink}\" stroke-width=\"3\"/>"),
        Mark::Bar => format!("<path d=\"M12 1h4v12h-4z\" fill=\"{ink}\"/>"),
    };
    format!(
        "<svg class=\"swatch\" viewBox=\"0 0 28 14\" aria-hidden=\"true\"><path d=\"M0 7h28\" stroke=\"{ink}\" stroke-width=\"2.5\"{dash}/>{mark}</svg>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_ticks_are_round_and_inside() {
        assert_eq!(ticks(Scale::Linear, -0.01, 1.01, 0.0, 1.0).len(), 3);
        assert_eq!(ticks(Scale::Linear, 2.9, 4.1, 3.0, 4.0), vec![3.0, 3.5, 4.0]);
    }

    #[test]
    fn root_axis_keeps_zero_and_thins_what_is_crowded() {
        let axis = Axis { label: String::new(), scale: Scale::Root, include: vec![0.0], ticks: vec![], format: |v| v.to_string() };
        let extent = Extent::of(&axis, [0.013, 0.48].into_iter(), 0.05);
        let labels: Vec<&str> = extent.ticks.iter().map(|t| t.label.as_str()).collect();
        assert!(labels.contains(&"0") && labels.contains(&"0.5") && labels.len() >= 4, "{labels:?}");
        assert!(extent.ticks.windows(2).all(|w| w[1].place - w[0].place >= 0.1 * (extent.to - extent.from)));
    }

    #[test]
    fn degenerate_data_still_makes_a_plot() {
        for scale in [Scale::Linear, Scale::Log, Scale::Root] {
            for points in [vec![], vec![Point::plain(5.0, 0.0)], vec![Point::plain(1.0, f64::NAN), Point::plain(2.0, 3.0)]] {
                let axis = |scale| Axis { label: "x".into(), scale, include: vec![], ticks: vec![], format: |v| format!("{v:.1}") };
                let look = super::super::style::Looks::of(&super::super::Report::default()).policy("gate");
                let line = Line { look, points, spread: Spread::Whiskers };
                let svg = draw(&Plot { x: axis(Scale::Linear), y: axis(scale), lines: vec![line], reference: None }, "a & b");
                assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"), "{svg}");
                assert!(svg.contains("aria-label=\"a &amp; b\""));
            }
        }
    }
}
