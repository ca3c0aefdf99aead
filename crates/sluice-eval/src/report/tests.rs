use sluice_testkit::Rng;

use super::*;

const POLICIES: [(&str, f64); 5] = [("gate", 0.5), ("streaming", 1.0), ("random", 1.9), ("h2o", 1.1), ("oracle", 0.45)];

/// A report with every section, of numbers made up by a formula: it shows the page, not a model.
fn made_up() -> Report {
    let mut rng = Rng::new(11);
    let mut noise = move |size: f64| size * (2.0 * f64::from(rng.uniform()) - 1.0);
    let around = |mean: f64, half: f64, n: usize| Estimate { mean, low: mean - half, high: mean + 1.1 * half, n };
    let command = "sluice distill smollm2 --preset default --out runs/demo --seed 7";

    let mut report = Report::new(
        "SmolLM2-135M, routed",
        RunSummary {
            model: "SmolLM2-135M-Instruct".into(),
            n_params: Some(134_515_008),
            n_gate_params: Some(52_110),
            preset: "default".into(),
            routing: Some(RoutingConfig::default().with_kv_budget(1024).unwrap()),
            stages: vec![
                StageRun {
                    name: "warm start".into(),
                    trained: "gates, closed form".into(),
                    seconds: 412.0,
                    tokens: 245_760,
                    steps: 0,
                    host_waits: 0,
                },
                StageRun {
                    name: "features".into(),
                    trained: "gates".into(),
                    seconds: 5230.0,
                    tokens: 3_276_800,
                    steps: 400,
                    host_waits: 0,
                },
                StageRun {
                    name: "logits".into(),
                    trained: "gates and base weights".into(),
                    seconds: 9810.5,
                    tokens: 4_915_200,
                    steps: 600,
                    host_waits: 0,
                },
            ],
            data: vec!["prose".into(), "code".into(), "docs".into()],
            seed: Some(7),
            threads: Some(2),
            cpu: "AMD EPYC 9R14".into(),
            peak_memory_bytes: Some(3_412_000_000),
            step_memory: Some(StepMemory {
                documents_at_a_time: 2,
                recomputed_layers: 0,
                counted_peak_bytes: 2_100_000_000,
                measured_peak_bytes: 2_150_000_000,
            }),
            started: "2026-11-03T09:12:44Z".into(),
            versions: vec![("sluice".into(), "0.1.0".into()), ("rustc".into(), "1.95.0".into())],
            command: command.into(),
            ..RunSummary::default()
        },
    );

    for (text, level, held_out) in [("Prose: \"Persuasion\"", 0.138, false), ("Code: Rust core <alloc> & more", 0.256, true)] {
        let mut rows = Vec::new();
        for budget in [256usize, 512, 1024, 2048] {
            let n = 12 * (8192 - budget - 64);
            for (policy, factor) in POLICIES {
                let mean = level * factor * (256.0 / budget as f64).powf(1.1) * (1.0 + noise(0.1));
                rows.push(QualityRow {
                    policy: policy.into(),
                    kv_budget: budget,
                    positions_from: budget + 64,
                    delta_nll: around(mean, 0.004 + 0.08 * mean, n),
                    kl: Some(around(mean * 1.2, 0.004, n)),
                    top1_agreement: Some(around(1.0 - 0.6 * mean, 0.006, n)),
                    gap_closed: (policy == "gate").then(|| around(0.48 + noise(0.1), 0.05, n)),
                    above_streaming: (policy == "gate").then(|| around(-0.02 + noise(0.01), 0.005, n)),
                });
            }
        }
        report.quality.push(QualityTable {
            text: text.into(),
            held_out,
            context: 8192,
            n_documents: 12,
            dense_nll: Some(around(2.713, 0.05, 95_000)),
            dense_bits_per_byte: Some(0.942),
            command: format!("sluice eval nll runs/demo --text {} --context 8192", if held_out { "rust-core" } else { "persuasion" }),
            rows,
        });
    }

    let mut recall = Recall {
        command: "sluice eval needle runs/demo --contexts 8192".into(),
        n_distractors: 3,
        example: "\"The access code of the silver ferry is 40917.\" ... \"What is the access code of the silver ferry?\" 40917".into(),
        rows: Vec::new(),
    };
    for (policy, budget, base) in
        [("dense", 8192usize, 0.98), ("gate", 256, 0.55), ("streaming", 256, 0.05), ("gate", 1024, 0.93), ("streaming", 1024, 0.12)]
    {
        let depths = [0.0, 0.25, 0.5, 0.75, 1.0];
        let at = |d: f64| {
            let kept: f64 = if policy == "streaming" { if d > 0.9 { 0.97 } else { base } } else { base + 0.04 * (d - 0.5) };
            kept.clamp(0.0, 1.0)
        };
        let mean = depths.iter().map(|&d| at(d)).sum::<f64>() / 5.0;
        for (depth, p) in depths.iter().map(|&d| (Some(d), at(d))).chain([(None, mean)]) {
            let n = if depth.is_some() { 40 } else { 200 };
            recall.rows.push(RecallRow {
                policy: policy.into(),
                kv_budget: budget,
                context: 8192,
                depth,
                n_prompts: n,
                token_accuracy: Estimate::share(p, n).unwrap(),
                exact_match: Estimate::share(p * 0.95, n).unwrap(),
                ranked_first: Estimate::share((p * 1.02).min(1.0), n),
                nll_above_dense: Some(around(2.0 * (0.98 - p), 0.1, 6 * n)),
            });
        }
    }
    report.recall = Some(recall);

    report.cost = Some(CostTable {
        command: "sluice bench runs/demo --contexts 1024..131072".into(),
        hardware: "AMD EPYC 9R14, 2 threads".into(),
        rows: (0..8)
            .map(|i| {
                let context = 1024usize << i;
                let keys = context.min(1024 + 63);
                let side = |keys: usize, measured: bool| CostSide {
                    cache_bytes: 46_080 * keys as u64,
                    attention_flops: (69_120 * context * keys.min(context / 2 + 1)) as u64,
                    prefill_tokens_per_s: measured.then(|| 900.0 / (1.0 + keys as f64 / 6000.0)),
                    decode_tokens_per_s: measured.then(|| 61.0 / (1.0 + keys as f64 / 3000.0)),
                    peak_memory_bytes: None,
                };
                CostRow { context, dense: side(context, i < 6), routed: side(keys, true) }
            })
            .collect(),
    });

    let stage = |stage: &str, loss: &str, n: u64, from: f64, to: f64, noise: &mut dyn FnMut(f64) -> f64| StageCurve {
        stage: stage.into(),
        loss: loss.into(),
        points: (0..n)
            .map(|step| {
                let clean = to + (from - to) * (-4.0 * step as f64 / n as f64).exp();
                CurvePoint {
                    step,
                    loss: clean + noise(0.1 * clean),
                    held_out: step.is_multiple_of(50).then_some(clean * 1.08),
                    tokens_per_s: Some(626.0 + noise(30.0)),
                    kv_budget: None,
                }
            })
            .collect(),
    };
    report.curves = Some(Curves {
        command: String::new(),
        stages: vec![
            stage("Features", "squared distance to the teacher's attention output, relative", 400, 0.31, 0.06, &mut noise),
            stage("Logits", "KL to the teacher, nats per token", 600, 0.19, 0.034, &mut noise),
        ],
    });

    report.health = Some(Health {
        command: "sluice eval routing runs/demo".into(),
        context: 8192,
        layers: (0..30)
            .map(|layer| {
                let m = 0.4 + 0.1 * noise(1.0).abs();
                LayerHealth {
                    layer,
                    jaccard: 0.93 + noise(0.04),
                    margin: Quantiles { p05: 0.06 * m, p25: 0.4 * m, p50: m, p75: 1.9 * m, p95: 3.4 * m },
                    admissions: 2650.0 + noise(700.0),
                    expected_admissions: 2690.0,
                    kept_mass: Some(0.94 + noise(0.05)),
                }
            })
            .collect(),
    });

    report.heat_map = Some(HeatMap {
        command: "sluice eval routing runs/demo".into(),
        text: "Persuasion, chapters 1 to 3".into(),
        context: 8192,
        kv_budget: 1024,
        bin: 128,
        rows: (0..30)
            .flat_map(|layer| (0..3).map(move |head| (layer, head)))
            .map(|(layer, head)| HeatRow {
                layer,
                kv_head: Some(head),
                share: (0..64)
                    .map(|b| match b {
                        63 => 1.0,
                        0 => 0.2,
                        b => (0.02 + 0.3 * (b as f64 / 63.0).powi(3 + (layer % 4) as i32) + noise(0.08)).clamp(0.0, 1.0) as f32,
                    })
                    .collect(),
            })
            .collect(),
    });

    let passage = "Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own amusement, never took up any book but the \
                   Baronetage;\nthere he found occupation for an idle hour, and consolation in a distressed one; <there> his faculties were roused \
                   into admiration & respect.";
    report.sample = Some(Sample {
        command: "sluice eval routing runs/demo --sample".into(),
        text: "Persuasion, first sentence".into(),
        context: 2048,
        kv_budget: 1024,
        n_layer_heads: 90,
        tokens: passage
            .split_inclusive(' ')
            .map(|word| {
                let kept_in = if word.starts_with(char::is_uppercase) { 70.0 + noise(20.0) } else { 14.0 + noise(14.0) } as usize;
                SampleToken { text: word.into(), kept_in }
            })
            .collect(),
    });
    report
}

