//! JSON bodies of the calls. Fields that are not named here or among those that are refused are ignored, for clients
//! send others, and null counts as absent.

use super::fault::Refused;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// The fields of both calls that generate.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(as = openai::Sampling)]
pub struct Sampling {
    /// The `model_id` of an adapter, the name of the base, or the path of saved weights for a sampler.
    #[schema(example = "org/base")]
    pub model: String,
    /// Tokens of each continuation, at most. Of a chat: all that the context leaves, where it is absent; of a
    /// completion: 16.
    #[schema(minimum = 0, example = 16)]
    pub max_tokens: Option<usize>,
    /// 0: the most likely token. 1 where it is absent.
    #[schema(minimum = 0, example = 1)]
    pub temperature: Option<f64>,
    #[schema(exclusive_minimum = 0, maximum = 1, example = 1)]
    pub top_p: Option<f64>,
    /// 0 and -1: all tokens.
    #[schema(minimum = -1, example = 50)]
    pub top_k: Option<i64>,
    /// Continuations of each prompt; 1 where it is absent.
    #[schema(minimum = 1, maximum = 128, example = 1)]
    pub n: Option<usize>,
    /// Key of the random numbers; another one each time, where it is absent.
    pub seed: Option<i64>,
    /// Texts that end a continuation and are no part of it.
    pub stop: Option<OneOrMore>,
    /// Tokens that end a continuation beside the model's own.
    #[schema(example = json!([2]))]
    pub stop_token_ids: Option<Vec<i64>>,
    /// Events as text is generated, in place of one body.
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
}

/// A text, or a list of texts.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
#[schema(as = openai::OneOrMore)]
pub enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl OneOrMore {
    pub fn into_texts(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::More(texts) => texts,
        }
    }
}

/// The form of a stream.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[schema(as = openai::StreamOptions)]
pub struct StreamOptions {
    /// A last event with the counts of tokens.
    pub include_usage: Option<bool>,
}

/// `completions`, beside [`Sampling`].
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(as = openai::Completion)]
pub struct Completion {
    pub prompt: Prompt,
    /// Begin each text with its prompt.
    pub echo: Option<bool>,
    /// Log-probabilities of the tokens, and of this number of the most likely ones at each position.
    #[schema(minimum = 0, maximum = 20, example = 1)]
    pub logprobs: Option<usize>,
    /// Refused unless 1 or `n`: all continuations are given.
    #[schema(minimum = 1, example = 1)]
    pub best_of: Option<usize>,
}

/// One or several prompts, as texts or token ids.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a text, a list of texts, a list of token ids, or a list of such lists"
)]
#[schema(as = openai::Prompt)]
pub enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<i64>),
    ListsOfIds(Vec<Vec<i64>>),
}

/// `chat/completions`, beside [`Sampling`].
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(as = openai::Chat)]
pub struct Chat {
    pub messages: Vec<Message>,
    /// Handed to the chat template.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Map<String, Value>>>,
    /// `auto`, or `none`: the tools are left out.
    #[schema(value_type = Option<String>, example = "auto")]
    pub tool_choice: Option<Value>,
    /// The newer name of `max_tokens`, which goes before it.
    #[schema(minimum = 1, example = 16)]
    pub max_completion_tokens: Option<usize>,
    /// Log-probabilities of the tokens.
    pub logprobs: Option<bool>,
    /// This number of the most likely tokens at each position, with `logprobs`.
    #[schema(minimum = 0, maximum = 20, example = 1)]
    pub top_logprobs: Option<usize>,
}

/// A message of a chat. Other fields reach the chat template as they are.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(as = openai::Message, example = json!({"role": "user", "content": "A"}))]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`
    #[schema(example = "user")]
    pub role: String,
    pub content: Option<Content>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub more: Map<String, Value>,
}

/// The text of a message.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of {type: \"text\", text}")]
#[schema(as = openai::Content)]
pub enum Content {
    Text(String),
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(as = openai::Part)]
pub struct Part {
    /// `text`
    #[serde(rename = "type")]
    #[schema(example = "text")]
    pub kind: String,
    pub text: Option<String>,
}

