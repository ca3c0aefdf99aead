//! Time and peak memory of attention by context as one SVG file, for a README: two plots side by side and a legend with the
//! fitted exponents. Light colours on a white ground, since a picture in a page does not know the page's theme.

use std::fmt::Write;

use super::html::escape;
use super::numbers::{bytes, short_count};
use super::plots::{self, Axis, Line, Plot, Point, Scale, Spread};
use super::style::{Look, Mark, PLAIN, SECOND, TEXT, hex};

/// Measurements of one kind of attention and pass.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// Routed, or else dense.
    pub is_routed: bool,
    /// Forward and backward, or else forward alone.
    pub with_backward: bool,
    /// Power of the context with which the time grows.
    pub exponent: f64,
    /// Context in tokens, seconds, peak bytes.
    pub points: Vec<(f64, f64, f64)>,
}

/// The picture; `title` says what was measured on what.
pub fn svg(title: &str, curves: &[Curve]) -> String {
    const WIDTH: usize = 1000;
    const LEGEND: usize = 70;
    let height = LEGEND + 330 + 12 * curves.len().div_ceil(2) * 2;
    let ink = hex(TEXT.light);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#FFFFFF\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"14\" fill=\"{ink}\">{}</text>\n",
        escape(title)
    );
    type Of = fn(&(f64, f64, f64)) -> f64;
    type Panel = (&'static str, Of, fn(f64) -> String);
    let panels: [Panel; 2] = [("Time", |p| p.1, seconds), ("Peak memory beyond the inputs", |p| p.2, |v| bytes(v as u64))];
    for (i, (name, value, format)) in panels.into_iter().enumerate() {
        let lines: Vec<Line> = curves
            .iter()
            .map(|c| Line { look: look(c), points: c.points.iter().map(|p| Point::plain(p.0, value(p))).collect(), spread: Spread::Band })
            .collect();
        let x = Axis { label: "context, tokens".into(), scale: Scale::Log, include: vec![], ticks: vec![], format: |v| short_count(v) };
        let y = Axis { label: String::new(), scale: Scale::Log, include: vec![], ticks: vec![], format };
        let alt = format!("{name} by context: {}", curves.iter().map(label).collect::<Vec<_>>().join("; "));
        let plot = plots::draw(&Plot { x, y, lines, reference: None }, &alt);
        let left = 10 + i * 495;
        let at = format!("<svg x=\"{left}\" y=\"{LEGEND}\" width=\"480\" height=\"300\" ");
        let plot = plot.replacen("<svg ", &at, 1);
        writeln!(out, "<text x=\"{}\" y=\"{}\" font-size=\"14\" fill=\"{ink}\">{name}</text>\n{plot}", left + 6, LEGEND - 10)
            .expect("writing to a string");
    }
    for (i, curve) in curves.iter().enumerate() {
        let (x, y) = (20 + i % 2 * 495, LEGEND + 318 + i / 2 * 24);
        writeln!(
            out,
            "<g transform=\"translate({x} {y})\">{}<text x=\"36\" y=\"12\" font-size=\"14\" fill=\"{ink}\">{}</text></g>",
            plots::swatch(&look(curve)),
            escape(&label(curve))
        )
        .expect("writing to a string");
    }
    out.push_str("</svg>\n");
    out
}

fn label(curve: &Curve) -> String {
    let kind = if curve.is_routed { "routed, routing included" } else { "dense" };
    let pass = if curve.with_backward { "forward and backward" } else { "forward" };
    format!("{kind}, {pass}: time grows with context to the power {:.2}", curve.exponent)
}

fn look(curve: &Curve) -> Look {
    let ink = if curve.is_routed { PLAIN } else { SECOND };
    let mark = match (curve.is_routed, curve.with_backward) {
        (true, false) => Mark::Circle,
        (true, true) => Mark::Diamond,
        (false, false) => Mark::Square,
        (false, true) => Mark::TriangleUp,
    };
    Look { label: label(curve), ink, mark, dashed: !curve.with_backward, strong: curve.is_routed }
}

/// Seconds on an axis.
fn seconds(v: f64) -> String {
    if v < 1.0 { format!("{} ms", short(v * 1e3)) } else { format!("{} s", short(v)) }
}

fn short(v: f64) -> String {
    if v < 10.0 { format!("{v:.1}") } else { format!("{v:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_curve_is_drawn_and_named_with_its_exponent() {
        let curve = |is_routed, with_backward, exponent: f64| Curve {
            is_routed,
            with_backward,
            exponent,
            points: [1024.0f64, 4096.0, 16384.0].map(|t| (t, 1e-6 * t.powf(exponent), 10.0 * t)).to_vec(),
        };
        let curves = [curve(false, false, 2.12), curve(false, true, 2.04), curve(true, false, 1.06), curve(true, true, 1.03)];
        let svg = svg("A <layer>", &curves);
        for expected in ["A &lt;layer&gt;", "to the power 2.12", "to the power 1.03", "Peak memory", "<polyline"] {
            assert!(svg.contains(expected), "{expected} is missing from {svg}");
        }
        assert_eq!(svg.matches("<svg").count(), svg.matches("</svg>").count());
        // Nothing is fetched from elsewhere.
        assert_eq!(svg.matches("http").count(), svg.matches("http://www.w3.org/2000/svg").count());
    }
}
