//! A transformer layer in four steps that callers may take one by one: project, score, attend, finish.
//! Distillation takes them apart (each layer fed the teacher's input); everything else calls them in a row.

use sluice_autograd::{Param, Tape, Var};
use sluice_kernels::repeat_heads;
use sluice_kernels::rope::RopeStyle;
use sluice_kernels::routed_attention::PlacedRouting;

use crate::policy::AttentionPlan;

/// `y = x W^T + b`.
#[derive(Clone)]
pub struct Linear {
    /// `[N, K]`.
    pub weight: Param,
    /// `[N]`.
    pub bias: Option<Param>,
}

impl Linear {
    /// `[.., K] -> [.., N]`.
    pub fn forward(&self, tape: &Tape, x: &Var) -> Var {
        let bias = self.bias.as_ref().map(|b| tape.param(b));
        tape.linear(x, &tape.param(&self.weight), bias.as_ref())
    }
}

/// The routing gate of a layer: one score per token and gate head, always f32.
#[derive(Clone)]
pub struct Gate {
    /// `[Gs, M]`.
    pub weight: Param,
    /// `[Gs]`.
    pub bias: Param,
    /// `[Gs]`, recency slope per 1024 positions, kept at 0 or above.
    pub recency: Param,
}

impl Gate {
    /// Scores `[B, T, Gs]` of the attention input `x [B, T, M]`.
    pub fn score(&self, tape: &Tape, x: &Var, positions: &[u32], eps: f32) -> Var {
        tape.gate_score(x, &tape.param(&self.weight), &tape.param(&self.bias), &tape.param(&self.recency), positions, eps)
    }
}

/// Projections of an attention block.
#[derive(Clone)]
pub struct Attention {
    /// `[H D, M]`.
    pub q_proj: Linear,
    /// `[G D, M]`.
    pub k_proj: Linear,
    /// `[G D, M]`.
    pub v_proj: Linear,
    /// `[M, H D]`.
    pub o_proj: Linear,
    /// `[D]`, Qwen3 only.
    pub q_norm: Option<Param>,
    /// `[D]`, Qwen3 only.
    pub k_norm: Option<Param>,
}

/// SwiGLU.
#[derive(Clone)]
pub struct Mlp {
    /// `[F, M]`.
    pub gate_proj: Linear,
    /// `[F, M]`.
    pub up_proj: Linear,
    /// `[M, F]`.
    pub down_proj: Linear,
}

/// What every layer needs to know of the model it is part of.
#[derive(Clone)]
pub struct LayerShape {
    /// `H`.
    pub n_heads: usize,
    /// `G`.
    pub n_kv_heads: usize,
    /// `D`.
    pub head_dim: usize,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// `[D / 2]` inverse rotary frequencies.
    pub inv_freq: Vec<f32>,
}

/// One layer: attention and MLP, each behind a norm and a residual connection.
#[derive(Clone)]
pub struct Layer {
    /// Sizes and frequencies.
    pub shape: LayerShape,
    /// `[M]`.
    pub input_norm: Param,
    /// Projections.
    pub attention: Attention,
    /// `[M]`.
    pub post_norm: Param,
    /// SwiGLU.
    pub mlp: Mlp,
    /// The routing gate; absent in a dense model.
    pub gate: Option<Gate>,
}

/// Inputs of the attention of one layer.
pub struct Projected {
    /// Attention input after the norm, `[B, T, M]`: what the gate sees.
    pub x: Var,
    /// `[B, T, H, D]`, rotated.
    pub q: Var,
    /// `[B, T, G, D]`, rotated.
    pub k: Var,
    /// `[B, T, G, D]`.
    pub v: Var,
}

/// Results of one layer.
pub struct LayerOutput {
    /// Residual stream after the layer, `[B, T, M]`.
    pub h: Var,
    /// Output of the attention block before the residual connection, `[B, T, M]`.
    pub block: Var,
    /// Gate scores `[B, T, G]`, noise included, when the gate decided.
    pub scores: Option<Var>,
}

impl Layer {
    /// Norm, projections, head norms and rotation of the residual stream `h [B, T, M]`.
    pub fn project(&self, tape: &Tape, h: &Var, positions: &[u32]) -> Projected {
        let LayerShape { n_heads, n_kv_heads, head_dim, norm_eps, .. } = self.shape;
        let [b, t, _] = h.value().dims();
        let x = tape.rms_norm(h, Some(&tape.param(&self.input_norm)), norm_eps); // [B, T, M]
        let q = tape.reshape(&self.attention.q_proj.forward(tape, &x), [b, t, n_heads, head_dim]); // [B, T, H, D]
        let k = tape.reshape(&self.attention.k_proj.forward(tape, &x), [b, t, n_kv_heads, head_dim]); // [B, T, G, D]
        let v = tape.reshape(&self.attention.v_proj.forward(tape, &x), [b, t, n_kv_heads, head_dim]); // [B, T, G, D]
        let head_norm = |x: Var, norm: &Option<Param>| match norm {
            Some(weight) => tape.rms_norm(&x, Some(&tape.param(weight)), norm_eps),
            None => x,
        };
        // Checkpoints are brought to the half-split layout on import, so there is one rotation here.
        let rotate = |x: Var| tape.rope(&x, positions, &self.shape.inv_freq, RopeStyle::HalfSplit);
        let q = rotate(head_norm(q, &self.attention.q_norm));
        let k = rotate(head_norm(k, &self.attention.k_norm));
        Projected { x, q, k, v }
    }

