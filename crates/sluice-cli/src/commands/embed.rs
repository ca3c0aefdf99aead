//! `sluice embed`: a vector for every line of a text.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::device::{DeviceArgs, name_and_precision};
use crate::models;
use crate::progress;
use crate::sentences::{SentenceEncoder, cosine};

/// Arguments of `sluice embed`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Hugging Face folder of an encoder, or the name of a pulled one (all-minilm-l6-v2)
    #[arg(long)]
    model: String,
    /// UTF-8 text, one sentence a line; `-` is standard input
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print JSON, vectors and all
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = models::resolve(&args.model)?;
    if !folder.is_dir() {
        bail!(
            "{} is no folder; an encoder is a Hugging Face folder, for instance what `sluice pull all-minilm-l6-v2` makes",
            folder.display()
        );
    }
    let text = read(&args.text)?;
    let sentences: Vec<&str> = text.lines().collect();
    if sentences.is_empty() {
        bail!("{} is empty; expected one sentence a line", args.text.display());
    }
    let device = args.device.open()?;
    let encoder = SentenceEncoder::load(&folder, &device)?;
    let bar = progress::bar(sentences.len() as u64, "sentences");
    let started = Instant::now();
    let embedded = encoder.embed(&sentences, |done| bar.set_position(done as u64));
    let seconds = started.elapsed().as_secs_f64();
    bar.finish_and_clear();
    if embedded.n_cut > 0 {
        eprintln!("{} of {} sentences were longer than the model takes, and cut", embedded.n_cut, sentences.len());
    }
    if args.json {
        let (_, precision) = name_and_precision(&device);
        println!(
            "{}",
            json!({"model": args.model, "width": encoder.width(), "precision": precision, "device": format!("{device:?}"), "sentences": sentences.len(),
                "tokens": embedded.n_tokens, "cut": embedded.n_cut, "seconds": seconds, "vectors": embedded.vectors})
        );
        return Ok(());
    }
    println!("{:>5}  {:<60}  {:>7}  nearest", "line", "sentence", "cosine");
    for (i, (sentence, vector)) in sentences.iter().zip(&embedded.vectors).enumerate() {
        let others = embedded.vectors.iter().enumerate().filter(|(j, _)| *j != i).map(|(j, other)| (j, cosine(vector, other)));
        match others.max_by(|a, b| a.1.total_cmp(&b.1)) {
            Some((j, cosine)) => println!("{:>5}  {:<60}  {cosine:>7.4}  {:>5}  {}", i + 1, cut(sentence), j + 1, cut(sentences[j])),
            None => println!("{:>5}  {:<60}", i + 1, cut(sentence)),
        }
    }
    eprintln!("{} sentences, {} tokens in {seconds:.2} s; --json prints the vectors", sentences.len(), embedded.n_tokens);
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).context("cannot read standard input as UTF-8")?;
        return Ok(text);
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// What fits a column.
fn cut(sentence: &str) -> String {
    const WIDTH: usize = 60;
    if sentence.chars().count() <= WIDTH { sentence.into() } else { sentence.chars().take(WIDTH - 3).chain("...".chars()).collect() }
}
