//! Tokenizer classes of transformers that build their own normalizer, pre-tokenizer and decoder, and take vocabulary,
//! merges and added tokens alone from tokenizer.json. Called by `special_tokens` and `tokenizer`.

use super::{DataError, chat_template::read_json};
use crate::console::shortened;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// A class with settings of its own.
#[derive(Debug)]
struct Class {
    /// Without `Fast`, which transformers takes off.
    name: &'static str,
    /// Named tokens that tokenizer_config.json may leave out: (name, token).
    names: &'static [(&'static str, &'static str)],
    /// The parts of tokenizer.json that it replaces.
    parts: fn(Settings) -> [(&'static str, Value); 3],
    /// A vocabulary of bytes rather than of characters with `▁` for a space.
    is_byte_level: bool,
}

/// Settings of tokenizer_config.json, where it has them.
#[derive(Clone, Copy, Debug, Default)]
struct Settings {
    add_prefix_space: Option<bool>,
    legacy: Option<bool>,
}

const END: &str = "<|endoftext|>";
/// The regular expression of `Qwen2Tokenizer`.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The classes that are built.
const BUILT: [Class; 4] = [
    Class {
        name: "LlamaTokenizer",
        names: &[("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")],
        parts: |settings| {
            let prefix = settings.add_prefix_space.unwrap_or(true);
            let scheme = match (prefix, settings.legacy.unwrap_or(false)) {
                (false, _) => "never",
                (true, false) => "first",
                (true, true) => "always",
            };
            let mut decoders = vec![
                json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                json!({"type": "ByteFallback"}),
                json!({"type": "Fuse"}),
            ];
            if prefix {
                decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
            }
            [
                ("normalizer", Value::Null),
                (
                    "pre_tokenizer",
                    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false}),
                ),
                ("decoder", json!({"type": "Sequence", "decoders": decoders})),
            ]
        },
        is_byte_level: false,
    },
    Class {
        name: "Qwen2Tokenizer",
        names: &[("unk_token", END), ("eos_token", END), ("pad_token", END)],
        parts: |settings| {
            let split = json!({"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated",
                "invert": false});
            let whole = json!({"type": "Sequence", "pretokenizers": [split, byte_level(settings, false)]});
            [
                ("normalizer", json!({"type": "NFC"})),
                ("pre_tokenizer", whole),
                ("decoder", byte_level(settings, true)),
            ]
        },
        is_byte_level: true,
    },
    Class {
        name: "GPTNeoXTokenizer",
        names: &[("unk_token", END), ("bos_token", END), ("eos_token", END), ("pad_token", "<|padding|>")],
        parts: |settings| {
            [
                ("normalizer", json!({"type": "NFC"})),
                ("pre_tokenizer", byte_level(settings, true)),
                ("decoder", byte_level(settings, true)),
            ]
        },
        is_byte_level: true,
    },
    Class {
        name: "GPT2Tokenizer",
        names: &[("unk_token", END), ("bos_token", END), ("eos_token", END)],
        parts: |settings| {
            [
                ("normalizer", Value::Null),
                ("pre_tokenizer", byte_level(settings, true)),
                ("decoder", byte_level(settings, true)),
            ]
        },
        is_byte_level: true,
    },
];

/// Classes of transformers with settings of their own that are not built, without `Tokenizer`. A class that
/// transformers does not know has none.
const NOT_BUILT: &str = "Albert Bart Barthez Bartpho Bert BertGeneration BertJapanese Bertweet BigBird BioGpt Blenderbot \
    BlenderbotSmall ByT5 CLIP CTRL Camembert Canine Clvp CodeGen CodeLlama Cohere Cpm CpmAnt DPRContextEncoder \
    DPRQuestionEncoder DPRReader Deberta DebertaV2 Dia DistilBert Esm FSMT FastSpeech2Conformer Flaubert Funnel \
    GPTNeoXJapanese GPTSw3 Gemma Herbert Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke M2M100 MBart MBart50 MLuke MPNet \
    Marian MarkupLM Mgpstr MobileBert MyT5 Nllb Nougat OpenAIGPT PLBart Pegasus Perceiver Phobert Pop2Piano ProphetNet \
    Qwen3_5 Rag Reformer RemBert RoCBert RoFormer Roberta SeamlessM4T Siglip Siglip2 Speech2Text SpeechT5 Splinter \
    SqueezeBert T5 Tapas Udop Vits Wav2Vec2CTC Wav2Vec2PhonemeCTC Whisper XGLM XLM XLMRoberta XLNet";

fn byte_level(settings: Settings, use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": settings.add_prefix_space.unwrap_or(false),
        "trim_offsets": true, "use_regex": use_regex})
}

/// The class that transformers builds for a folder, with settings of its own.
#[derive(Debug)]
pub(super) struct TokenizerClass {
    class: &'static Class,
    settings: Settings,
    /// The file that names it, or the model's family.
    path: PathBuf,
}

