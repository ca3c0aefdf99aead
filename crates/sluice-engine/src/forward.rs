//! The forward pass over one chunk of tokens, a prompt's or a single one. One straight line; every buffer exists before.

use sluice_kernels::cached_attention::{self, Query};
use sluice_kernels::int8_linear::{Form, PackedMatrix, QuantisedRows, linear};
use sluice_kernels::worker_team::WorkerTeam;
use sluice_kernels::{gate_score, rms_norm, rope, swiglu};
use sluice_spec::artifact::gate_heads;
use sluice_spec::{ModelConfig, RoutingConfig};

use crate::engine::Engine;
use crate::layer_cache::LayerCache;
use crate::sequence::Sequence;

/// Tokens of a job where the work of a token is small.
const TOKENS_PER_JOB: usize = 8;

/// Buffers of the forward pass. `C` is the chunk, `E = (H + 2 G) D`.
pub(crate) struct Scratch {
    /// `[C, M]`, the residual stream.
    h: Vec<f32>,
    /// `[C, M]`, after a norm.
    x: Vec<f32>,
    /// `[C, M]`, what a block adds to the stream.
    block: Vec<f32>,
    /// `[C, E]`.
    qkv: Vec<f32>,
    /// `[C, H D]`.
    o: Vec<f32>,
    /// `[C, 2 F]`.
    gate_up: Vec<f32>,
    /// `[C, Gs]`.
    scores: Vec<f32>,
    /// `[C, D / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// `[jobs, scratch of one]`.
    attention: Vec<f32>,
    attention_len: usize,
    /// `[C, F]`, one job's worth at a time.
    gated: Vec<f32>,
    /// Int8 forms of `x`, `o` and the gated values.
    x_int8: QuantisedRows,
    o_int8: QuantisedRows,
    gated_int8: QuantisedRows,
    /// `[V]`.
    logits: Vec<f32>,
    last_int8: QuantisedRows,
    chunk: usize,
}

impl Scratch {
    pub(crate) fn new(model: &ModelConfig, routing: &RoutingConfig, group: usize, form: Form, chunk: usize) -> Self {
        let (m, f, d) = (model.d_model, model.d_ff, model.head_dim);
        let (q, kv) = (model.n_heads * d, model.n_kv_heads * d);
        let shape = LayerCache::shape_of(model, routing);
        let piece = chunk.min(routing.route_every);
        // A decode step has a job per KV head, a piece of a prompt one per few tokens.
        let jobs = model.n_kv_heads.max(piece.div_ceil(TOKENS_PER_JOB));
        Self {
            h: vec![0.0; chunk * m],
            x: vec![0.0; chunk * m],
            block: vec![0.0; chunk * m],
            qkv: vec![0.0; chunk * (q + 2 * kv)],
            o: vec![0.0; chunk * q],
            gate_up: vec![0.0; chunk * 2 * f],
            scores: vec![0.0; chunk * gate_heads(model, routing)],
            cos: vec![0.0; chunk * d / 2],
            sin: vec![0.0; chunk * d / 2],
            attention: vec![0.0; jobs * shape.scratch_len()],
            attention_len: shape.scratch_len(),
            gated: vec![0.0; chunk * f],
            x_int8: QuantisedRows::new(chunk, m, group, form),
            o_int8: QuantisedRows::new(chunk, q, group, form),
            gated_int8: QuantisedRows::new(chunk, f, group, form),
            logits: vec![0.0; model.vocab_size],
            last_int8: QuantisedRows::new(1, m, group, form),
            chunk,
        }
    }

    /// Make room for activations in another form.
    pub(crate) fn set_form(&mut self, form: Form) {
        for rows in [&mut self.x_int8, &mut self.o_int8, &mut self.gated_int8, &mut self.last_int8] {
            *rows = QuantisedRows::new(rows.capacity(), rows.cols(), rows.group(), form);
        }
    }

    pub(crate) fn chunk(&self) -> usize {
        self.chunk
    }
}

