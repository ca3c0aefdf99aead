//! `report.html`: one page that needs nothing beside it. No script, no network, no font; light or dark as the reader's system is; every figure
//! has its numbers in a table and a text in words. Written as XML, so that a strict parser accepts it too.

use std::fmt::Write as _;

use super::Report;
use super::plots;
use super::sections::{Cell, Figure, Part, Section, Table, headlines, sections};

const STYLE: &str = include_str!("report.css");

pub(super) fn page(report: &Report) -> String {
    let sections = sections(report);
    let title = escape(if report.title.is_empty() { "Report" } else { &report.title });
    let mut out = String::with_capacity(1 << 18);
    let _ = write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n<meta name=\"color-scheme\" content=\"light dark\"/>\n\
         <title>{title}</title>\n<style>\n{STYLE}@media (prefers-color-scheme: dark) {{\n{}}}\n</style>\n</head>\n<body>\n\
         <a class=\"skip\" href=\"#main\">Skip to the report</a>\n<header>\n<h1>{title}</h1>\n",
        plots::dark_rules()
    );
    let headlines = headlines(report);
    if !headlines.is_empty() {
        out.push_str("<ul class=\"headlines\">\n");
        for h in headlines {
            let _ = writeln!(out, "<li><strong>{}</strong> <span>{}</span></li>", escape(&h.value), escape(&h.label));
        }
        out.push_str("</ul>\n");
    }
    if sections.len() > 1 {
        out.push_str("<nav aria-label=\"Sections\"><ul>\n");
        for s in &sections {
            let _ = writeln!(out, "<li><a href=\"#{}\">{}</a></li>", s.id, escape(s.title));
        }
        out.push_str("</ul></nav>\n");
    }
    out.push_str("</header>\n<main id=\"main\">\n");
    for s in &sections {
        section(&mut out, s);
    }
    out.push_str(
        "</main>\n<footer><p>The same numbers are in report.json and report.md beside this file.</p></footer>\n</body>\n</html>\n",
    );
    out
}

fn section(out: &mut String, section: &Section) {
    let id = section.id;
    let _ = write!(out, "<section id=\"{id}\" aria-labelledby=\"{id}-title\">\n<h2 id=\"{id}-title\">{}</h2>\n", escape(section.title));
    if !section.lead.is_empty() {
        let _ = writeln!(out, "<p class=\"lead\">{}</p>", escape(&section.lead));
    }
    for part in &section.parts {
        match part {
            Part::Heading(text) => {
                let _ = writeln!(out, "<h3>{}</h3>", escape(text));
            }
            Part::Note(text) => {
                let _ = writeln!(out, "<p>{}</p>", escape(text));
            }
            Part::Facts(facts) => {
                out.push_str("<dl>\n");
                for (name, value) in facts {
                    let _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
                }
                out.push_str("</dl>\n");
            }
            Part::Figures(figures) => {
                out.push_str("<div class=\"figures\">\n");
                for f in figures {
                    figure(out, f);
                }
                out.push_str("</div>\n");
            }
            Part::Table(t) => table(out, t),
        }
    }
    if !section.command.is_empty() {
        let commands: Vec<String> = section.command.lines().map(|c| format!("<code>{}</code>", escape(c))).collect();
        let _ = writeln!(out, "<p class=\"command\"><span>Made by</span> {}</p>", commands.join("<br/>"));
    }
    out.push_str("</section>\n");
}

fn figure(out: &mut String, figure: &Figure) {
    let wide = if figure.wide { " class=\"wide\"" } else { "" };
    let _ = write!(out, "<figure{wide}>\n<figcaption>{}</figcaption>\n", escape(&figure.title));
    if figure.legend.len() > 1 || figure.legend.iter().any(|l| l.strong) {
        out.push_str("<ul class=\"legend\">");
        for look in &figure.legend {
            let _ = write!(out, "<li>{}{}</li>", plots::swatch(look), escape(&look.label));
        }
        out.push_str("</ul>\n");
    }
    let _ = write!(out, "{}\n</figure>\n", figure.drawing.trim_end());
}

fn table(out: &mut String, table: &Table) {
    let caption = escape(&table.caption);
    // The caption stands outside of what scrolls, else a wide table would carry half of it out of sight.
    if table.folded {
        let _ = writeln!(out, "<details><summary>{caption}</summary>");
    } else {
        let _ = writeln!(out, "<p class=\"caption\">{caption}</p>");
    }
    let _ =
        write!(out, "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{caption}\">\n<table aria-label=\"{caption}\">\n");
    out.push_str("<thead><tr>");
    for (i, name) in table.columns.iter().enumerate() {
        let _ = write!(out, "<th scope=\"col\"{}>{}</th>", if i < table.n_names { "" } else { " class=\"n\"" }, escape(name));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for row in &table.rows {
        let mut classes = Vec::new();
        classes.extend(row.look.as_ref().filter(|l| l.strong).map(|_| "strong"));
        classes.extend(row.opens_group.then_some("group"));
        let class = if classes.is_empty() { String::new() } else { format!(" class=\"{}\"", classes.join(" ")) };
        let _ = write!(out, "<tr{class}>");
        for (i, Cell { main, sub }) in row.cells.iter().enumerate() {
            let sub = if sub.is_empty() { String::new() } else { format!(" <small>{}</small>", escape(sub)) };
            let main = match row.look.as_ref().filter(|l| l.label == *main) {
                Some(look) => format!("<span class=\"policy\">{}{}</span>", plots::swatch(look), escape(main)),
                None => escape(main),
            };
            let _ = match i {
                0 => write!(out, "<th scope=\"row\">{main}{sub}</th>"),
                i if i < table.n_names => write!(out, "<td>{main}{sub}</td>"),
                _ => write!(out, "<td class=\"n\">{main}{sub}</td>"),
            };
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody>\n</table>\n</div>\n");
    if table.folded {
        out.push_str("</details>\n");
    }
}

/// Text for elements and attributes. Control characters, which a token may hold and XML may not, become the replacement character.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() || matches!(c, '\u{FFFE}' | '\u{FFFF}') => out.push('\u{FFFD}'),
            c => out.push(c),
        }
    }
    out
}