impl TokenizerClass {
    /// The class of the folder `dir` with the tokenizer_config.json `config`, `None` for one that takes tokenizer.json
    /// as it is.
    pub fn of(dir: &Path, config: &Map<String, Value>) -> Result<Option<Self>, DataError> {
        let path = dir.join("tokenizer_config.json");
        let model_path = dir.join("config.json");
        let model = read_json(&model_path)?.unwrap_or_default();
        let stated = text(&path, config.get("tokenizer_class"))?;
        let of_family = match model["model_type"].as_str() {
            Some("qwen2" | "qwen2_moe" | "qwen3" | "qwen3_moe") => Some("Qwen2Tokenizer"),
            Some("olmoe") => Some("GPTNeoXTokenizer"),
            Some("mistral" | "mixtral") => Some("TokenizersBackend"),
            _ => None,
        };
        let has_code =
            config.get("auto_map").is_some_and(|map| !map.is_object() || !map["AutoTokenizer"].is_null());
        let (name, path) = match (stated, text(&model_path, model.get("tokenizer_class"))?) {
            // A class of another family is left alone.
            (Some(stated), _) if !has_code && of_family.is_some_and(|name| name != stated) => {
                return Ok(None);
            }
            (Some(stated), _) => (stated, path),
            (None, Some(of_model)) => (of_model, model_path),
            (None, None) => (of_family.unwrap_or("TokenizersBackend"), path),
        };
        let not_built = || {
            name.strip_suffix("Tokenizer").is_some_and(|name| NOT_BUILT.split(' ').any(|other| other == name))
        };
        let Some(class) = BUILT.iter().find(|class| class.name == name) else {
            if not_built() {
                let why =
                    format!("{name} builds a normalizer and a pre-tokenizer of its own in transformers");
                return Err(refused(&path, &why));
            }
            return Ok(None);
        };
        let flag = |field: &str| match config.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => {
                let problem = format!("{field}: expected true or false, got {}", shortened(other));
                Err(DataError::Tokenizer { path: dir.join("tokenizer_config.json"), problem })
            }
        };
        let settings = Settings { add_prefix_space: flag("add_prefix_space")?, legacy: flag("legacy")? };
        Ok(Some(Self { class, settings, path }))
    }

    /// The named tokens that it has where no file gives or nulls them: (name, token).
    pub fn names(&self) -> &'static [(&'static str, &'static str)] {
        self.class.names
    }

    /// tokenizer.json with the parts of the class, without added tokens. A warning names the parts that differ.
    pub fn rebuilt(&self, file: &[u8]) -> Result<Vec<u8>, DataError> {
        let name = self.class.name;
        let mut json: Value =
            serde_json::from_slice(file).map_err(|error| refused(&self.path, &error.to_string()))?;
        let model = &json["model"];
        if !model["vocab"].is_object() || !model["merges"].is_array() {
            let kind = shortened(&model["type"]);
            return Err(refused(
                &self.path,
                &format!("{name} is of model BPE, and tokenizer.json of {kind}"),
            ));
        }
        let is_byte_level =
            mentions(&json["pre_tokenizer"], "ByteLevel") || mentions(&json["normalizer"], "ByteLevel");
        if is_byte_level != self.class.is_byte_level {
            let [own, files] = [self.class.is_byte_level, is_byte_level]
                .map(|bytes| if bytes { "on bytes (ByteLevel)" } else { "on characters (Metaspace)" });
            let why = format!("the pre_tokenizer of {name} works {own}, and that of tokenizer.json {files}");
            return Err(refused(&self.path, &why));
        }
        let mut differing = Vec::new();
        for (part, value) in (self.class.parts)(self.settings) {
            if without_offsets(&json[part]) != without_offsets(&value) {
                differing.push(part);
            }
            json[part] = value;
        }
        if !differing.is_empty() {
            tracing::warn!(
                "{}: tokenizer_class: {name} has its own {}, used in place of tokenizer.json's as in transformers; to \
                 use those of the file, set tokenizer_class: PreTrainedTokenizerFast",
                self.path.display(),
                differing.join(", "),
            );
        }
        let on_characters = Value::Bool(!self.class.is_byte_level);
        for (field, value) in [
            ("type", json!("BPE")),
            ("dropout", Value::Null),
            ("unk_token", Value::Null),
            ("continuing_subword_prefix", Value::Null),
            ("end_of_word_suffix", Value::Null),
            ("fuse_unk", on_characters.clone()),
            ("byte_fallback", on_characters),
            ("ignore_merges", Value::Bool(false)),
        ] {
            json["model"][field] = value;
        }
        json["added_tokens"] = json!([]);
        Ok(json.to_string().into_bytes())
    }
}

/// The name of a class without `Fast`.
fn text<'a>(path: &Path, value: Option<&'a Value>) -> Result<Option<&'a str>, DataError> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) => Ok(Some(name.strip_suffix("Fast").unwrap_or(name))),
        Some(other) => {
            let problem = format!("tokenizer_class: expected the name of a class, got {}", shortened(other));
            Err(DataError::Tokenizer { path: path.into(), problem })
        }
    }
}

/// True if a part of tokenizer.json is of type `kind`, or has a member of it.
fn mentions(part: &Value, kind: &str) -> bool {
    let members = part["pretokenizers"].as_array().or(part["normalizers"].as_array());
    part["type"] == kind || members.is_some_and(|members| members.iter().any(|member| mentions(member, kind)))
}

/// A part without the fields that change no token and no text.
fn without_offsets(part: &Value) -> Value {
    let mut part = part.clone();
    let of_sequence = part.get_mut("pretokenizers").and_then(Value::as_array_mut);
    if let Some(members) = of_sequence {
        for member in members {
            *member = without_offsets(member);
        }
    } else if let Some(object) = part.as_object_mut() {
        object.remove("trim_offsets");
    }
    part
}

fn refused(path: &Path, why: &str) -> DataError {
    let problem = format!(
        "tokenizer_class: {why}; set tokenizer_class: PreTrainedTokenizerFast to use tokenizer.json as it is, or save \
         the tokenizer again with transformers"
    );
    DataError::Tokenizer { path: path.into(), problem }
}