    /// Gate scores `[B, T, G]`; a shared score is repeated for every KV head. Panics without a gate.
    #[track_caller]
    pub fn score(&self, tape: &Tape, x: &Var, positions: &[u32]) -> Var {
        let gate = self.gate.as_ref().expect("this layer has no gate");
        let scores = gate.score(tape, x, positions, self.shape.norm_eps); // [B, T, Gs]
        repeat_shared(tape, &scores, self.shape.n_kv_heads)
    }

    /// Routed attention `[B, T, H, D]` for a routing that somebody decided.
    pub fn attend_routed(&self, tape: &Tape, p: &Projected, scores: Option<&Var>, temperature: f32, routing: &PlacedRouting) -> Var {
        let bias = if temperature > 0.0 { scores.map(|s| (s, temperature)) } else { None };
        tape.routed_attention(&p.q, &p.k, &p.v, bias, routing)
    }

    /// Output projection of the attention `o [B, T, H, D]`: what the block adds to the residual stream.
    pub fn block_output(&self, tape: &Tape, o: &Var) -> Var {
        let [b, t, h, d] = o.value().dims();
        self.attention.o_proj.forward(tape, &tape.reshape(o, [b, t, h * d])) // [B, T, M]
    }

    /// Residual connection of the attention block, then the MLP with its own.
    pub fn finish(&self, tape: &Tape, h: &Var, block: &Var) -> Var {
        let h = tape.add(h, block); // [B, T, M]
        let x = tape.rms_norm(&h, Some(&tape.param(&self.post_norm)), self.shape.norm_eps);
        let gated = tape.swiglu(&self.mlp.gate_proj.forward(tape, &x), &self.mlp.up_proj.forward(tape, &x)); // [B, T, F]
        tape.add(&h, &self.mlp.down_proj.forward(tape, &gated))
    }

    /// The whole layer over whole sequences from position 0.
    pub fn forward(&self, tape: &Tape, h: &Var, lens: &[usize], index: usize, plan: &AttentionPlan) -> LayerOutput {
        let [_, t, _] = h.value().dims();
        let positions: Vec<u32> = (0..t as u32).collect();
        let p = self.project(tape, h, &positions);
        let (o, scores) = plan.attend(tape, self, index, h, &p, lens);
        let block = self.block_output(tape, &o);
        LayerOutput { h: self.finish(tape, h, &block), block, scores }
    }

    /// Every parameter, gates last.
    pub fn params(&self) -> Vec<&Param> {
        let a = &self.attention;
        let mut params = vec![&self.input_norm];
        for linear in [&a.q_proj, &a.k_proj, &a.v_proj, &a.o_proj] {
            params.push(&linear.weight);
            params.extend(&linear.bias);
        }
        params.extend(&a.q_norm);
        params.extend(&a.k_norm);
        params.push(&self.post_norm);
        params.extend([&self.mlp.gate_proj.weight, &self.mlp.up_proj.weight, &self.mlp.down_proj.weight]);
        if let Some(gate) = &self.gate {
            params.extend([&gate.weight, &gate.bias, &gate.recency]);
        }
        params
    }

    /// Every parameter for writing, in the same order.
    pub fn params_mut(&mut self) -> Vec<&mut Param> {
        let a = &mut self.attention;
        let mut params = vec![&mut self.input_norm];
        for linear in [&mut a.q_proj, &mut a.k_proj, &mut a.v_proj, &mut a.o_proj] {
            params.push(&mut linear.weight);
            params.extend(&mut linear.bias);
        }
        params.extend(&mut a.q_norm);
        params.extend(&mut a.k_norm);
        params.push(&mut self.post_norm);
        params.extend([&mut self.mlp.gate_proj.weight, &mut self.mlp.up_proj.weight, &mut self.mlp.down_proj.weight]);
        if let Some(gate) = &mut self.gate {
            params.extend([&mut gate.weight, &mut gate.bias, &mut gate.recency]);
        }
        params
    }
}

/// `[B, T, 1] -> [B, T, G]` by repetition, with the gradient summed back; `[B, T, G]` passes through.
fn repeat_shared(tape: &Tape, scores: &Var, n_kv_heads: usize) -> Var {
    let gate_heads = scores.value().last_dim();
    if gate_heads == n_kv_heads {
        return scores.clone();
    }
    assert_eq!(gate_heads, 1, "{gate_heads} gate heads cannot serve {n_kv_heads} KV heads");
    tape.custom(&[scores], repeat_heads::fwd(scores.value(), n_kv_heads), |dy| vec![Some(repeat_heads::bwd(dy))])
}
