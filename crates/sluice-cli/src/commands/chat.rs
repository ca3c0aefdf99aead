//! `sluice chat`: a conversation in the terminal. The cache is kept across turns, so only new text is read.

use std::io::{BufRead, Write};

use anyhow::{Context, Result};
use sluice_data::{ChatTemplate, Message};

use crate::commands::generate::Generation;
use crate::models::{self, RoutingArgs};
use crate::sampling::{Sampler, SamplingArgs};

/// Arguments of `sluice chat`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// GGUF file, Hugging Face folder or pulled model
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
    let loaded = models::load(&args.model, args.routing.gates.as_deref())?;
    let template = ChatTemplate::of(&loaded.tokenizer).with_context(|| loaded.checkpoint.path.display().to_string())?;
    let plan = args.routing.plan(&loaded)?;
    let mut generation = Generation::new(&loaded, plan, Sampler::new(&args.sampling))?;
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
                generation = Generation::new(&loaded, plan, Sampler::new(&args.sampling))?;
                prompt.clone()
            }
        };
        let ids = loaded.tokenizer.encode_with_special(&fresh);
        let outcome = generation.extend(&ids, args.tokens, |text| {
            print!("{text}");
            let _ = std::io::stdout().flush();
        });
        println!();
        messages.push(Message::new("assistant", outcome.text.as_str()));
        read = prompt + &outcome.text;
    }
}
