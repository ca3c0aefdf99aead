//! The forward pass over one chunk of tokens: of a prompt, a single one, or some of several sequences. Everything but
//! attention sees the chunk as rows and does not ask whose they are. One straight line; every buffer exists before.

use sluice_kernels::cached_attention::{self, Query};
use sluice_kernels::int8_linear::{PackedMatrix, QuantisedRows, linear};
use sluice_kernels::worker_team::WorkerTeam;
use sluice_kernels::{gate_score, rms_norm, rope, swiglu};
use sluice_spec::artifact::gate_heads;
use sluice_spec::{ModelConfig, RoutingConfig};

use crate::engine::Engine;
use crate::layer_cache::LayerCache;
use crate::sequence::Sequence;

/// Tokens of a job where the work of a token is small.
const TOKENS_PER_JOB: usize = 8;

/// Tokens of a job of attention at most: the more, the fewer times a cached key is widened.
const TOKENS_ATTENDED_PER_JOB: usize = 32;

/// Sequences with one token each whose attention is one call to the team.
const SINGLES_PER_CALL: usize = 16;

/// One sequence's share of a chunk.
pub struct Part<'a> {
    /// The sequence.
    pub sequence: &'a mut Sequence,
    /// What it is continued by, at least one token.
    pub tokens: &'a [u32],
    /// Whether the logits after the last of them are wanted.
    pub wants_logits: bool,
}

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
    /// `[C]`.
    positions: Vec<u32>,
    /// `[C, D / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// `[jobs, scratch of one]`, of a prompt or of single tokens.
    attention: Vec<f32>,
    /// `[C, F]`, one job's worth at a time.
    gated: Vec<f32>,
    /// Int8 forms of `x`, `o` and the gated values.
    x_int8: QuantisedRows,
    o_int8: QuantisedRows,
    gated_int8: QuantisedRows,
    /// `[sequences, V]`.
    logits: Vec<f32>,
    last_int8: QuantisedRows,
    chunk: usize,
}

impl Scratch {
    pub(crate) fn new(model: &ModelConfig, routing: &RoutingConfig, group: usize, threads: usize, chunk: usize, sequences: usize) -> Self {
        let (m, f, d) = (model.d_model, model.d_ff, model.head_dim);
        let (q, kv) = (model.n_heads * d, model.n_kv_heads * d);
        let shape = LayerCache::shape_of(model, routing);
        // Single tokens have a job per KV head, a piece of a prompt one per some tokens.
        let singles = model.n_kv_heads * sequences.min(chunk).min(SINGLES_PER_CALL);
        let singles = singles * shape.scratch_len(model.group_size());
        let prompt = (1..=chunk.min(routing.route_every)).map(|piece| {
            let Shares { jobs, tokens } = tokens_attended(piece, threads);
            jobs * shape.scratch_len(tokens * model.group_size())
        });
        let attention = prompt.fold(singles, usize::max);
        Self {
            h: vec![0.0; chunk * m],
            x: vec![0.0; chunk * m],
            block: vec![0.0; chunk * m],
            qkv: vec![0.0; chunk * (q + 2 * kv)],
            o: vec![0.0; chunk * q],
            gate_up: vec![0.0; chunk * 2 * f],
            scores: vec![0.0; chunk * gate_heads(model, routing)],
            positions: vec![0; chunk],
            cos: vec![0.0; chunk * d / 2],
            sin: vec![0.0; chunk * d / 2],
            attention: vec![0.0; attention],
            gated: vec![0.0; chunk * f],
            x_int8: QuantisedRows::new(chunk, m, group),
            o_int8: QuantisedRows::new(chunk, q, group),
            gated_int8: QuantisedRows::new(chunk, f, group),
            logits: vec![0.0; sequences * model.vocab_size],
            last_int8: QuantisedRows::new(sequences, m, group),
            chunk,
        }
    }

    pub(crate) fn chunk(&self) -> usize {
        self.chunk
    }

    /// Sequences whose logits fit.
    pub(crate) fn sequences(&self) -> usize {
        self.last_int8.capacity()
    }
}

