//! One sequence: its position and its cache. Constant in size, cheap to clone, and complete as a snapshot.

use sha2::{Digest, Sha256};
use sluice_spec::{ModelConfig, RoutingConfig};

use crate::layer_cache::LayerCache;

/// State of a text that the engine continues.
#[derive(Clone)]
pub struct Sequence {
    pub(crate) position: usize,
    pub(crate) layers: Vec<LayerCache>,
    model: ModelConfig,
    routing: RoutingConfig,
}

/// Bytes that are no snapshot of a sequence of this engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("session snapshot: found {found}; expected {expected}")]
pub struct SnapshotError {
    found: String,
    expected: String,
}

const MAGIC: &[u8; 8] = b"sluice\x00\x01";
const DIGEST_BYTES: usize = 32;

impl Sequence {
    pub(crate) fn new(model: &ModelConfig, routing: &RoutingConfig) -> Self {
        let layers = (0..model.n_layers).map(|_| LayerCache::new(model, routing)).collect();
        Self { position: 0, layers, model: model.clone(), routing: *routing }
    }

    /// Whether an engine with this model and routing can continue it.
    pub(crate) fn fits(&self, model: &ModelConfig, routing: &RoutingConfig) -> bool {
        self.routing == *routing && self.model == *model
    }

    /// Forget everything; the room stays.
    pub fn clear(&mut self) {
        self.position = 0;
        self.layers.iter_mut().for_each(LayerCache::clear);
    }

    /// Become a copy of `other` without allocating. Panics for a sequence of another model or routing.
    #[track_caller]
    pub fn copy_from(&mut self, other: &Self) {
        assert!(self.fits(&other.model, &other.routing), "a copy of a sequence of another model or routing");
        self.position = other.position;
        self.layers.iter_mut().zip(&other.layers).for_each(|(own, other)| own.copy_from(other));
    }

    /// Tokens seen so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes of keys and values, for any length of text.
    pub fn cache_bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    /// Route the next positions of a layer by these scores `[T, G]` instead of its gate's: how much of a difference between two models is
    /// rounding, and how much is other keys. A snapshot does not hold them.
    #[track_caller]
    pub fn replay_scores(&mut self, layer: usize, scores: &[f32]) {
        let g = self.model.n_kv_heads;
        assert!(scores.len().is_multiple_of(g), "{} replayed scores of {g} KV heads", scores.len());
        self.layers[layer].replayed.extend(scores);
    }

    /// Keys admitted to slots so far, over all layers and KV heads.
    pub fn admissions(&self) -> u64 {
        self.layers.iter().map(|layer| layer.admissions).sum()
    }

    /// Keys that no longer can be attended to, over all layers and KV heads.
    pub fn evictions(&self) -> u64 {
        self.layers.iter().map(|layer| (layer.evicted() * self.model.n_kv_heads) as u64).sum()
    }

    /// For each of the first `n` positions: in how many layers some KV head still holds its key.
    pub fn layers_keeping(&self, n: usize) -> Vec<u16> {
        let mut layers = vec![0; n];
        let mut seen = vec![usize::MAX; n];
        for (l, layer) in self.layers.iter().enumerate() {
            for position in layer.held_positions().filter(|&position| position < n) {
                if seen[position] != l {
                    seen[position] = l;
                    layers[position] += 1;
                }
            }
        }
        layers
    }

    /// Positions that a layer's KV head holds, ascending.
    pub fn kept_positions(&self, layer: usize, kv_head: usize) -> Vec<u32> {
        self.layers[layer].kept_positions(kv_head)
    }