/// Continue `sequence` by at most a chunk of tokens; the final hidden states stay in the scratch.
pub(crate) fn run(engine: &mut Engine, sequence: &mut Sequence, tokens: &[u32]) {
    let Engine { artifact, weights, routing, instructions, inv_freq, team, scratch: s } = engine;
    let model = &artifact.manifest.model;
    let (n, start, set) = (tokens.len(), sequence.position, *instructions);
    let (m, f, d, eps) = (model.d_model, model.d_ff, model.head_dim, model.norm_eps);
    let (q_len, kv_len) = (model.n_heads * d, model.n_kv_heads * d);
    let e = q_len + 2 * kv_len;
    let gs = gate_heads(model, routing);
    let h = &mut s.h[..n * m]; // [T, M]
    let (x, block, qkv, o) = (&mut s.x[..n * m], &mut s.block[..n * m], &mut s.qkv[..n * e], &mut s.o[..n * q_len]);
    let (gate_up, gated, scores) = (&mut s.gate_up[..n * 2 * f], &mut s.gated[..n * f], &mut s.scores[..n * gs]);

    let embed = artifact.matrix(weights.embed);
    tokens.iter().zip(h.chunks_exact_mut(m)).for_each(|(&token, h)| embed.dequantise_row(token as usize, h));
    let half = d / 2;
    for t in 0..n {
        let angles = t * half..(t + 1) * half;
        rope::position_angles((start + t) as u32, inv_freq, &mut s.cos[angles.clone()], &mut s.sin[angles]);
    }
    let (cos, sin) = (&s.cos, &s.sin);

    for (layer, cache) in weights.layers.iter().zip(&mut sequence.layers) {
        // Norm, gate, projections.
        let norm = artifact.floats(layer.input_norm);
        let gate = layer.gate.as_ref().map(|g| (artifact.floats(g.weight), artifact.floats(g.bias), artifact.floats(g.recency)));
        team.for_each_chunk_pair((&mut *x, TOKENS_PER_JOB * m), (&mut *scores, TOKENS_PER_JOB * gs), |job, x, scores| {
            for (i, (x, scores)) in x.chunks_exact_mut(m).zip(scores.chunks_exact_mut(gs)).enumerate() {
                let t = job * TOKENS_PER_JOB + i;
                rms_norm::row(&h[t * m..(t + 1) * m], norm, eps, x);
                match gate {
                    Some((weight, bias, recency)) => gate_score::token(x, weight, bias, recency, (start + t) as u32, eps, scores),
                    None => scores.fill(0.0),
                }
            }
        });
        quantise(team, x, m, &mut s.x_int8);
        let bias = layer.qkv_bias.map(|bias| artifact.floats(bias));
        linear(team, set, artifact.matrix(layer.qkv), &s.x_int8, n, bias, qkv); // [T, (H + 2 G) D]

        // Head norms and rotation of queries and keys.
        let norms = layer.qk_norms.map(|(q, k)| (artifact.floats(q), artifact.floats(k)));
        team.for_each_chunk(&mut *qkv, TOKENS_PER_JOB * e, |job, qkv| {
            for (i, qkv) in qkv.chunks_exact_mut(e).enumerate() {
                let angles = (job * TOKENS_PER_JOB + i) * half..(job * TOKENS_PER_JOB + i + 1) * half;
                if let Some((q_norm, k_norm)) = norms {
                    norm_heads(&mut qkv[..q_len], q_norm, eps);
                    norm_heads(&mut qkv[q_len..q_len + kv_len], k_norm, eps);
                }
                rope::turn_heads(&mut qkv[..q_len + kv_len], &cos[angles.clone()], &sin[angles]);
            }
        });

        // Attention, block by block: the router decides where one begins.
        let mut done = 0;
        while done < n {
            let position = start + done;
            let r = routing.route_every;
            let piece = (r - position % r).min(n - done);
            if position.is_multiple_of(r) {
                cache.begin_block(position);
            }
            let qkv = &qkv[done * e..(done + piece) * e];
            for (qkv, scores) in qkv.chunks_exact(e).zip(scores[done * gs..].chunks_exact(gs)) {
                cache.append(&qkv[q_len..q_len + kv_len], &qkv[q_len + kv_len..], scores);
            }
            let o = &mut o[done * q_len..(done + piece) * q_len];
            attend(team, model, cache, position, qkv, o, &mut s.attention, s.attention_len);
            done += piece;
        }
        quantise(team, o, q_len, &mut s.o_int8);
        linear(team, set, artifact.matrix(layer.o), &s.o_int8, n, None, block); // [T, M]
        add(h, block);

        // SwiGLU.
        let norm = artifact.floats(layer.post_norm);
        team.for_each_chunk(&mut *x, TOKENS_PER_JOB * m, |job, x| {
            for (x, h) in x.chunks_exact_mut(m).zip(h[job * TOKENS_PER_JOB * m..].chunks_exact(m)) {
                rms_norm::row(h, norm, eps, x);
            }
        });
        quantise(team, x, m, &mut s.x_int8);
        linear(team, set, artifact.matrix(layer.gate_up), &s.x_int8, n, None, gate_up); // [T, 2 F]
        let words = s.gated_int8.row_words();
        let (group, form) = (s.gated_int8.group(), s.gated_int8.form());
        let rows = &mut s.gated_int8.words_mut()[..n * words];
        team.for_each_chunk_pair((rows, TOKENS_PER_JOB * words), (&mut *gated, TOKENS_PER_JOB * f), |job, rows, gated| {
            let gate_up = gate_up[job * TOKENS_PER_JOB * 2 * f..].chunks_exact(2 * f);
            for ((row, gated), gate_up) in rows.chunks_exact_mut(words).zip(gated.chunks_exact_mut(f)).zip(gate_up) {
                swiglu::slice(&gate_up[..f], &gate_up[f..], gated);
                QuantisedRows::quantise(gated, group, form, row);
            }
        });
        linear(team, set, artifact.matrix(layer.down), &s.gated_int8, n, None, block); // [T, M]
        add(h, block);
    }
    sequence.position += n;
}