/// Panic unless `html` is well-formed: tags nest and close, attributes are quoted and unique, entities are known.
fn assert_well_formed(html: &str) {
    let mut open: Vec<String> = Vec::new();
    let mut rest = html.strip_prefix("<!DOCTYPE html>").expect("a doctype");
    let text_is_clean = |text: &str| {
        for (i, _) in text.match_indices('&') {
            let entity = text[i..].split_inclusive(';').next().unwrap();
            assert!(["&amp;", "&lt;", "&gt;", "&quot;"].contains(&entity), "entity {entity}");
        }
    };
    while let Some(at) = rest.find('<') {
        text_is_clean(&rest[..at]);
        let end = at + rest[at..].find('>').unwrap_or_else(|| panic!("unclosed tag: {}", &rest[at..]));
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name.trim()), "closing tag");
            continue;
        }
        let body = tag.trim_end_matches('/').trim_end();
        let name = body.split_whitespace().next().expect("a tag name");
        let mut attributes = body[name.len()..].trim();
        let mut names = Vec::new();
        while !attributes.is_empty() {
            let (attribute, after) = attributes.split_once("=\"").unwrap_or_else(|| panic!("unquoted attribute in <{tag}>"));
            let (value, after) = after.split_once('"').expect("a closing quote");
            text_is_clean(value);
            assert!(!names.contains(&attribute), "{attribute} twice in <{tag}>");
            names.push(attribute);
            attributes = after.trim();
        }
        if name == "style" {
            // The style sheet is text; `>` in a selector is no tag.
            rest = &rest[rest.find("</style>").expect("the style sheet ends")..];
        }
        if !tag.ends_with('/') {
            open.push(name.to_string());
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "left open: {open:?}, after the end: {rest:?}");
}

