//! Files of a model's folder.

use super::{Folder, files};
use serde_json::Value;
use xorl_dist::{
    data::{Chat, ChatTemplate, Tokenizer},
    dtype::DType,
    model::hf_config::HfModel,
    quant::Grid,
    weights::{self, SafetensorsSource, WeightSource},
};

/// `config.json`, and `model.safetensors`: every tensor is read whole and in part, as numbers and packed.
pub fn weights(input: &[u8], folder: &Folder) {
    let [config, tensors] = files(input);
    folder.put("weights/config.json", config);
    folder.put("weights/model.safetensors", tensors);
    let Ok(source) = SafetensorsSource::open(&folder.path().join("weights")) else { return };
    let _ = weights::digest(&source);
    for name in source.names() {
        let meta = source.meta(&name).expect("a tensor that is listed");
        let elements: usize = meta.shape.iter().product();
        let mut out = vec![0; 4 * elements];
        for dtype in [DType::F32, DType::Bf16] {
            let _ = source.read(&name, 0..elements, dtype, &mut out[..dtype.size() * elements]);
        }
        let (start, end) = (elements / 3, elements / 3 + elements.div_ceil(2));
        let _ = source.read(&name, start..end, DType::F32, &mut out[..4 * (end - start)]);
        let (Some(form), &[rows, columns]) = (source.packed(&name), &meta.shape[..]) else { continue };
        let grid = Grid { format: form.format, rows, columns };
        let mut packed = vec![0; grid.tiles() * form.format.tile().bytes];
        let _ = source.read_packed(&name, form.format, form.global, 0..grid.tiles(), &mut packed);
    }
}

/// `model.safetensors.index.json` beside two shards.
pub fn index(input: &[u8], folder: &Folder) {
    folder.put("index/model.safetensors.index.json", Some(input));
    for (name, tensor) in [("a", "x"), ("b", "y")] {
        let header = format!(r#"{{"{tensor}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
        folder.put(&format!("index/{name}.safetensors"), Some(&file));
    }
    let _ = SafetensorsSource::open(&folder.path().join("index"));
}

/// `config.json` and `generation_config.json`.
pub fn hf_config(input: &[u8], folder: &Folder) {
    let [config, generation] = files(input);
    folder.put("hf/config.json", config);
    folder.put("hf/generation_config.json", generation);
    let _ = HfModel::open(&folder.path().join("hf"));
}

/// `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, and a text.
pub fn tokenizer(input: &[u8], folder: &Folder) {
    let [tokenizer, config, tokens, text] = files(input);
    folder.put("tokenizer/tokenizer.json", tokenizer);
    folder.put("tokenizer/tokenizer_config.json", config);
    folder.put("tokenizer/special_tokens_map.json", tokens);
    let Ok(tokenizer) = Tokenizer::load(&folder.path().join("tokenizer")) else { return };
    let text = text.map_or("Once upon a <|im_end|> time".into(), String::from_utf8_lossy);
    if let Ok(ids) = tokenizer.encode(&text) {
        let _ = tokenizer.decode(&ids, false);
    }
}

/// A chat template, messages as JSON, and `tokenizer_config.json`.
pub fn template(input: &[u8], folder: &Folder) {
    let [template, messages, config] = files(input);
    folder.put("template/chat_template.jinja", template);
    folder.put("template/tokenizer_config.json", config);
    let Ok(template) = ChatTemplate::load(&folder.path().join("template")) else { return };
    let read = messages.and_then(|messages| serde_json::from_slice::<Value>(messages).ok());
    let chat = match read {
        Some(Value::Array(messages)) => Chat { messages, tools: None },
        Some(Value::Object(mut object)) => {
            let tools = object.remove("tools");
            let Some(Value::Array(messages)) = object.remove("messages") else { return };
            Chat { messages, tools }
        }
        _ => Chat::user("Hello"),
    };
    let _ = template.render(&chat, true);
}
