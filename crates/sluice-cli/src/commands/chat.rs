//! `sluice chat`: a conversation in the terminal. The cache is kept across turns, so only new text is read.

use std::io::{BufRead, Write};

use anyhow::{Context, Result};
use sluice_data::{ChatTemplate, Message};
use sluice_engine::Sampler;

use crate::generation::Backend;
use crate::models::RoutingArgs;
use crate::sampling::SamplingArgs;

/// Arguments of `sluice chat`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Artifact, GGUF file, Hugging Face folder or pulled model
    #[arg(long)]
    model: String,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of an answer at most
    #[arg(long, short = 'n', value_name = "N", default_value_t = 512)]
    tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    routing: RoutingArgs,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut backend = Backend::open(&args.model, &args.routing)?;
    let template = ChatTemplate::of(backend.tokenizer()).with_context(|| backend.name())?;
    let begin = |backend: &Backend| (backend.begin(), Sampler::new(args.sampling.config(), backend.vocab_size()));
    let (mut state, mut sampler) = begin(&backend);
    let mut messages: Vec<Message> = args.system.iter().map(|text| Message::new("system", text.as_str())).collect();
    let mut read = String::new(); // what the model has seen, as text
    eprintln!("Type a message and press Enter; an empty line or Ctrl-D ends the chat.");
    loop {
        eprint!("> ");
        std::io::stderr().flush()?;
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(());
        }
        messages.push(Message::new("user", line.trim()));
        let prompt = template.render(&messages, true)?;
        let fresh = match prompt.strip_prefix(read.as_str()) {
            Some(fresh) => fresh.to_string(),
            None => {
                // The template rewrote earlier turns: read the conversation anew.
                (state, sampler) = begin(&backend);
                prompt.clone()
            }
        };
        let ids = backend.tokenizer().encode_with_special(&fresh);
        let outcome = backend.extend(&mut state, &mut sampler, &ids, args.tokens, |text| {
            print!("{text}");
            let _ = std::io::stdout().flush();
        })?;
        println!();
        messages.push(Message::new("assistant", outcome.text.as_str()));
        read = prompt + &outcome.text;
    }
}