#[test]
fn json_round_trip_keeps_everything() {
    let report = made_up();
    let again: Report = serde_json::from_str(&report.to_json()).unwrap();
    assert!(again == report, "something was lost on the way");
    for name in
        ["\"kv_budget\"", "\"window\"", "\"top_k\"", "\"delta_nll\"", "\"positions_from\"", "\"cache_bytes\"", "\"format_version\": 1"]
    {
        assert!(report.to_json().contains(name), "{name}");
    }
}

#[test]
fn html_is_well_formed_and_needs_nothing_beside_it() {
    let html = made_up().to_html();
    assert_well_formed(&html);
    for name in ["http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"] {
        assert!(html.contains(name));
    }
    let bare = html.replace("xmlns=\"http://www.w3.org/1999/xhtml\"", "").replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for reference in ["http:", "https:", "//", "<script", "<link", "<img", "@import", "url(", "src="] {
        let at = bare.find(reference);
        assert!(at.is_none(), "{reference} in {:?}", &bare[at.unwrap()..(at.unwrap() + 80).min(bare.len())]);
    }
}

#[test]
fn text_from_outside_cannot_break_the_page() {
    let mut report = made_up();
    report.title = "</title><script>alert(1)</script> & \"quotes\"".into();
    report.quality[0].text = "a | b <b>".into();
    report.quality[0].rows[0].policy = "mine\" onload=\"x".into();
    report.sample.as_mut().unwrap().tokens[0].text = "\u{0}\u{1b}</span>".into();
    let html = report.to_html();
    assert_well_formed(&html);
    assert!(!html.contains("<script"));
    assert!(report.to_markdown().contains("a | b <b>: nats per token"), "a caption is no cell");
    assert!(report.to_markdown().lines().filter(|l| l.starts_with("| ")).all(|l| l.ends_with(" |")));
}

