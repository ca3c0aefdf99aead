//! The GGUF container, versions 2 and 3: typed metadata and the places of tensors. Knows nothing about
//! models. Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! Every count and length is checked against the bytes that are left before anything is allocated, so
//! a damaged header costs an error and never more memory than a small multiple of the file.

use std::collections::BTreeMap;
use std::io::{BufReader, Read};
use std::path::Path;

use super::CheckpointError;
use super::file::SizedFile;
use super::gguf_blocks::BlockFormat;
use super::stored::StoredTensor;

/// First four bytes of every GGUF file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
const DEFAULT_ALIGNMENT: u64 = 32;
/// The format has at most four axes.
const MAX_AXES: u32 = 4;
/// Arrays of arrays are legal and never used; this bounds the recursion.
const MAX_NESTING: usize = 4;

/// A parsed header over an open file.
pub(super) struct Gguf {
    pub(super) file: SizedFile,
    pub(super) metadata: Metadata,
    /// By the file's own names.
    pub(super) tensors: BTreeMap<String, StoredTensor>,
}

/// Key-value pairs of the header.
#[derive(Default)]
pub(super) struct Metadata(BTreeMap<String, Value>);

/// A metadata value. Integers and floats are widened; the file's width carries no meaning.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Uint(u64),
    Int(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Array),
}

/// An array keeps the file's width: some have millions of elements.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    Text(Vec<String>),
    Nested(Vec<Array>),
}

impl Gguf {
    /// Parse the header and check that every tensor lies inside the file and overlaps no other.
    pub(super) fn parse(file: SizedFile) -> Result<Self, CheckpointError> {
        let mut r = HeaderReader { path: file.path(), len: file.len(), position: 0, input: BufReader::with_capacity(1 << 18, file.file()) };
        let magic: [u8; 4] = r.bytes("the magic")?;
        if magic != MAGIC {
            return Err(r.unexpected(format!("the magic {:?}", String::from_utf8_lossy(&magic)), "\"GGUF\""));
        }
        let version = r.u32("the version")?;
        if version != 2 && version != 3 {
            let big_endian = if version.swap_bytes() <= 3 { " (a big-endian file?)" } else { "" };
            return Err(r.unexpected(format!("GGUF version {version}{big_endian}"), "version 2 or 3, little-endian"));
        }
        // The smallest entry of each kind bounds how many the file can hold.
        let n_tensors = r.count("tensors", 8 + 4 + 4 + 8)?;
        let n_pairs = r.count("metadata pairs", 8 + 4 + 1)?;
        let metadata = read_metadata(&mut r, n_pairs)?;
        let alignment = match metadata.u64("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(a) if a.is_power_of_two() && a <= 1 << 30 => a,
            Some(a) => return Err(r.unexpected(format!("general.alignment {a}"), "a power of two")),
        };
        let tensors = read_tensor_places(&mut r, n_tensors, alignment)?;
        Ok(Self { metadata, tensors, file })
    }
}

fn read_metadata(r: &mut HeaderReader<'_>, n_pairs: u64) -> Result<Metadata, CheckpointError> {
    let mut metadata = Metadata::default();
    for _ in 0..n_pairs {
        let key = r.text("a metadata key")?;
        let kind = r.u32(&key)?;
        let value = r.value(kind, &key)?;
        if metadata.0.contains_key(&key) {
            return Err(r.unexpected(format!("the metadata key `{key}` twice"), "every key once"));
        }
        metadata.0.insert(key, value);
    }
    Ok(metadata)
}

