//! Numbers as a reader sees them: digits that matter, units, thousands apart.

use crate::bootstrap::Estimate;

use super::sections::Cell;

/// Nats to three decimals, more where the first ones are zero.
pub(super) fn nats(v: f64) -> String {
    if v != 0.0 && v.abs() < 0.001 { format!("{v:.4}") } else { format!("{v:.3}") }
}

/// Nats on an axis: no zeros at the end.
pub(super) fn short_nats(v: f64) -> String {
    let text = format!("{v:.5}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// A loss: four digits in all.
pub(super) fn loss(v: f64) -> String {
    match v.abs() {
        a if !a.is_finite() => "not a number".into(),
        a if a >= 100.0 => format!("{v:.0}"),
        a if a >= 10.0 => format!("{v:.1}"),
        a if a >= 1.0 => format!("{v:.2}"),
        a if a >= 0.01 || a == 0.0 => format!("{v:.3}"),
        _ => format!("{v:.2e}"),
    }
}

/// "0.013 (0.011 to 0.015) nats per token".
pub(super) fn nats_with_interval(e: Estimate) -> String {
    let interval = if e.low < e.high { format!(" ({} to {})", nats(e.low), nats(e.high)) } else { String::new() };
    format!("{}{interval} nats per token", nats(e.mean))
}

/// A share in percent: one decimal where it is not a whole number.
pub(super) fn percent(v: f64) -> String {
    let text = format!("{:.1}", 100.0 * v);
    let text = text.strip_suffix(".0").unwrap_or(&text);
    format!("{} %", if text == "-0" { "0" } else { text })
}

/// A ratio with three digits.
pub(super) fn times(v: f64) -> String {
    match v.abs() {
        a if a >= 99.5 => format!("{v:.0}x"),
        a if a >= 9.95 => format!("{v:.1}x"),
        a if a >= 0.0995 => format!("{v:.2}x"),
        _ => format!("{v:.3}x"),
    }
}

/// `v` beside `reference` in words: "7.5x less", with the words for below and above given.
pub(super) fn compared(v: f64, reference: f64, below: &str, above: &str) -> String {
    let ratio = v / reference;
    match ratio {
        r if (0.995..1.005).contains(&r) => "as dense".into(),
        r if r < 1.0 => format!("{} {below}", times(1.0 / r)),
        r => format!("{} {above}", times(r)),
    }
}

/// A whole number, thousands apart.
pub(super) fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(d);
    }
    text
}

/// A number on an axis, thousands as k and binary thousands as Ki would be misread: 4096 stays "4,096", 131072 becomes "131k".
pub(super) fn short_count(v: f64) -> String {
    match v.abs() {
        a if a >= 1e6 => format!("{}M", short_nats((v / 1e4).round() / 100.0)),
        a if a >= 1e5 => format!("{}k", (v / 1e3).round()),
        a if a >= 1e4 => format!("{}k", short_nats((v / 1e2).round() / 10.0)),
        a if a >= 10.0 || a == 0.0 => {
            let sign = if v < 0.0 { "-" } else { "" };
            format!("{sign}{}", count(a.round() as usize))
        }
        _ => short_nats((v * 100.0).round() / 100.0),
    }
}

/// A layer number on an axis; nothing between two layers.
pub(super) fn whole(v: f64) -> String {
    if v.fract() == 0.0 { format!("{v:.0}") } else { String::new() }
}

/// Tokens per second.
pub(super) fn speed(v: f64) -> String {
    if v >= 100.0 { count(v.round() as usize) } else { format!("{v:.1}") }
}

/// Bytes in binary units.
pub(super) fn bytes(n: u64) -> String {
    scaled(n as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

/// Floating-point operations.
pub(super) fn flop_count(v: f64) -> String {
    scaled(v, 1000.0, &["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"])
}

fn scaled(mut v: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // 0.9995: what would round to 1,000 of a unit is one of the next.
    while v >= step * 0.9995 && unit + 1 < units.len() {
        v /= step;
        unit += 1;
    }
    let number = match v {
        v if unit == 0 || v >= 99.5 => format!("{v:.0}"),
        v if v >= 9.95 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    };
    let number = if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { &number };
    format!("{number} {}", units[unit])
}

/// Seconds as a person says them.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        _ if !seconds.is_finite() => String::new(),
        _ if seconds < 10.0 => format!("{seconds:.1} s"),
        s if s < 120 => format!("{s} s"),
        s if s < 7200 => format!("{} min {} s", s / 60, s % 60),
        s => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

/// The mean with its interval as small print.
pub(super) fn estimate_cell(e: Estimate, format: fn(f64) -> String) -> Cell {
    let sub = if e.low < e.high { between(format(e.low), format(e.high)) } else { String::new() };
    Cell { main: format(e.mean), sub }
}

/// One value, or the lowest "to" the highest.
pub(super) fn range(values: impl Iterator<Item = f64>, format: impl Fn(f64) -> String) -> String {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    between(format(low), format(high))
}

/// "43 to 57 %": a unit that both share is said once.
fn between(low: String, high: String) -> String {
    if low == high {
        return low;
    }
    let low = match (low.split_once(' '), high.split_once(' ')) {
        (Some((number, a)), Some((_, b))) if a == b => number,
        _ => &low,
    };
    format!("{low} to {high}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        for (got, want) in [
            (nats(0.0132), "0.013"),
            (nats(-0.00042), "-0.0004"),
            (short_nats(0.05), "0.05"),
            (short_nats(-0.0), "0"),
            (percent(0.125), "12.5 %"),
            (percent(1.0), "100 %"),
            (percent(-0.0001), "0 %"),
            (times(10.66), "10.7x"),
            (times(0.094), "0.094x"),
            (compared(45.0, 360.0, "less", "more"), "8.00x less"),
            (compared(1.501, 1.5, "less", "more"), "as dense"),
            (compared(3.0, 2.0, "slower", "faster"), "1.50x faster"),
            (count(1_234_567), "1,234,567"),
            (short_count(4096.0), "4,096"),
            (short_count(131_072.0), "131k"),
            (bytes(23_592_960), "22.5 MiB"),
            (bytes(1023), "1023 B"),
            (bytes(1 << 30), "1 GiB"),
            (bytes((1 << 20) - 1), "1 MiB"),
            (flop_count(3.2e12), "3.2 TFLOP"),
            (flop_count(999_999.0), "1 MFLOP"),
            (duration(4.25), "4.2 s"),
            (duration(3725.0), "62 min 5 s"),
            (duration(90_000.0), "25 h 0 min"),
            (loss(f64::NAN), "not a number"),
            (loss(0.00052), "5.20e-4"),
            (range([0.1, 0.3].into_iter(), percent), "10 to 30 %"),
            (range([0.2].into_iter(), percent), "20 %"),
        ] {
            assert_eq!(got, want);
        }
    }
}