/// The values of a field that change nothing.
enum Neutral {
    Number(f64),
    Flag(bool),
    Text(&'static str),
    /// An object with this `type`.
    Type(&'static str),
    /// An empty list or object.
    Empty,
    /// The list of this text alone.
    Only(&'static str),
    Never,
}

impl Neutral {
    fn is(&self, value: &Value) -> bool {
        match self {
            Self::Number(number) => value.as_f64() == Some(*number),
            Self::Flag(flag) => value.as_bool() == Some(*flag),
            Self::Text(text) => value.as_str() == Some(text),
            Self::Type(text) => value["type"].as_str() == Some(text),
            Self::Empty => {
                value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
            }
            Self::Only(text) => value.as_array().is_some_and(|list| list.len() == 1 && list[0] == *text),
            Self::Never => false,
        }
    }
}

const PENALTY: &str = "probabilities are the model's own here; leave it out";
const FORMAT: &str = "text is not forced into a form here; ask for it in the prompt and check the answer";
const MEDIA: &str = "the models here read and write text alone";
const TOOLS: &str = "write functions as `tools`";
const TEMPLATE: &str = "chats are rendered by the model's own template; to render one yourself, send its text to \
                        /v1/completions";
const EFFORT: &str = "the models here have no such setting; ask for it in a message";

/// Fields that would change the answer and are not built, each with the value that changes nothing. Others that clients
/// know are harmless: `user`, `metadata`, `store`, `service_tier` and keys of caches label a request or say how it is
/// to be carried out; `parallel_tool_calls` and `prediction` are hints.
const REFUSED: [(&str, Neutral, &str); 36] = [
    ("presence_penalty", Neutral::Number(0.0), PENALTY),
    ("frequency_penalty", Neutral::Number(0.0), PENALTY),
    ("repetition_penalty", Neutral::Number(1.0), PENALTY),
    ("length_penalty", Neutral::Number(1.0), PENALTY),
    ("logit_bias", Neutral::Empty, PENALTY),
    ("min_p", Neutral::Number(0.0), "not built; use top_p or top_k"),
    ("min_tokens", Neutral::Number(0.0), "not built; send the request again where an answer is too short"),
    ("ignore_eos", Neutral::Flag(false), "a continuation ends at the model's end tokens"),
    ("use_beam_search", Neutral::Flag(false), "not built; use n"),
    ("response_format", Neutral::Type("text"), FORMAT),
    ("guided_json", Neutral::Never, FORMAT),
    ("guided_regex", Neutral::Never, FORMAT),
    ("guided_choice", Neutral::Never, FORMAT),
    ("guided_grammar", Neutral::Never, FORMAT),
    ("structured_outputs", Neutral::Never, FORMAT),
    ("modalities", Neutral::Only("text"), MEDIA),
    ("audio", Neutral::Never, MEDIA),
    ("suffix", Neutral::Text(""), "text is continued at its end alone"),
    ("functions", Neutral::Empty, TOOLS),
    ("function_call", Neutral::Text("none"), TOOLS),
    ("web_search_options", Neutral::Never, "nothing is searched from here"),
    ("reasoning_effort", Neutral::Never, EFFORT),
    ("verbosity", Neutral::Never, EFFORT),
    ("chat_template", Neutral::Never, TEMPLATE),
    ("chat_template_kwargs", Neutral::Empty, TEMPLATE),
    ("documents", Neutral::Empty, TEMPLATE),
    ("add_generation_prompt", Neutral::Flag(true), TEMPLATE),
    ("continue_final_message", Neutral::Flag(false), TEMPLATE),
    ("skip_special_tokens", Neutral::Flag(true), "text has no special tokens; logprobs has them"),
    ("include_stop_str_in_output", Neutral::Flag(false), "text ends before what ends it"),
    ("prompt_logprobs", Neutral::Never, "send echo and logprobs to /v1/completions"),
    ("truncate_prompt_tokens", Neutral::Never, "prompts are not cut; send a shorter one"),
    ("bad_words", Neutral::Empty, PENALTY),
    ("allowed_token_ids", Neutral::Never, PENALTY),
    ("logits_processors", Neutral::Empty, PENALTY),
    ("lora_path", Neutral::Never, "name the adapter as `model`"),
];

/// # Errors
/// The first field that would change the answer and is not built.
pub fn check_refused(body: &Map<String, Value>) -> Result<(), Refused> {
    for (field, neutral, reason) in &REFUSED {
        if body.get(*field).is_some_and(|value| !value.is_null() && !neutral.is(value)) {
            return Err(Refused::field(field, reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_field_is_refused_unless_its_value_changes_nothing() {
        let neutral = json!({"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "logit_bias": {},
            "min_p": 0, "ignore_eos": false, "response_format": {"type": "text"}, "modalities": ["text"], "suffix": "",
            "audio": null, "chat_template_kwargs": {}, "add_generation_prompt": true, "function_call": "none",
            "length_penalty": 1.0, "bad_words": [], "user": "a", "store": true, "anything": 1});
        check_refused(neutral.as_object().unwrap()).unwrap();
        for wrong in [
            json!({"presence_penalty": 0.1}),
            json!({"frequency_penalty": "0"}),
            json!({"logit_bias": {"5": 1}}),
            json!({"response_format": {"type": "json_object"}}),
            json!({"response_format": "text"}),
            json!({"modalities": ["text", "audio"]}),
            json!({"audio": {}}),
            json!({"suffix": "a"}),
            json!({"function_call": "auto"}),
            json!({"add_generation_prompt": false}),
            json!({"ignore_eos": true}),
        ] {
            let field = wrong.as_object().unwrap().keys().next().unwrap();
            let refused = check_refused(wrong.as_object().unwrap()).unwrap_err();
            assert_eq!(refused.param.as_deref(), Some(field.as_str()));
            assert!(refused.fault.detail.starts_with(&format!("{field}: ")), "{}", refused.fault.detail);
        }
    }

    #[test]
    fn a_prompt_has_four_forms() {
        let read = |value| serde_json::from_value::<Prompt>(value).map_err(|error| error.to_string());
        assert_eq!(read(json!("a")), Ok(Prompt::Text("a".into())));
        assert_eq!(read(json!(["a", "b"])), Ok(Prompt::Texts(vec!["a".into(), "b".into()])));
        assert_eq!(read(json!([1, 2])), Ok(Prompt::Ids(vec![1, 2])));
        assert_eq!(read(json!([[1], [2, 3]])), Ok(Prompt::ListsOfIds(vec![vec![1], vec![2, 3]])));
        for wrong in [json!(1), json!([1, "a"]), json!([1.5]), json!({}), json!([[["a"]]])] {
            assert!(read(wrong).unwrap_err().starts_with("expected a text, a list of texts"));
        }
    }
}
