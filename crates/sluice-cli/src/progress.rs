//! Progress bars on standard error; silent when it is not a terminal, so that logs stay readable.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `len` items with elapsed time, ETA and a message.
pub(crate) fn bar(len: u64, unit: &str) -> ProgressBar {
    let bar = ProgressBar::new(len);
    let template = format!("{{elapsed_precise}} {{bar:32}} {{pos}}/{{len}} {unit}, {{eta}} left  {{msg}}");
    bar.set_style(ProgressStyle::with_template(&template).expect("the template is a constant").progress_chars("█▉▊▋▌▍▎▏ "));
    bar
}

/// Thousands separated, as people read them.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Bytes with a binary unit.
pub(crate) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!(super::grouped(1_234_567), "1,234,567");
        assert_eq!(super::grouped(12), "12");
        assert_eq!(super::bytes(3 << 19), "1.5 MiB");
    }
}
