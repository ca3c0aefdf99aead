//! Tokens/s of one training step (forward, full backward, AdamW) of a dense decoder in candle, f32 on the CPU.
//! The same shapes and the same JSON line as `train_step_torch.py`.
//!
//!     RAYON_NUM_THREADS=2 cargo run --release -- --config tiny
//!
//! candle's fused RMS norm, rotation and softmax have no backward pass, so these are its differentiable forms, with one
//! improvement: the row maximum in a softmax is a constant, which spares the backward pass a [B, H, T, T] mask.

use std::time::Instant;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, ops::rms_norm_slow, rotary_emb::rope_slow};

const NORM_EPS: f32 = 1e-5;

/// L layers, M model, H heads, G KV heads, D head width, F feed-forward, V vocabulary, B x T tokens a step.
struct Config {
    layers: usize,
    model: usize,
    heads: usize,
    kv_heads: usize,
    width: usize,
    ff: usize,
    vocab: usize,
    tokens: usize,
    batch: usize,
}

const TINY: Config = Config { layers: 6, model: 128, heads: 4, kv_heads: 2, width: 32, ff: 384, vocab: 2048, tokens: 2048, batch: 2 };
/// SmolLM2-135M.
const SMOLLM2_135M: Config =
    Config { layers: 30, model: 576, heads: 9, kv_heads: 3, width: 64, ff: 1536, vocab: 49152, tokens: 512, batch: 1 };

struct Layer {
    norm1: Var,
    q: Var,
    k: Var,
    v: Var,
    o: Var,
    norm2: Var,
    gate: Var,
    up: Var,
    down: Var,
}

struct Decoder {
    config: Config,
    embed: Var,
    layers: Vec<Layer>,
    norm: Var,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
}

impl Layer {
    fn new(c: &Config, dev: &Device) -> Result<Self> {
        let matrix = |n_out, n_in| Var::randn(0f32, 0.02, (n_out, n_in), dev);
        let ones = || Var::ones(c.model, DType::F32, dev);
        Ok(Self {
            norm1: ones()?,
            q: matrix(c.heads * c.width, c.model)?,
            k: matrix(c.kv_heads * c.width, c.model)?,
            v: matrix(c.kv_heads * c.width, c.model)?,
            o: matrix(c.model, c.heads * c.width)?,
            norm2: ones()?,
            gate: matrix(c.ff, c.model)?,
            up: matrix(c.ff, c.model)?,
            down: matrix(c.model, c.ff)?,
        })
    }

    fn vars(&self) -> [&Var; 9] {
        [&self.norm1, &self.q, &self.k, &self.v, &self.o, &self.norm2, &self.gate, &self.up, &self.down]
    }

    /// x `[B, T, M]`.
    fn forward(&self, x: &Tensor, model: &Decoder) -> Result<Tensor> {
        let c = &model.config;
        let (b, t, _) = x.dims3()?;
        let h = rms_norm_slow(x, &self.norm1, NORM_EPS)?;
        let split = |y: Tensor, n| y.reshape((b, t, n, c.width))?.transpose(1, 2)?.contiguous(); // [B, n, T, D]
        let q = rope_slow(&split(linear(&h, &self.q)?, c.heads)?, &model.cos, &model.sin)?;
        let k = rope_slow(&split(linear(&h, &self.k)?, c.kv_heads)?, &model.cos, &model.sin)?;
        let v = split(linear(&h, &self.v)?, c.kv_heads)?;
        let (k, v) = (repeat(&k, c)?, repeat(&v, c)?); // [B, H, T, D]
        let logits = (q.matmul(&k.t()?)? * (c.width as f64).powf(-0.5))?.broadcast_add(&model.mask)?;
        let o = softmax(&logits)?.matmul(&v)?.transpose(1, 2)?.reshape((b, t, c.heads * c.width))?;
        let x = (x + linear(&o, &self.o)?)?;
        let h = rms_norm_slow(&x, &self.norm2, NORM_EPS)?;
        let inner = (linear(&h, &self.gate)?.silu()? * linear(&h, &self.up)?)?;
        &x + linear(&inner, &self.down)?
    }
}

