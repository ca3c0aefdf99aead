//! Colours, marks and labels: one look per policy throughout a report, told apart by hue, lightness, mark and dash, so that colour is
//! never the only clue. The colours were chosen by search: smallest CIE Lab distance between any two under normal vision,
//! deuteranopia, protanopia and tritanopia (Machado et al. 2009), at 3:1 contrast or more with the page, in light and in dark.

use super::Report;

/// A colour on a light page and on a dark one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ink {
    pub(super) light: (u8, u8, u8),
    pub(super) dark: (u8, u8, u8),
}

/// Shape at the points of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    None,
    Circle,
    Square,
    Diamond,
    TriangleUp,
    TriangleDown,
    Cross,
    Bar,
}

/// Look of one line.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Look {
    pub(super) label: String,
    pub(super) ink: Ink,
    pub(super) mark: Mark,
    pub(super) dashed: bool,
    /// Drawn last and thicker: what the report is about.
    pub(super) strong: bool,
}

/// Text, axes and grid of a plot; the values are repeated as variables in `report.css`.
pub(super) const TEXT: Ink = ink(0x57606A, 0xA3ADB8);
pub(super) const AXIS: Ink = ink(0x8C959F, 0x6B7684);
pub(super) const GRID: Ink = ink(0xE2E6EB, 0x2B323B);
/// One line alone, without policy.
pub(super) const PLAIN: Ink = GATE;
/// Second line beside [`PLAIN`].
pub(super) const SECOND: Ink = STREAMING;

const DENSE: Ink = ink(0x3F454D, 0xE3E6E8);
const GATE: Ink = ink(0x0B62A0, 0x3D94F5);
const STREAMING: Ink = ink(0xA04408, 0xF4511E);
const RANDOM: Ink = ink(0xCF5FCB, 0xC87DBC);
const H2O: Ink = ink(0xB88514, 0xF5D547);
const ORACLE: Ink = ink(0x0B9D8A, 0x16C27A);
/// For names that are not among the six.
const OTHERS: [(Ink, Mark); 4] = [
    (ink(0x5B4FB3, 0xA79BFF), Mark::Cross),
    (ink(0x7A5C3E, 0xC9A27E), Mark::Bar),
    (ink(0x6B7A12, 0xB9C84A), Mark::Square),
    (ink(0xB3245B, 0xFF8FB3), Mark::Diamond),
];

/// Every colour of a plot, for the rules that turn light into dark.
pub(super) const ALL_INKS: [Ink; 13] =
    [TEXT, AXIS, GRID, DENSE, GATE, STREAMING, RANDOM, H2O, ORACLE, OTHERS[0].0, OTHERS[1].0, OTHERS[2].0, OTHERS[3].0];

const fn ink(light: u32, dark: u32) -> Ink {
    const fn rgb(hex: u32) -> (u8, u8, u8) {
        ((hex >> 16) as u8, (hex >> 8) as u8, hex as u8)
    }
    Ink { light: rgb(light), dark: rgb(dark) }
}

/// `#RRGGBB`, in capitals as the plots write it.
pub(super) fn hex((r, g, b): (u8, u8, u8)) -> String {
    format!("#{r:02X}{g:02X}{b:02X}")
}

/// The looks of all policies of a report.
pub(super) struct Looks {
    others: Vec<String>,
}

impl Looks {
    pub(super) fn of(report: &Report) -> Self {
        let quality = report.quality.iter().flat_map(|t| &t.rows).map(|r| &r.policy);
        let recall = report.recall.iter().flat_map(|r| &r.rows).map(|r| &r.policy);
        let mut others: Vec<String> = quality.chain(recall).filter(|p| known(p).is_none()).cloned().collect();
        others.sort();
        others.dedup();
        Self { others }
    }

    /// The look of a policy.
    pub(super) fn policy(&self, name: &str) -> Look {
        if let Some(look) = known(name) {
            return look;
        }
        let at = self.others.iter().position(|o| o == name).unwrap_or(0);
        let (ink, mark) = OTHERS[at % OTHERS.len()];
        // A second round over the colours is told apart by dashes.
        Look { label: name.to_string(), ink, mark, dashed: at >= OTHERS.len(), strong: false }
    }

    /// Place of a policy in legends and tables: dense and the gate first, the upper reference last.
    pub(super) fn rank(&self, name: &str) -> (usize, String) {
        let place = match name {
            "dense" => 0,
            "gate" => 1,
            "streaming" => 3,
            "h2o" => 4,
            "random" => 5,
            "oracle" => 6,
            _ => 2,
        };
        (place, name.to_string())
    }
}

fn known(name: &str) -> Option<Look> {
    let (label, ink, mark) = match name {
        "dense" => ("Dense", DENSE, Mark::None),
        "gate" => ("Gate", GATE, Mark::Circle),
        "streaming" => ("StreamingLLM", STREAMING, Mark::Square),
        "random" => ("Random", RANDOM, Mark::TriangleDown),
        "h2o" => ("H2O", H2O, Mark::Diamond),
        "oracle" => ("Oracle", ORACLE, Mark::TriangleUp),
        _ => return None,
    };
    Some(Look { label: label.to_string(), ink, mark, dashed: matches!(name, "dense" | "oracle"), strong: name == "gate" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_colour_stands_out_from_its_page() {
        let luminance = |(r, g, b): (u8, u8, u8)| {
            let linear = |c: u8| {
                let c = f64::from(c) / 255.0;
                if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
            };
            0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b)
        };
        let contrast = |a, b| {
            let (a, b) = (luminance(a), luminance(b));
            (a.max(b) + 0.05) / (a.min(b) + 0.05)
        };
        for ink in ALL_INKS.into_iter().filter(|&i| i != GRID && i != AXIS) {
            assert!(contrast(ink.light, (255, 255, 255)) >= 3.0, "{} on white", hex(ink.light));
            assert!(contrast(ink.dark, (0x16, 0x1B, 0x22)) >= 3.0, "{} on dark", hex(ink.dark));
        }
    }

    #[test]
    fn no_two_lines_look_alike() {
        let looks = Looks { others: (0..8).map(|i| format!("other {i}")).collect() };
        let names = ["dense", "gate", "streaming", "random", "h2o", "oracle"].map(str::to_string);
        let all: Vec<Look> = names.iter().chain(&looks.others).map(|n| looks.policy(n)).collect();
        for (i, a) in all.iter().enumerate() {
            for b in &all[..i] {
                assert!((a.ink, a.mark, a.dashed) != (b.ink, b.mark, b.dashed), "{} and {}", a.label, b.label);
            }
        }
    }
}