/// Logits `[V]` of token `t` of the chunk that was run last.
pub(crate) fn logits(engine: &mut Engine, t: usize) -> &[f32] {
    let Engine { artifact, weights, instructions, team, scratch: s, .. } = engine;
    let (m, eps) = (artifact.manifest.model.d_model, artifact.manifest.model.norm_eps);
    let x = &mut s.x[..m];
    rms_norm::row(&s.h[t * m..(t + 1) * m], artifact.floats(weights.final_norm), eps, x);
    s.last_int8.set_row(0, x);
    let head: PackedMatrix<'_> = artifact.matrix(weights.head);
    linear(team, *instructions, head, &s.last_int8, 1, None, &mut s.logits);
    &s.logits
}

/// Attention of the queries from `position` on, all of one block: `o [T, H, D]` from `qkv [T, E]`.
fn attend(
    team: &mut WorkerTeam,
    model: &ModelConfig,
    cache: &LayerCache,
    position: usize,
    qkv: &[f32],
    o: &mut [f32],
    scratch: &mut [f32],
    scratch_len: usize,
) {
    let (d, group, g) = (model.head_dim, model.group_size(), model.n_kv_heads);
    let q_len = model.n_heads * d;
    let e = q_len + 2 * g * d;
    if qkv.len() == e {
        // One token: a job for each KV head.
        team.for_each_chunk_pair((o, group * d), (scratch, scratch_len), |head, o, scratch| {
            let query = |i: usize| Query { q: (head * group + i) * d, o: i * d, n_strip: cache.seen_by(position) };
            cached_attention::attend(&cache.head(head), qkv, group, query, o, scratch);
        });
        return;
    }
    team.for_each_chunk_pair((o, TOKENS_PER_JOB * q_len), (scratch, scratch_len), |job, o, scratch| {
        let n = o.len() / q_len;
        let first = job * TOKENS_PER_JOB;
        for head in 0..g {
            let query = |i: usize| {
                let (t, own) = (i / group, (head * group + i % group) * d);
                Query { q: (first + t) * e + own, o: t * q_len + own, n_strip: cache.seen_by(position + first + t) }
            };
            cached_attention::attend(&cache.head(head), qkv, n * group, query, o, scratch);
        }
    });
}

/// Int8 form of `x [T, width]`.
fn quantise(team: &mut WorkerTeam, x: &[f32], width: usize, rows: &mut QuantisedRows) {
    let (n, words, group, form) = (x.len() / width, rows.row_words(), rows.group(), rows.form());
    team.for_each_chunk(&mut rows.words_mut()[..n * words], TOKENS_PER_JOB * words, |job, rows| {
        let x = x[job * TOKENS_PER_JOB * width..].chunks_exact(width);
        rows.chunks_exact_mut(words).zip(x).for_each(|(row, x)| QuantisedRows::quantise(x, group, form, row));
    });
}

fn norm_heads(heads: &mut [f32], weight: &[f32], eps: f32) {
    for head in heads.chunks_exact_mut(weight.len()) {
        rms_norm::row_in_place(head, weight, eps);
    }
}

fn add(h: &mut [f32], block: &[f32]) {
    h.iter_mut().zip(block).for_each(|(h, block)| *h += block);
}
