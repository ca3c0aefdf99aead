//! Texts of a distillation: training windows and held-out windows, by domain.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use sluice_data::embedded::{self, Document, Split};
use sluice_data::recall::{Filler, RecallConfig, RecallDocument, RecallGenerator};
use sluice_train::documents::Documents;
use sluice_train::hash::mix;

use crate::models::Loaded;

/// Recall documents among the training documents of the embedded model, which learned their form.
const RECALL_DOCUMENTS: u64 = 400;

/// Relative depths at which held-out facts are planted.
const DEPTHS: [f32; 4] = [0.1, 0.35, 0.6, 0.85];

/// Tokenised texts.
pub(crate) struct DistillData {
    /// What is trained on.
    pub(crate) training: Documents,
    /// Held-out documents by domain, longest first.
    pub(crate) held: Vec<(String, Vec<Vec<u32>>)>,
    /// What the texts are, in words.
    pub(crate) sources: Vec<String>,
    filler: Option<String>,
}

impl DistillData {
    /// The user's texts, or the embedded ones.
    pub(crate) fn new(loaded: &Loaded, text: &[PathBuf], eval_text: &[PathBuf], context: usize) -> Result<Self> {
        let embedded = embedded::documents();
        let of_split = |split| embedded.iter().filter(move |d| d.split == split).cloned().collect::<Vec<_>>();
        let (mut sources, train) = if text.is_empty() {
            (vec!["embedded texts: prose, speeches, Rust code, the Rust Book".to_string()], of_split(Split::Train))
        } else {
            (text.iter().map(|p| p.display().to_string()).collect(), read(text)?)
        };
        let mut tokens = tokenise(loaded, &train);
        let filler = loaded.is_tiny().then(|| prose(&train));
        if let Some(filler) = &filler {
            let generator =
                RecallGenerator::new(RecallConfig::training(context), &loaded.tokenizer, Filler::new(&loaded.tokenizer, &[filler]));
            tokens.extend((0..RECALL_DOCUMENTS).map(|seed| generator.document(seed).tokens));
            sources.push("generated recall documents".into());
        }
        // Half a context is long enough to be routed; shorter documents would only dilute the batch.
        let training = Documents::new(tokens, context / 2)?;
        let filler = filler.map(|_| prose(&of_split(Split::Held)));
        Ok(Self { training, held: held_out_domains(loaded, eval_text)?, sources, filler })
    }

    /// Held-out recall documents by depth, for a model that was trained on their form.
    pub(crate) fn recall(&self, loaded: &Loaded, context: usize, n: u64) -> Vec<(f64, Vec<RecallDocument>)> {
        let Some(filler) = &self.filler else { return Vec::new() };
        let filler = Filler::new(&loaded.tokenizer, &[filler]);
        DEPTHS
            .iter()
            .map(|&depth| {
                let generator = RecallGenerator::new(RecallConfig::needle(context, depth), &loaded.tokenizer, filler.clone());
                (depth as f64, (0..n).map(|seed| generator.document(1_000_000 + seed)).collect())
            })
            .collect()
    }
}

/// Tokenised held-out documents by domain, longest first: the user's texts, or the embedded ones.
pub(crate) fn held_out_domains(loaded: &Loaded, texts: &[PathBuf]) -> Result<Vec<(String, Vec<Vec<u32>>)>> {
    let held = match texts {
        [] => embedded::documents().into_iter().filter(|d| d.split == Split::Held).collect(),
        _ => read(texts)?,
    };
    let mut domains: Vec<(String, Vec<Vec<u32>>)> = Vec::new();
    for (document, tokens) in held.iter().zip(tokenise(loaded, &held)) {
        match domains.iter_mut().find(|(name, _)| *name == document.domain) {
            Some((_, documents)) => documents.push(tokens),
            None => domains.push((document.domain.clone(), vec![tokens])),
        }
    }
    domains.iter_mut().for_each(|(_, documents)| documents.sort_by_key(|d| std::cmp::Reverse(d.len())));
    Ok(domains)
}

/// Up to `n` whole windows of a held-out domain, spread over its documents. A seed other than 0 moves them within their documents
/// by less than a window.
pub(crate) fn held_windows(documents: &[Vec<u32>], context: usize, n: usize, seed: u64) -> Vec<Vec<u32>> {
    let shift = |i: usize, d: &[u32]| (mix(seed, i as u64) as usize % context).min(d.len() % context);
    let windows = |(i, d): (usize, &'_ Vec<u32>)| {
        let from = if seed == 0 { 0 } else { shift(i, d) };
        d[from..].chunks_exact(context).map(<[u32]>::to_vec).collect::<Vec<_>>()
    };
    let all: Vec<Vec<u32>> = documents.iter().enumerate().flat_map(windows).collect();
    let n = n.min(all.len());
    (0..n).map(|i| all[i * all.len() / n].clone()).collect()
}

fn tokenise(loaded: &Loaded, documents: &[Document]) -> Vec<Vec<u32>> {
    loaded.tokenizer.encode_batch(&documents.iter().map(|d| d.text.as_str()).collect::<Vec<_>>())
}

fn prose(documents: &[Document]) -> String {
    let prose = documents.iter().filter(|d| d.domain == "prose" || d.domain == "speech");
    prose.map(|d| d.text.as_str()).collect::<Vec<_>>().join("\n")
}

/// The user's files: each a domain named after the file, documents separated by form feeds.
fn read(paths: &[PathBuf]) -> Result<Vec<Document>> {
    let mut documents = Vec::new();
    for path in paths {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {} as UTF-8 text", path.display()))?;
        ensure!(!text.trim().is_empty(), "{} is empty", path.display());
        let domain = path.file_stem().map_or_else(String::new, |s| s.to_string_lossy().into_owned());
        documents.extend(text.split('\u{c}').map(|part| Document {
            name: path.display().to_string(),
            domain: domain.clone(),
            split: Split::Held,
            text: part.to_string(),
        }));
    }
    Ok(documents)
}
