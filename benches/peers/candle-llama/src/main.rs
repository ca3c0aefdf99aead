//! Speed of candle's quantised llama (`candle_transformers::models::quantized_llama`) on the CPU: a prompt in one go, as candle's
//! example reads it, then single tokens, the median counts. Its tables of positions end at 4,096.
//!
//! `RAYON_NUM_THREADS=2 candle-llama-peer M.Q8_0.gguf CONTEXT TOKENS` prints one JSON line.

use std::fs::File;
use std::time::Instant;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, path, context, tokens] = args.as_slice() else { return Err("expected M.gguf CONTEXT TOKENS".into()) };
    let (context, tokens): (usize, usize) = (context.parse()?, tokens.parse()?);
    let mut file = File::open(path)?;
    let content = gguf_file::Content::read(&mut file)?;
    let device = Device::Cpu;
    let mut model = ModelWeights::from_gguf(content, &mut file, &device)?;
    // Any ids do: the speed does not depend on them. The same as `bench_engine.py` gives llama.cpp.
    let ids: Vec<u32> = (0..context + tokens).map(|i| 100 + (i * 7919 % 40000) as u32).collect();
    let mut read = |range: std::ops::Range<usize>| -> candle_core::Result<f64> {
        let started = Instant::now();
        let input = Tensor::new(&ids[range.clone()], &device)?.unsqueeze(0)?;
        // Read, so that nothing is left undone.
        std::hint::black_box(model.forward(&input, range.start)?.to_vec2::<f32>()?);
        Ok(started.elapsed().as_secs_f64())
    };
    let prefill = context as f64 / read(0..context)?;
    let mut seconds = (context..context + tokens).map(|i| read(i..i + 1)).collect::<Result<Vec<f64>, _>>()?;
    seconds.sort_by(f64::total_cmp);
    println!("{}", serde_json::json!({"prefill": prefill, "decode": 1.0 / seconds[tokens / 2]}));
    Ok(())
}
