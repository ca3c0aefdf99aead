//! Checkpoints through their public door: GGUF files and Hugging Face folders written here, read back,
//! damaged in every way, exported again.

mod damage;
mod gates;
mod gguf;
mod hf;
mod support;