impl Decoder {
    fn new(config: Config, dev: &Device) -> Result<Self> {
        let (t, half) = (config.tokens, config.width / 2);
        let angles: Vec<f32> = (0..t).flat_map(|p| (0..half).map(move |i| p as f32 * 10_000f32.powf(-(i as f32) / half as f32))).collect();
        let angles = Tensor::from_vec(angles, (t, half), dev)?;
        let mask = (0..t * t).map(|i| if i % t > i / t { f32::NEG_INFINITY } else { 0.0 }).collect();
        Ok(Self {
            embed: Var::randn(0f32, 0.02, (config.vocab, config.model), dev)?,
            layers: (0..config.layers).map(|_| Layer::new(&config, dev)).collect::<Result<_>>()?,
            norm: Var::ones(config.model, DType::F32, dev)?,
            cos: angles.cos()?,
            sin: angles.sin()?,
            mask: Tensor::from_vec(mask, (t, t), dev)?,
            config,
        })
    }

    fn vars(&self) -> Vec<Var> {
        let of_layers = self.layers.iter().flat_map(Layer::vars);
        of_layers.chain([&self.embed, &self.norm]).cloned().collect()
    }

    /// Mean cross-entropy; inputs and targets `[B, T]`. The output head is the embedding.
    fn loss(&self, inputs: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let (b, t) = inputs.dims2()?;
        let mut x = self.embed.index_select(&inputs.flatten_all()?, 0)?.reshape((b, t, self.config.model))?;
        for layer in &self.layers {
            x = layer.forward(&x, self)?;
        }
        let h = rms_norm_slow(&x, &self.norm, NORM_EPS)?.reshape((b * t, self.config.model))?;
        let logits = h.matmul(&self.embed.t()?)?;
        let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
        let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let target = shifted.gather(&targets.flatten_all()?.unsqueeze(1)?, 1)?;
        (log_sum - target)?.mean_all()
    }
}

/// x `[B, T, K]`, w `[N, K]`.
fn linear(x: &Tensor, w: &Var) -> Result<Tensor> {
    let (b, t, k) = x.dims3()?;
    x.reshape((b * t, k))?.matmul(&w.t()?)?.reshape((b, t, ()))
}

/// Each KV head once per query head of its group.
fn repeat(x: &Tensor, c: &Config) -> Result<Tensor> {
    let (b, g, t, d) = x.dims4()?;
    let n = c.heads / g;
    x.unsqueeze(2)?.expand((b, g, n, t, d))?.reshape((b, g * n, t, d))
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |flag: &str| arguments.iter().position(|a| a == flag).and_then(|i| arguments.get(i + 1)).map(String::as_str);
    let (name, config) = match value("--config") {
        Some("tiny") => ("tiny", TINY),
        Some("135m") => ("135m", SMOLLM2_135M),
        other => candle_core::bail!("--config is {other:?}; expected tiny or 135m"),
    };
    let steps: usize = value("--steps").unwrap_or("5").parse().map_err(candle_core::Error::wrap)?;

    let dev = Device::Cpu;
    let (b, t, vocab) = (config.batch, config.tokens, config.vocab);
    let model = Decoder::new(config, &dev)?;
    let vars = model.vars();
    let n_params: usize = vars.iter().map(|v| v.elem_count()).sum();
    let adamw = ParamsAdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.01 };
    let mut optimizer = AdamW::new(vars, adamw)?;
    // Any spread-out tokens do; a multiplicative sequence needs no generator.
    let tokens: Vec<u32> = (1..=(b * (t + 1)) as u64).map(|i| ((i * 2_654_435_761) % (1 << 32) % vocab as u64) as u32).collect();
    let tokens = Tensor::from_vec(tokens, (b, t + 1), &dev)?;
    let inputs = tokens.narrow(1, 0, t)?.contiguous()?;
    let targets = tokens.narrow(1, 1, t)?.contiguous()?;

    let (mut seconds, mut losses) = (Vec::new(), Vec::new());
    for _ in 0..2 + steps {
        let start = Instant::now();
        let loss = model.loss(&inputs, &targets)?;
        optimizer.backward_step(&loss)?;
        losses.push(loss.to_scalar::<f32>()?);
        seconds.push(start.elapsed().as_secs_f64());
    }
    let seconds = seconds.split_off(2);
    // The same batch over and over: a step that learns must bring the loss down from ln V.
    assert!(losses[losses.len() - 1] < losses[0], "{losses:?}");
    let mut sorted = seconds.clone();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted[(steps - 1) / 2], sorted[steps / 2]);
    let median = (low + high) / 2.0;
    println!(
        "{}",
        serde_json::json!({
            "peer": "candle", "version": "0.11", "config": name, "threads": candle_core::utils::get_num_threads(), "steps": steps,
            "tokens_per_second": (b * t) as f64 / median, "seconds": seconds,
            "first_loss": losses[0], "last_loss": losses[losses.len() - 1], "n_params": n_params,
        })
    );
    Ok(())
}