#[test]
fn every_figure_has_words_and_every_heading_a_target() {
    let html = made_up().to_html();
    let drawings = html.matches("class=\"plot\"").count() + html.matches("class=\"heat\"").count();
    assert!(drawings >= 14, "{drawings} drawings");
    assert_eq!(html.matches("role=\"img\" aria-label=\"").count(), drawings);
    for id in ["run", "quality", "recall", "cost", "curves", "health", "kept", "sample"] {
        assert!(html.contains(&format!("href=\"#{id}\"")) && html.contains(&format!("<section id=\"{id}\"")), "{id}");
    }
}

#[test]
fn markdown_holds_the_rows() {
    let mut report = made_up();
    let row = &mut report.quality[0].rows[0];
    (row.delta_nll, row.kl) = (Estimate { mean: 0.0694, low: 0.0641, high: 0.0743, n: 95_424 }, None);
    let text = report.to_markdown();
    assert!(text.contains("| **Gate** | **0.069** (0.064 to 0.074) |"), "{text}");
    assert!(text.contains("| Policy | 256 (3.1 %) | 512 (6.2 %) | 1,024 (12.5 %) | 2,048 (25 %) |"));
    assert!(text.contains("| StreamingLLM | "));
    assert!(text.contains("95,424"));
    assert!(text.contains("sluice eval needle runs/demo --contexts 8192"));
    assert!(text.contains("| 131,072 | Routed | 47.8 MiB (121x less) |"), "{text}");
    // Tables are rectangular: each row has as many cells as its header.
    let mut width = None;
    for line in text.lines() {
        let cells = line.replace("\\|", "").matches('|').count();
        match (line.starts_with('|'), width) {
            (true, Some(w)) => assert_eq!(cells, w, "{line}"),
            (true, None) => width = Some(cells),
            (false, _) => width = None,
        }
    }
}

#[test]
fn absent_sections_leave_no_trace() {
    let report = Report::new("Only a name", RunSummary::default());
    let (html, markdown, json) = (report.to_html(), report.to_markdown(), report.to_json());
    assert_well_formed(&html);
    assert!(!html.contains("<section") && !html.contains("<nav") && !html.contains("class=\"headlines\""));
    assert_eq!(markdown, "# Only a name\n");
    for name in ["quality", "recall", "cost", "curves", "health", "heat_map", "sample"] {
        assert!(!json.contains(name), "{name}");
    }
    // Present but empty is absent as well.
    let mut hollow = report;
    hollow.quality.push(QualityTable { text: "nothing".into(), ..QualityTable::default() });
    hollow.recall = Some(Recall::default());
    hollow.cost = Some(CostTable::default());
    hollow.curves = Some(Curves { stages: vec![StageCurve::default()], ..Curves::default() });
    hollow.health = Some(Health::default());
    hollow.heat_map = Some(HeatMap { rows: vec![HeatRow::default()], ..HeatMap::default() });
    hollow.sample = Some(Sample::default());
    assert!(!hollow.to_html().contains("<section"));
    assert_well_formed(&hollow.to_html());
}

