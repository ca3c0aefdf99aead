//! The safetensors container: reads and checks the header, writes files in a stream. Knows nothing
//! about models. Format: <https://github.com/huggingface/safetensors>: u64 length, JSON header, bytes.
//!
//! Read here rather than with the `safetensors` crate because that wants the whole file in one slice
//! (a map, so `unsafe`) and lets a repeated name win silently. The tests check both against each other.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use half::bf16;
use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use sluice_tensor::{DType, Tensor};

use super::CheckpointError;
use super::file::{SizedFile, write_atomically};
use super::gguf_blocks::BlockFormat;
use super::stored::StoredTensor;

/// The format's own limit on the header.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A parsed header over an open file.
pub(super) struct Safetensors {
    pub(super) file: SizedFile,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) tensors: BTreeMap<String, Entry>,
}

/// A tensor of the file; its format may be one that we cannot read, which matters only to who wants it.
pub(super) struct Entry {
    pub(super) shape: Vec<usize>,
    dtype: String,
    offset: u64,
}

impl Safetensors {
    /// Open a file and check that its tensors cover the data exactly, which a file that was cut off does not.
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = SizedFile::open(path)?;
        let wrong = |found: String, expected: &str| CheckpointError::unexpected(path, found, expected);
        let header_len = u64::from_le_bytes(file.prefix()?);
        if header_len > MAX_HEADER_BYTES || header_len > file.len() - 8 {
            let found = format!("a header of {header_len} bytes in a file of {}", file.len());
            return Err(wrong(found, "a safetensors header inside the file; it is cut off or of another format"));
        }
        let mut json = vec![0; header_len as usize];
        file.read_at(8, &mut json)?;
        let header: Header =
            serde_json::from_slice(&json).map_err(|e| wrong(format!("a header that does not parse: {e}"), "safetensors"))?;
        drop(json);

        let data_start = 8 + header_len;
        let data_len = file.len() - data_start;
        let mut tensors = BTreeMap::new();
        let mut spans = Vec::with_capacity(header.tensors.len());
        for (name, info) in header.tensors {
            let [begin, end] = info.data_offsets;
            let Some(size) = dtype_size(&info.dtype) else {
                return Err(wrong(format!("tensor `{name}` of type {:?}", info.dtype), "a safetensors element type"));
            };
            let bytes = info.shape.iter().try_fold(size, |n, &d| n.checked_mul(d as u64));
            if bytes.is_none() || end.checked_sub(begin) != bytes || end > data_len {
                let found = format!("tensor `{name}` of {} {:?} at bytes {begin} to {end}", info.dtype, info.shape);
                let expected = "a place of exactly that size inside the file; it is cut off or damaged";
                return Err(wrong(format!("{found} of {data_len}"), expected));
            }
            spans.push((begin, end));
            let entry = Entry { shape: info.shape, dtype: info.dtype, offset: data_start + begin };
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(wrong(format!("tensor `{name}` twice"), "every tensor once"));
            }
        }
        spans.sort_unstable();
        let mut covered = 0;
        for (begin, end) in spans {
            if begin != covered {
                return Err(wrong(format!("a tensor at byte {begin} after {covered} bytes"), "tensors without gaps or overlaps"));
            }
            covered = end;
        }
        if covered != data_len {
            return Err(wrong(format!("{data_len} bytes of data for tensors of {covered}"), "tensors that cover the file exactly"));
        }
        Ok(Self { file, metadata: header.metadata, tensors })
    }

    /// A tensor that is there, in a format that can be read.
    pub(super) fn stored(&self, name: &str) -> Result<StoredTensor, CheckpointError> {
        let wrong = |found: String, expected: &str| CheckpointError::unexpected(self.file.path(), found, expected);
        let entry = self.tensors.get(name).ok_or_else(|| wrong(format!("no tensor `{name}`"), "it in this file"))?;
        let format = match entry.dtype.as_str() {
            "F32" => BlockFormat::F32,
            "F16" => BlockFormat::F16,
            "BF16" => BlockFormat::Bf16,
            other => return Err(wrong(format!("tensor `{name}` of type {other}"), "F32, F16 or BF16")),
        };
        Ok(StoredTensor { shape: entry.shape.clone(), format, offset: entry.offset })
    }

    /// Read a tensor: bf16 stays bf16, f16 becomes f32.
    pub(super) fn read(&self, name: &str) -> Result<Tensor, CheckpointError> {
        self.stored(name)?.read(&self.file)
    }
}

fn dtype_size(dtype: &str) -> Option<u64> {
    match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => Some(1),
        "U16" | "I16" | "F16" | "BF16" => Some(2),
        "U32" | "I32" | "F32" => Some(4),
        "U64" | "I64" | "F64" | "C64" => Some(8),
        _ => None,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TensorInfo {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The header with repeated names kept, so that they can be refused.
struct Header {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = Header;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header { metadata: BTreeMap::new(), tensors: Vec::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Write tensors in the given order and format, atomically, without a second copy in memory.
pub(super) fn write(
    path: &Path,
    metadata: &BTreeMap<String, String>,
    tensors: &[(&str, &Tensor)],
    dtype: DType,
) -> Result<(), CheckpointError> {
    let dtype_name = match dtype {
        DType::F32 => "F32",
        DType::Bf16 => "BF16",
    };
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut end = 0;
    for (name, tensor) in tensors {
        let begin = end;
        end += tensor.len() * dtype.size();
        header.insert(name.to_string(), serde_json::json!({"dtype": dtype_name, "shape": tensor.shape(), "data_offsets": [begin, end]}));
    }
    let mut json = serde_json::Value::Object(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' '); // Readers that map the file want aligned data.
    write_atomically(path, |out| {
        out.write_all(&(json.len() as u64).to_le_bytes())?;
        out.write_all(&json)?;
        tensors.iter().try_for_each(|(_, tensor)| write_elements(out, tensor, dtype))
    })
}

fn write_elements(out: &mut impl Write, tensor: &Tensor, dtype: DType) -> io::Result<()> {
    /// Elements converted at a time.
    const CHUNK: usize = 1 << 16;
    let mut bytes = Vec::with_capacity(CHUNK * 4);
    let mut emit = |fill: &mut dyn FnMut(&mut Vec<u8>)| {
        bytes.clear();
        fill(&mut bytes);
        out.write_all(&bytes)
    };
    match (tensor.dtype(), dtype) {
        (DType::F32, DType::F32) => {
            tensor.f32().chunks(CHUNK).try_for_each(|c| emit(&mut |b| c.iter().for_each(|x| b.extend_from_slice(&x.to_le_bytes()))))
        }
        (DType::F32, DType::Bf16) => tensor
            .f32()
            .chunks(CHUNK)
            .try_for_each(|c| emit(&mut |b| c.iter().for_each(|x| b.extend_from_slice(&bf16::from_f32(*x).to_le_bytes())))),
        (DType::Bf16, DType::F32) => tensor
            .bf16()
            .chunks(CHUNK)
            .try_for_each(|c| emit(&mut |b| c.iter().for_each(|x| b.extend_from_slice(&x.to_f32().to_le_bytes())))),
        (DType::Bf16, DType::Bf16) => {
            tensor.bf16().chunks(CHUNK).try_for_each(|c| emit(&mut |b| c.iter().for_each(|x| b.extend_from_slice(&x.to_le_bytes()))))
        }
    }
}
