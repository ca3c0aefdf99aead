//! Tokenizers, corpora, document packing, the loader and the curriculum sampler.
