//! Ops without weights: activations, rotary positions, sums and views.

use sluice_kernels::rope::{self, RopeStyle};
use sluice_kernels::{adamw, add, centre, gelu, swiglu, top_k_routing};
use sluice_tensor::Tensor;

use crate::tape::{Tape, Var};

impl Tape {
    /// `silu(gate) * up`.
    #[track_caller]
    pub fn swiglu(&self, gate: &Var, up: &Var) -> Var {
        let y = swiglu::fwd(gate.value(), up.value());
        let (g, u) = (gate.value().clone(), up.value().clone());
        self.custom(&[gate, up], y, move |dy| {
            let (dgate, dup) = swiglu::bwd(dy, &g, &u);
            vec![Some(dgate), Some(dup)]
        })
    }

    /// The exact (erf) GELU.
    #[track_caller]
    pub fn gelu(&self, x: &Var) -> Var {
        let y = gelu::fwd(x.value());
        let x_value = x.value().clone();
        self.custom(&[x], y, move |dy| vec![Some(gelu::bwd(dy, &x_value))])
    }

    /// Rotary positions on `x [B, T, H, D]`: one position per row of a sequence, `D / 2` frequencies.
    #[track_caller]
    pub fn rope(&self, x: &Var, positions: &[u32], inv_freq: &[f32], style: RopeStyle) -> Var {
        let y = rope::fwd(x.value(), positions, inv_freq, style);
        let (positions, inv_freq) = (positions.to_vec(), inv_freq.to_vec());
        self.custom(&[x], y, move |dy| vec![Some(rope::bwd(dy, &positions, &inv_freq, style))])
    }

    /// `a + b` of the same shape.
    #[track_caller]
    pub fn add(&self, a: &Var, b: &Var) -> Var {
        self.custom(&[a, b], add::fwd(a.value(), b.value()), |dy| vec![Some(dy.clone()), Some(dy.clone())])
    }

    /// `factor * x`.
    #[track_caller]
    pub fn scale(&self, x: &Var, factor: f32) -> Var {
        self.custom(&[x], scaled(x.value(), factor), move |dy| vec![Some(scaled(dy, factor))])
    }

    /// The same elements in another shape.
    #[track_caller]
    pub fn reshape(&self, x: &Var, shape: impl Into<Vec<usize>>) -> Var {
        let before = x.value().shape().to_vec();
        self.custom(&[x], x.value().reshape(shape), move |dy| vec![Some(dy.reshape(before))])
    }

    /// `x [B, T, G]` whose gradient has no mean over the `lens[b]` rows of a sequence. For scores of which only differences matter: their threshold
    /// takes no gradient, so without this every kept key would pull the whole column up.
    #[track_caller]
    pub fn shift_free(&self, x: &Var, lens: &[usize]) -> Var {
        let lens = lens.to_vec();
        self.custom(&[x], x.value().clone(), move |dy| vec![Some(centre::fwd(dy, &lens))])
    }

    /// Gate scores `[B, T, G]` with +inf where `positions[t] < n_sink`; sinks have no gate bias and get no gradient.
    #[track_caller]
    pub fn mark_sinks(&self, scores: &Var, positions: &[u32], n_sink: usize) -> Var {
        let marked = top_k_routing::mark_sinks(scores.value(), positions, n_sink);
        let positions = positions.to_vec();
        self.custom(&[scores], marked, move |dy| vec![Some(top_k_routing::mark_sinks_bwd(dy, &positions, n_sink))])
    }
}

/// `factor * x`; the tensor itself when the factor is 1.
fn scaled(x: &Tensor, factor: f32) -> Tensor {
    let mut y = x.clone();
    if factor != 1.0 {
        adamw::scale_in_place(&mut y, factor);
    }
    y
}
