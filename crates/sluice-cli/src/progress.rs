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

/// A size as a user writes it: a number of bytes, or of the units B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (of 1024).
pub(crate) fn parse_bytes(size: &str) -> Result<u64, String> {
    let size = size.trim();
    let (number, unit) = size.split_at(size.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(size.len()));
    let bad = || format!("`{size}` is not a size; expected for instance 24GiB, 20GB or 800MiB");
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1048576.0,
        "gib" => 1073741824.0,
        "tib" => 1099511627776.0,
        _ => return Err(bad()),
    };
    let bytes = number.trim().parse::<f64>().map_err(|_| bad())? * factor;
    if (1.0..1e18).contains(&bytes) { Ok(bytes as u64) } else { Err(bad()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_have_units_of_1000_and_1024() {
        let parsed = ["24GiB", "20GB", "1.5 mib", "4096", "7B"].map(super::parse_bytes);
        assert_eq!(parsed, [24 << 30, 20_000_000_000, 3 << 19, 4096, 7].map(Ok));
        for size in ["", "GiB", "-1GB", "0", "nanGB", "24G", "1e30TiB", "12 GiB of memory"] {
            assert!(super::parse_bytes(size).unwrap_err().contains("24GiB"), "{size}");
        }
    }

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!(super::grouped(1_234_567), "1,234,567");
        assert_eq!(super::grouped(12), "12");
        assert_eq!(super::bytes(3 << 19), "1.5 MiB");
    }
}
