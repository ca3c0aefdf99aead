//! An encoder recorded with transformers (golden/encoder.py), through the door by which users come: a folder on disk. And what such folders may
//! have wrong.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sluice_kernels::top_k_routing::Budget;
use sluice_model::checkpoint::load_encoder;
use sluice_model::{Encoder, EncoderAttention, TextBatch};
use sluice_testkit::{assert_close, max_abs_diff};

struct Golden {
    config: String,
    tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)>,
}

impl Golden {
    fn read() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/encoder.safetensors");
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let config = metadata.metadata().as_ref().unwrap()["config"].clone();
        let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
        Self { config, tensors: tensors.into_iter().map(|(name, t)| (name, (t.shape().to_vec(), t.data().to_vec()))).collect() }
    }

    fn words(&self, name: &str) -> impl Iterator<Item = [u8; 4]> {
        self.tensors[name].1.chunks_exact(4).map(|b| b.try_into().unwrap())
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.words(name).map(f32::from_le_bytes).collect()
    }

    fn batch(&self) -> TextBatch {
        TextBatch {
            tokens: self.words("tokens").map(u32::from_le_bytes).collect(),
            lens: self.words("lens").map(|w| u32::from_le_bytes(w) as usize).collect(),
        }
    }

    /// A Hugging Face folder whose tensors have a prefix.
    fn write_folder(&self, folder: &Path, prefix: &str) {
        std::fs::write(folder.join("config.json"), &self.config).unwrap();
        std::fs::write(folder.join("tokenizer.json"), "{}").unwrap();
        let weights = self.tensors.iter().filter_map(|(name, (shape, data))| {
            let name = format!("{prefix}{}", name.strip_prefix("weights.")?);
            Some((name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap()))
        });
        safetensors::serialize_to_file(weights, None, &folder.join("model.safetensors")).unwrap();
    }
}

#[test]
fn states_and_means_equal_those_of_transformers() {
    let golden = Golden::read();
    for prefix in ["", "bert."] {
        let folder = tempfile::tempdir().unwrap();
        golden.write_folder(folder.path(), prefix);
        let encoder = Encoder::from_checkpoint(&load_encoder(folder.path()).unwrap());
        let batch = golden.batch();
        let hidden = encoder.forward(&batch, EncoderAttention::Dense);
        let [_, t, m] = hidden.dims();
        let want = golden.f32("hidden");
        for (b, &len) in batch.lens.iter().enumerate() {
            let valid = b * t * m..(b * t + len) * m;
            assert_close("states", &hidden.f32()[valid.clone()], &want[valid], 2e-5);
        }
        assert_close("means", encoder.mean_states(&batch).f32(), &golden.f32("mean"), 2e-5);
    }
}

#[test]
fn a_text_has_the_same_states_alone_and_among_longer_ones() {
    let golden = Golden::read();
    let folder = tempfile::tempdir().unwrap();
    golden.write_folder(folder.path(), "");
    let encoder = Encoder::from_checkpoint(&load_encoder(folder.path()).unwrap());
    let batch = golden.batch();
    let together = encoder.mean_states(&batch);
    let [_, m] = together.dims();
    let t = batch.tokens.len() / batch.lens.len();
    for (b, &len) in batch.lens.iter().enumerate() {
        let alone = encoder.mean_states(&TextBatch::of(&[&batch.tokens[b * t..b * t + len]]));
        assert_close("mean", alone.f32(), &together.f32()[b * m..(b + 1) * m], 1e-5);
    }
    assert_eq!(encoder.mean_states(&TextBatch::of(&[])).shape(), [0, 32]);
}

#[test]
fn routing_that_keeps_everything_is_dense_and_a_small_budget_is_not() {
    let golden = Golden::read();
    let folder = tempfile::tempdir().unwrap();
    golden.write_folder(folder.path(), "");
    let encoder = Encoder::from_checkpoint(&load_encoder(folder.path()).unwrap());
    let text: Vec<u32> = golden.batch().tokens[..23].to_vec();
    let batch = TextBatch::of(&[&text]);
    let dense = encoder.forward(&batch, EncoderAttention::Dense);
    let routed = |window, top_k| {
        let budget = Budget { window, top_k, route_every: 1, n_sink: 1 };
        encoder.forward(&batch, EncoderAttention::Routed(budget))
    };
    assert_close("everything kept", routed(4, 23).f32(), dense.f32(), 2e-5);
    assert!(max_abs_diff(routed(4, 2).f32(), dense.f32()) > 0.05);
}

#[test]
fn folders_that_cannot_be_used_say_why() {
    let golden = Golden::read();
    let refused = |damage: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        golden.write_folder(folder.path(), "");
        damage(folder.path());
        load_encoder(folder.path()).err().expect("a damaged folder").to_string()
    };
    let write = |name: &'static str, text: String| {
        move |folder: &Path| {
            let path = folder.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, &text).unwrap();
        }
    };
    let pooling = r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#;
    let error = refused(&write("1_Pooling/config.json", pooling.into()));
    assert!(error.contains("pooling_mode_cls_token") && error.contains("pooling_mode_mean_tokens"), "{error}");
    let error = refused(&write("sentence_bert_config.json", r#"{"max_seq_length": 25}"#.into()));
    assert!(error.contains("max_seq_length") && error.contains("24"), "{error}");
    let error = refused(&write("config.json", golden.config.replace("\"intermediate_size\": 48", "\"intermediate_size\": 47")));
    assert!(error.contains("intermediate.dense") && error.contains("47"), "{error}");
    let error = refused(&write("config.json", golden.config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3")));
    assert!(error.contains("encoder.layer.2") && error.contains("missing"), "{error}");
    let error = refused(&|folder| std::fs::remove_file(folder.join("tokenizer.json")).unwrap());
    assert!(error.contains("tokenizer.json"), "{error}");
    let error = refused(&|folder| std::fs::remove_file(folder.join("config.json")).unwrap());
    assert!(error.contains("config.json"), "{error}");
}