fn read_tensor_places(r: &mut HeaderReader<'_>, n_tensors: u64, alignment: u64) -> Result<BTreeMap<String, StoredTensor>, CheckpointError> {
    let mut tensors = BTreeMap::new();
    let mut spans = Vec::new();
    for _ in 0..n_tensors {
        let name = r.text("a tensor name")?;
        let n_axes = r.u32(&name)?;
        if n_axes == 0 || n_axes > MAX_AXES {
            return Err(r.unexpected(format!("tensor `{name}` with {n_axes} axes"), format!("1 to {MAX_AXES}")));
        }
        let mut shape = Vec::with_capacity(n_axes as usize);
        for _ in 0..n_axes {
            let size = r.u64(&name)?;
            match usize::try_from(size) {
                Ok(size) if size > 0 => shape.push(size),
                _ => return Err(r.unexpected(format!("tensor `{name}` with an axis of {size}"), "positive sizes")),
            }
        }
        shape.reverse(); // The file lists the fastest axis first.
        let kind = r.u32(&name)?;
        let format = BlockFormat::from_ggml(kind)
            .map_err(|found| r.unexpected(format!("tensor `{name}` in {found}"), format!("one of {}", BlockFormat::readable())))?;
        let offset = r.u64(&name)?;
        if !offset.is_multiple_of(alignment) {
            return Err(r.unexpected(format!("tensor `{name}` at offset {offset}"), format!("a multiple of the alignment {alignment}")));
        }
        let Some(bytes) = StoredTensor::byte_len(&shape, format) else {
            let expected = format!("rows of whole blocks of {} elements and a size that can be addressed", format.block_len());
            return Err(r.unexpected(format!("tensor `{name}` of shape {shape:?} in {format:?}"), expected));
        };
        spans.push((offset, bytes, name.clone()));
        if tensors.insert(name.clone(), StoredTensor { shape, format, offset }).is_some() {
            return Err(r.unexpected(format!("tensor `{name}` twice"), "every tensor once"));
        }
    }

    // Offsets count from the first aligned byte after the header.
    let data_start = r.position.next_multiple_of(alignment);
    let data_len = r.len.saturating_sub(data_start);
    spans.sort();
    let mut previous: Option<(u64, &str)> = None;
    for (offset, bytes, name) in &spans {
        let end = offset.checked_add(*bytes).filter(|&end| end <= data_len);
        let Some(end) = end else {
            let found = format!("tensor `{name}` of {bytes} bytes at offset {offset}, past the {data_len} bytes of tensor data");
            return Err(r.unexpected(found, "every tensor inside the file; it was probably cut off"));
        };
        if let Some((previous_end, previous_name)) = previous
            && previous_end > *offset
        {
            return Err(r.unexpected(format!("tensors `{previous_name}` and `{name}` in the same place"), "tensors that do not overlap"));
        }
        previous = Some((end, name));
    }
    for tensor in tensors.values_mut() {
        tensor.offset += data_start;
    }
    Ok(tensors)
}

/// Reads a header front to back and knows how much of the file is left.
struct HeaderReader<'a> {
    path: &'a Path,
    len: u64,
    position: u64,
    input: BufReader<&'a std::fs::File>,
}

