//! `report.md`: the tables and texts of a report, for a terminal, a diff or an issue. Figures stay out.

use std::fmt::Write as _;

use super::Report;
use super::sections::{Cell, Part, Table, headlines, sections};

pub(super) fn page(report: &Report) -> String {
    let mut out = format!("# {}\n", line(&report.title));
    let headlines = headlines(report);
    if !headlines.is_empty() {
        out.push('\n');
        for h in headlines {
            let _ = writeln!(out, "- **{}** {}", line(&h.value), line(&h.label));
        }
    }
    for section in sections(report) {
        let _ = write!(out, "\n## {}\n", section.title);
        if !section.lead.is_empty() {
            let _ = write!(out, "\n{}\n", line(&section.lead));
        }
        for part in section.parts {
            match part {
                Part::Heading(text) => {
                    let _ = write!(out, "\n### {}\n", line(&text));
                }
                Part::Note(text) => {
                    let _ = write!(out, "\n{}\n", line(&text));
                }
                Part::Facts(facts) => {
                    out.push('\n');
                    for (name, value) in facts {
                        let _ = writeln!(out, "- {}: {}", line(&name), line(&value));
                    }
                }
                Part::Table(t) => table(&mut out, &t),
                Part::Figures(_) => {}
            }
        }
        if !section.command.is_empty() {
            let _ = write!(out, "\nMade by:\n\n```sh\n{}\n```\n", section.command);
        }
    }
    out
}

fn table(out: &mut String, table: &Table) {
    let _ = write!(out, "\n{}\n\n", line(&table.caption));
    let _ = writeln!(out, "| {} |", table.columns.iter().map(|c| cell_text(c)).collect::<Vec<_>>().join(" | "));
    let rule = (0..table.columns.len()).map(|i| if i < table.n_names { "---" } else { "---:" });
    let _ = writeln!(out, "|{}|", rule.collect::<Vec<_>>().join("|"));
    for row in &table.rows {
        let strong = row.look.as_ref().is_some_and(|l| l.strong);
        let cells = row.cells.iter().map(|Cell { main, sub }| {
            let main = cell_text(main);
            let main = if strong && !main.is_empty() { format!("**{main}**") } else { main };
            if sub.is_empty() { main } else { format!("{main} ({})", cell_text(sub)) }
        });
        let _ = writeln!(out, "| {} |", cells.collect::<Vec<_>>().join(" | "));
    }
}

/// One line: a line end would close the paragraph or list item.
fn line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A bar would end the cell, and tokens may be anything.
fn cell_text(text: &str) -> String {
    line(text).replace('\\', "\\\\").replace('|', "\\|").replace('`', "\\`").replace('*', "\\*").replace('<', "&lt;")
}