/// Continue the sequences by at most a chunk of tokens in all; the final hidden states stay in the scratch, in the order
/// of the parts.
pub(crate) fn run(engine: &mut Engine, parts: &mut [Part<'_>]) {
    let Engine { artifact, weights, routing, instructions, inv_freq, team, scratch: s } = engine;
    let model = &artifact.manifest.model;
    let n = parts.iter().map(|part| part.tokens.len()).sum::<usize>();
    let set = *instructions;
    let (m, f, d, eps) = (model.d_model, model.d_ff, model.head_dim, model.norm_eps);
    let (q_len, kv_len) = (model.n_heads * d, model.n_kv_heads * d);
    let e = q_len + 2 * kv_len;
    let gs = gate_heads(model, routing);
    let h = &mut s.h[..n * m]; // [T, M]
    let (x, block, qkv, o) = (&mut s.x[..n * m], &mut s.block[..n * m], &mut s.qkv[..n * e], &mut s.o[..n * q_len]);
    let (gate_up, gated, scores) = (&mut s.gate_up[..n * 2 * f], &mut s.gated[..n * f], &mut s.scores[..n * gs]);

    let embed = artifact.matrix(weights.embed);
    let positions = &mut s.positions[..n]; // [T]
    let mut row = 0;
    for part in &*parts {
        for (i, &token) in part.tokens.iter().enumerate() {
            embed.dequantise_row(token as usize, &mut h[row * m..(row + 1) * m]);
            positions[row] = (part.sequence.position + i) as u32;
            row += 1;
        }
    }
    let (half, positions) = (d / 2, &*positions);
    let (cos, sin) = (&mut s.cos[..n * half], &mut s.sin[..n * half]);
    team.for_each_chunk_pair((&mut *cos, TOKENS_PER_JOB * half), (&mut *sin, TOKENS_PER_JOB * half), |job, cos, sin| {
        let positions = positions[job * TOKENS_PER_JOB..].iter();
        for ((cos, sin), &position) in cos.chunks_exact_mut(half).zip(sin.chunks_exact_mut(half)).zip(positions) {
            rope::position_angles(position, inv_freq, cos, sin);
        }
    });
    let (cos, sin) = (&*cos, &*sin);

    for (l, layer) in weights.layers.iter().enumerate() {
        // Norm, gate, projections.
        let norm = artifact.floats(layer.input_norm);
        let gate = layer.gate.as_ref().map(|g| (artifact.floats(g.weight), artifact.floats(g.bias), artifact.floats(g.recency)));
        team.for_each_chunk_pair((&mut *x, TOKENS_PER_JOB * m), (&mut *scores, TOKENS_PER_JOB * gs), |job, x, scores| {
            for (i, (x, scores)) in x.chunks_exact_mut(m).zip(scores.chunks_exact_mut(gs)).enumerate() {
                let t = job * TOKENS_PER_JOB + i;
                rms_norm::row(&h[t * m..(t + 1) * m], norm, eps, x);
                match gate {
                    Some((weight, bias, recency)) => gate_score::token(x, weight, bias, recency, positions[t], eps, scores),
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

        // Attention, sequence by sequence; single tokens of several sequences together.
        let (mut first, mut row) = (0, 0);
        while first < parts.len() {
            let singles = parts[first..].iter().take_while(|part| part.tokens.len() == 1).count().min(SINGLES_PER_CALL);
            let count = singles.max(1);
            let parts = &mut parts[first..first + count];
            let rows = if singles > 0 { singles } else { parts[0].tokens.len() };
            let rows = row..row + rows;
            let (qkv, scores) = (&qkv[rows.start * e..rows.end * e], &scores[rows.start * gs..rows.end * gs]);
            let o = &mut o[rows.start * q_len..rows.end * q_len];
            let mut room = Room { team: &mut *team, scratch: &mut s.attention };
            if singles > 0 {
                attend_singles(&mut room, model, l, parts, qkv, scores, o);
            } else {
                let cache = &mut parts[0].sequence.layers[l];
                attend_prompt(&mut room, model, routing, cache, positions[rows.start] as usize, qkv, scores, o);
            }
            (first, row) = (first + count, rows.end);
        }
        quantise(team, o, q_len, &mut s.o_int8);
        linear(team, set, artifact.matrix(layer.o), &s.o_int8, n, None, block); // [T, M]
        add(team, h, block, m);

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
        let group = s.gated_int8.group();
        let rows = &mut s.gated_int8.words_mut()[..n * words];
        team.for_each_chunk_pair((rows, TOKENS_PER_JOB * words), (&mut *gated, TOKENS_PER_JOB * f), |job, rows, gated| {
            let gate_up = gate_up[job * TOKENS_PER_JOB * 2 * f..].chunks_exact(2 * f);
            for ((row, gated), gate_up) in rows.chunks_exact_mut(words).zip(gated.chunks_exact_mut(f)).zip(gate_up) {
                swiglu::slice(&gate_up[..f], &gate_up[f..], gated);
                QuantisedRows::quantise(gated, group, row);
            }
        });
        linear(team, set, artifact.matrix(layer.down), &s.gated_int8, n, None, block); // [T, M]
        add(team, h, block, m);
    }
    parts.iter_mut().for_each(|part| part.sequence.position += part.tokens.len());
}

/// Logits `[rows, V]` of some rows of the chunk that was run last.
pub(crate) fn logits(engine: &mut Engine, rows: impl Iterator<Item = usize>) -> &[f32] {
    let Engine { artifact, weights, instructions, team, scratch: s, .. } = engine;
    let model = &artifact.manifest.model;
    let m = model.d_model;
    let mut n = 0;
    for row in rows {
        let x = &mut s.x[..m];
        rms_norm::row(&s.h[row * m..(row + 1) * m], artifact.floats(weights.final_norm), model.norm_eps, x);
        s.last_int8.set_row(n, x);
        n += 1;
    }
    let head: PackedMatrix<'_> = artifact.matrix(weights.head);
    let logits = &mut s.logits[..n * model.vocab_size];
    linear(team, *instructions, head, &s.last_int8, n, None, logits);
    logits
}

/// Threads and scratch of attention.
struct Room<'a> {
    team: &'a mut WorkerTeam,
    scratch: &'a mut [f32],
}

/// How attention of a piece of a prompt is shared out.
struct Shares {
    jobs: usize,
    tokens: usize,
}

fn tokens_attended(piece: usize, threads: usize) -> Shares {
    let tokens = piece.div_ceil(threads).min(TOKENS_ATTENDED_PER_JOB);
    Shares { jobs: piece.div_ceil(tokens), tokens }
}

/// Attention of one token of each of several sequences: `o [T, H, D]` from `qkv [T, E]`.
fn attend_singles(
    room: &mut Room<'_>,
    model: &ModelConfig,
    layer: usize,
    parts: &mut [Part<'_>],
    qkv: &[f32],
    scores: &[f32],
    o: &mut [f32],
) {
    let (d, group, g) = (model.head_dim, model.group_size(), model.n_kv_heads);
    let (q_len, kv_len) = (model.n_heads * d, g * d);
    let (e, gs) = (q_len + 2 * kv_len, scores.len() / parts.len());
    room.team.for_each_chunk(&mut *parts, 1, |i, part| {
        let position = part[0].sequence.position;
        part[0].sequence.layers[layer].extend(None, position, 1, &qkv[i * e..(i + 1) * e], &scores[i * gs..(i + 1) * gs]);
    });
    let parts = &*parts;
    let scratch_len = parts[0].sequence.layers[layer].shape.scratch_len(group);
    room.team.for_each_chunk_pair((o, group * d), (&mut *room.scratch, scratch_len), |job, o, scratch| {
        let (i, head) = (job / g, job % g);
        let cache = &parts[i].sequence.layers[layer];
        let n_strip = cache.seen_by(parts[i].sequence.position);
        let query = |j: usize| Query { q: i * e + (head * group + j) * d, o: j * d, n_strip };
        cached_attention::attend(&cache.head(head), qkv, group, query, o, scratch);
    });
}

/// Attention of several tokens of one sequence, block by block: the router decides where one begins.
fn attend_prompt(
    room: &mut Room<'_>,
    model: &ModelConfig,
    routing: &RoutingConfig,
    cache: &mut LayerCache,
    start: usize,
    qkv: &[f32],
    scores: &[f32],
    o: &mut [f32],
) {
    let (d, group, g, r) = (model.head_dim, model.group_size(), model.n_kv_heads, routing.route_every);
    let q_len = model.n_heads * d;
    let e = q_len + 2 * g * d;
    let n = qkv.len() / e;
    let gs = scores.len() / n;
    let mut done = 0;
    while done < n {
        let position = start + done;
        let piece = (r - position % r).min(n - done);
        let qkv = &qkv[done * e..(done + piece) * e];
        cache.extend(Some(&mut *room.team), position, piece, qkv, &scores[done * gs..(done + piece) * gs]);
        let (o, cache) = (&mut o[done * q_len..(done + piece) * q_len], &*cache);
        let tokens = tokens_attended(piece, room.team.n_threads()).tokens;
        let scratch_len = cache.shape.scratch_len(tokens * group);
        room.team.for_each_chunk_pair((o, tokens * q_len), (&mut *room.scratch, scratch_len), |job, o, scratch| {
            let n = o.len() / q_len;
            let first = job * tokens;
            for head in 0..g {
                let query = |i: usize| {
                    let (t, own) = (i / group, (head * group + i % group) * d);
                    Query { q: (first + t) * e + own, o: t * q_len + own, n_strip: cache.seen_by(position + first + t) }
                };
                cached_attention::attend(&cache.head(head), qkv, n * group, query, o, scratch);
            }
        });
        done += piece;
    }
}

/// Int8 form of `x [T, width]`.
fn quantise(team: &mut WorkerTeam, x: &[f32], width: usize, rows: &mut QuantisedRows) {
    let (n, words, group) = (x.len() / width, rows.row_words(), rows.group());
    team.for_each_chunk(&mut rows.words_mut()[..n * words], TOKENS_PER_JOB * words, |job, rows| {
        let x = x[job * TOKENS_PER_JOB * width..].chunks_exact(width);
        rows.chunks_exact_mut(words).zip(x).for_each(|(row, x)| QuantisedRows::quantise(x, group, row));
    });
}

fn norm_heads(heads: &mut [f32], weight: &[f32], eps: f32) {
    for head in heads.chunks_exact_mut(weight.len()) {
        rms_norm::row_in_place(head, weight, eps);
    }
}

fn add(team: &mut WorkerTeam, h: &mut [f32], block: &[f32], m: usize) {
    team.for_each_chunk(h, TOKENS_PER_JOB * m, |job, h| {
        h.iter_mut().zip(&block[job * TOKENS_PER_JOB * m..]).for_each(|(h, block)| *h += block);
    });
}