impl HeaderReader<'_> {
    fn unexpected(&self, found: impl Into<String>, expected: impl Into<String>) -> CheckpointError {
        CheckpointError::unexpected(self.path, found, expected)
    }

    fn fill(&mut self, buffer: &mut [u8], what: &str) -> Result<(), CheckpointError> {
        if buffer.len() as u64 > self.len - self.position {
            return Err(self.cut_off(buffer.len() as u64, what));
        }
        self.input.read_exact(buffer).map_err(|e| CheckpointError::io("read", self.path, e))?;
        self.position += buffer.len() as u64;
        Ok(())
    }

    fn cut_off(&self, bytes: u64, what: &str) -> CheckpointError {
        let left = self.len - self.position;
        self.unexpected(
            format!("{left} bytes left at byte {}", self.position),
            format!("{bytes} for {what}; the header is cut off or damaged"),
        )
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], CheckpointError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, CheckpointError> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, CheckpointError> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    /// A number of things that take at least `min_bytes` each.
    fn count(&mut self, what: &str, min_bytes: u64) -> Result<u64, CheckpointError> {
        let n = self.u64(what)?;
        let left = self.len - self.position;
        match n.checked_mul(min_bytes) {
            Some(bytes) if bytes <= left => Ok(n),
            _ => Err(self.unexpected(format!("{n} {what}"), format!("no more than fit in the {left} bytes left"))),
        }
    }

    fn text(&mut self, what: &str) -> Result<String, CheckpointError> {
        let len = self.u64(what)?;
        if len > self.len - self.position {
            return Err(self.cut_off(len, what));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|e| {
            let shown: String = String::from_utf8_lossy(e.as_bytes()).chars().take(80).collect();
            self.unexpected(format!("{what} {shown:?}, which is not UTF-8"), "UTF-8 text")
        })
    }

    fn boolean(&mut self, what: &str) -> Result<bool, CheckpointError> {
        match self.bytes::<1>(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [b] => Err(self.unexpected(format!("{b} as a boolean in {what}"), "0 or 1")),
        }
    }

    fn value(&mut self, kind: u32, key: &str) -> Result<Value, CheckpointError> {
        Ok(match kind {
            0 => Value::Uint(self.bytes::<1>(key)?[0].into()),
            1 => Value::Int(i8::from_le_bytes(self.bytes(key)?).into()),
            2 => Value::Uint(u16::from_le_bytes(self.bytes(key)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.bytes(key)?).into()),
            4 => Value::Uint(self.u32(key)?.into()),
            5 => Value::Int(i32::from_le_bytes(self.bytes(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.bytes(key)?).into()),
            7 => Value::Bool(self.boolean(key)?),
            8 => Value::Text(self.text(key)?),
            9 => Value::Array(self.array(key, MAX_NESTING)?),
            10 => Value::Uint(self.u64(key)?),
            11 => Value::Int(i64::from_le_bytes(self.bytes(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes(key)?)),
            _ => return Err(self.unexpected(format!("metadata type {kind} for `{key}`"), "0 to 12")),
        })
    }

    fn array(&mut self, key: &str, nesting: usize) -> Result<Array, CheckpointError> {
        let kind = self.u32(key)?;
        let what = format!("elements of `{key}`");
        Ok(match kind {
            0 => Array::U8(self.numbers(&what, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(&what, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(&what, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(&what, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(&what, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(&what, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(&what, f32::from_le_bytes)?),
            7 => {
                let n = self.count(&what, 1)?;
                Array::Bool((0..n).map(|_| self.boolean(key)).collect::<Result<_, _>>()?)
            }
            8 => {
                let n = self.count(&what, 8)?;
                Array::Text((0..n).map(|_| self.text(key)).collect::<Result<_, _>>()?)
            }
            9 if nesting > 0 => {
                let n = self.count(&what, 4 + 8)?;
                Array::Nested((0..n).map(|_| self.array(key, nesting - 1)).collect::<Result<_, _>>()?)
            }
            9 => return Err(self.unexpected(format!("arrays in `{key}` nested deeper than {MAX_NESTING}"), "a flat array")),
            10 => Array::U64(self.numbers(&what, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(&what, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(&what, f64::from_le_bytes)?),
            _ => return Err(self.unexpected(format!("array type {kind} for `{key}`"), "0 to 12")),
        })
    }

    fn numbers<T, const N: usize>(&mut self, what: &str, parse: impl Fn([u8; N]) -> T) -> Result<Vec<T>, CheckpointError> {
        let n = self.count(what, N as u64)?;
        (0..n).map(|_| Ok(parse(self.bytes(what)?))).collect()
    }
}

impl Metadata {
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// Take a value out, to move large arrays instead of copying them.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.0.remove(key)
    }

    /// A whole number that is not negative; `None` when absent or something else.
    pub(super) fn u64(&self, key: &str) -> Option<u64> {
        self.get(key).and_then(Value::as_u64)
    }
}

impl Value {
    pub(super) fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Uint(v) => Some(v),
            Self::Int(v) => v.try_into().ok(),
            _ => None,
        }
    }

    pub(super) fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::Float(v) => Some(v),
            Self::Uint(v) => Some(v as f64),
            Self::Int(v) => Some(v as f64),
            _ => None,
        }
    }

    /// The value for a message, cut short.
    pub(super) fn shown(&self) -> String {
        match self {
            Self::Uint(v) => v.to_string(),
            Self::Int(v) => v.to_string(),
            Self::Float(v) => v.to_string(),
            Self::Bool(v) => v.to_string(),
            Self::Text(v) => format!("{:?}", v.chars().take(80).collect::<String>()),
            Self::Array(v) => format!("an array of {} elements", v.len()),
        }
    }
}

impl Array {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::F64(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::Text(v) => v.len(),
            Self::Nested(v) => v.len(),
        }
    }

    /// The elements of an integer array; `None` for other arrays or negative elements.
    pub(super) fn as_u64s(&self) -> Option<Vec<u64>> {
        fn widen<T: Copy + TryInto<u64>>(v: &[T]) -> Option<Vec<u64>> {
            v.iter().map(|&x| x.try_into().ok()).collect()
        }
        match self {
            Self::U8(v) => widen(v),
            Self::I8(v) => widen(v),
            Self::U16(v) => widen(v),
            Self::I16(v) => widen(v),
            Self::U32(v) => widen(v),
            Self::I32(v) => widen(v),
            Self::U64(v) => widen(v),
            Self::I64(v) => widen(v),
            _ => None,
        }
    }
}