#[test]
fn each_section_alone_makes_a_page() {
    let whole = made_up();
    let bare = || Report::new("One", RunSummary::default());
    for (id, report) in [
        ("quality", Report { quality: whole.quality.clone(), ..bare() }),
        ("recall", Report { recall: whole.recall.clone(), ..bare() }),
        ("cost", Report { cost: whole.cost.clone(), ..bare() }),
        ("curves", Report { curves: whole.curves.clone(), ..bare() }),
        ("health", Report { health: whole.health.clone(), ..bare() }),
        ("kept", Report { heat_map: whole.heat_map.clone(), ..bare() }),
        ("sample", Report { sample: whole.sample.clone(), ..bare() }),
    ] {
        let html = report.to_html();
        assert_well_formed(&html);
        assert_eq!(html.matches("<section").count(), 1, "{id}");
        assert!(html.contains(&format!("<section id=\"{id}\"")), "{id}");
    }
}

#[test]
fn sections_name_their_command_or_the_runs() {
    let html = made_up().to_html();
    assert!(html.contains("sluice eval nll runs/demo --text persuasion --context 8192"));
    let curves = &html[html.find("<section id=\"curves\"").unwrap()..html.find("<section id=\"health\"").unwrap()];
    assert!(curves.contains("sluice distill smollm2 --preset default"));
}

#[test]
fn gap_is_computed_when_it_was_not_measured() {
    let mut table = made_up().quality.remove(0);
    for row in &mut table.rows {
        row.gap_closed = None;
        row.delta_nll = Estimate::exact(if row.policy == "streaming" { 0.2 } else { 0.05 }, 10);
    }
    assert!((table.gap_closed(&table.rows[0]).unwrap() - 0.75).abs() < 1e-12);
    let streaming = table.rows.iter().find(|r| r.policy == "streaming").unwrap();
    assert_eq!(table.gap_closed(streaming), None);
}

#[test]
fn writing_replaces_whole_files_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("runs/demo");
    let first = Report::new("First", RunSummary::default());
    let paths = first.write(&out).unwrap();
    let report = made_up();
    assert_eq!(report.write(&out).unwrap(), paths);
    assert!(Report::read(&paths[0]).unwrap() == report);
    assert_eq!(std::fs::read_to_string(&paths[1]).unwrap(), report.to_markdown());
    assert_eq!(std::fs::read_to_string(&paths[2]).unwrap(), report.to_html());
    let mut names: Vec<_> = std::fs::read_dir(&out).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["report.html", "report.json", "report.md"]);
}

#[test]
fn a_write_that_fails_keeps_the_old_file_and_names_the_place() {
    let dir = tempfile::tempdir().unwrap();
    // A folder stands where the file should go: the rename fails after everything was written.
    std::fs::create_dir(dir.path().join("report.json")).unwrap();
    let error = made_up().write(dir.path()).unwrap_err().to_string();
    assert!(error.contains("report.json") && error.contains("write"), "{error}");
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(names, ["report.json"], "the part written aside is removed");
}

#[test]
fn files_that_are_no_report_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    std::fs::write(&path, "{\"title\": 3}").unwrap();
    assert!(Report::read(&path).unwrap_err().to_string().contains("is not a report"));
    std::fs::write(&path, "{\"format_version\": 99}").unwrap();
    assert!(Report::read(&path).unwrap_err().to_string().contains("99"));
    assert!(Report::read(dir.path().join("none.json")).unwrap_err().to_string().contains("none.json"));
}

#[test]
fn a_diverged_loss_is_shown_and_survives() {
    let mut report = made_up();
    let points = &mut report.curves.as_mut().unwrap().stages[0].points;
    points.last_mut().unwrap().loss = f64::NAN;
    let again: Report = serde_json::from_str(&report.to_json()).unwrap();
    assert!(again.curves.unwrap().stages[0].points.last().unwrap().loss.is_nan());
    let html = report.to_html();
    assert_well_formed(&html);
    assert!(html.contains("not a number") && !html.contains("NaN"));
}