    /// The whole state as bytes: only rows in use, little-endian, with a digest at the end.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(self.fingerprint());
        out.extend((self.position as u64).to_le_bytes());
        for layer in &self.layers {
            for number in [layer.n_slots as u64, layer.strip_start as u64, layer.strip_len as u64, layer.admissions] {
                out.extend(number.to_le_bytes());
            }
            let shape = layer.shape;
            for head in 0..self.model.n_kv_heads {
                let slots = head * shape.top_k..head * shape.top_k + layer.n_slots;
                layer.slot_positions[slots.clone()].iter().for_each(|p| out.extend(p.to_le_bytes()));
                layer.slot_scores[slots].iter().for_each(|s| out.extend(s.to_le_bytes()));
                let keys = &layer.keys[head * shape.key_len()..];
                let values = &layer.values[head * shape.value_len()..];
                for row in used_rows(layer) {
                    (0..shape.head_dim).for_each(|d| out.extend(keys[d * shape.rows() + row].to_le_bytes()));
                    values[row * shape.value_width()..][..shape.head_dim].iter().for_each(|v| out.extend(v.to_le_bytes()));
                }
            }
            layer.strip_scores[..layer.strip_len * self.model.n_kv_heads].iter().for_each(|s| out.extend(s.to_le_bytes()));
        }
        let digest = Sha256::digest(&out);
        out.extend(digest);
        out
    }

    /// Become what a snapshot of a sequence with the same model and routing holds. On an error nothing changes.
    pub fn restore(&mut self, snapshot: &[u8]) -> Result<(), SnapshotError> {
        let wrong = |found: &str, expected: &str| SnapshotError { found: found.into(), expected: expected.into() };
        if snapshot.len() < MAGIC.len() + 2 * DIGEST_BYTES || !snapshot.starts_with(MAGIC) {
            return Err(wrong("other bytes", "a snapshot of this version of sluice"));
        }
        let (content, digest) = snapshot.split_at(snapshot.len() - DIGEST_BYTES);
        if Sha256::digest(content)[..] != *digest {
            return Err(wrong("damaged bytes", "the digest at their end"));
        }
        let mut reader = Reader { bytes: &content[MAGIC.len()..] };
        if reader.take(DIGEST_BYTES)? != self.fingerprint() {
            return Err(wrong("the state of another model or routing", "this model's and this routing's"));
        }
        let mut fresh = Self::new(&self.model, &self.routing);
        fresh.position = reader.u64()? as usize;
        if fresh.position >= u32::MAX as usize {
            return Err(wrong("a text of more than 4 billion tokens", "a shorter one"));
        }
        for layer in &mut fresh.layers {
            let shape = layer.shape;
            [layer.n_slots, layer.strip_start, layer.strip_len] = [reader.u64()? as usize, reader.u64()? as usize, reader.u64()? as usize];
            layer.admissions = reader.u64()?;
            // A digest proves no good will: everything that later arithmetic relies on is checked.
            let strip_start = layer.strip_start_at(fresh.position);
            let complete = layer.strip_start == strip_start
                && layer.n_slots == shape.top_k.min(strip_start)
                && layer.strip_len == fresh.position - strip_start;
            if !complete {
                return Err(wrong("counts that contradict each other", "those of the budget"));
            }
            for head in 0..self.model.n_kv_heads {
                for slot in head * shape.top_k..head * shape.top_k + layer.n_slots {
                    layer.slot_positions[slot] = reader.u32()?;
                    if layer.slot_positions[slot] as usize >= layer.strip_start {
                        return Err(wrong("a kept key that has not left the window", "an older one"));
                    }
                }
                for slot in head * shape.top_k..head * shape.top_k + layer.n_slots {
                    layer.slot_scores[slot] = f32::from_bits(reader.u32()?);
                }
                for row in used_rows(layer) {
                    for d in 0..shape.head_dim {
                        layer.keys[head * shape.key_len() + d * shape.rows() + row] = reader.half()?;
                    }
                    for d in 0..shape.head_dim {
                        layer.values[head * shape.value_len() + row * shape.value_width() + d] = reader.half()?;
                    }
                }
            }
            for score in 0..layer.strip_len * self.model.n_kv_heads {
                layer.strip_scores[score] = f32::from_bits(reader.u32()?);
            }
            layer.rebuild();
        }
        if !reader.bytes.is_empty() {
            return Err(wrong("more bytes than the state has", "none after it"));
        }
        *self = fresh;
        Ok(())
    }

    /// Digest of what a state depends on besides its numbers.
    fn fingerprint(&self) -> [u8; DIGEST_BYTES] {
        let text = serde_json::to_string(&(&self.model, &self.routing)).expect("configs are plain data");
        Sha256::digest(text).into()
    }
}

/// Rows of a head's cache that hold a key.
fn used_rows(layer: &LayerCache) -> impl Iterator<Item = usize> + use<> {
    let strip_row = layer.shape.strip_row();
    (0..layer.n_slots).chain(strip_row..strip_row + layer.strip_len)
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], SnapshotError> {
        let Some((head, rest)) = self.bytes.split_at_checked(n) else {
            return Err(SnapshotError { found: "fewer bytes than the state has".into(), expected: format!("{n} more") });
        };
        self.bytes = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], SnapshotError> {
        Ok(self.take(N)?.try_into().expect("N bytes were taken"))
    }

    fn u64(&mut self) -> Result<u64, SnapshotError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, SnapshotError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Bits of an f16. What is not finite would reach other keys through `0 * inf`.
    fn half(&mut self) -> Result<u16, SnapshotError> {
        let bits = u16::from_le_bytes(self.array()?);
        if bits & 0x7c00 == 0x7c00 {
            return Err(SnapshotError { found: "a key or value that is not finite".into(), expected: "numbers".into() });
        }
        Ok(bits)
    }
}
