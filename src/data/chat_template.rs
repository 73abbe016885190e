//! Chats as text: the model's own chat template, rendered as transformers' `apply_chat_template` renders it.

use super::{
    DataError, LineProblem,
    error::one_line,
    integers::Python,
    jinja::{self, Rendered},
    special_tokens::SpecialTokens,
    tokenizer::{check_folder, without_tokenizer},
};
use crate::{json, regular_file};
use minijinja::{Environment, Error, ErrorKind, Value, value::Serde};
use serde_json::Value as Json;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// A conversation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chat {
    /// Objects with `role` and `content`; all their fields reach the template.
    pub messages: Vec<Json>,
    /// The `tools` of the template (a JSON list), `none` there when absent.
    pub tools: Option<Json>,
}

impl Chat {
    /// A chat of one user message.
    pub fn user(text: &str) -> Self {
        let mut chat = Self::default();
        chat.add("user", text);
        chat
    }

    /// Adds a message.
    pub fn add(&mut self, role: &str, text: &str) {
        self.messages.push(serde_json::json!({ "role": role, "content": text }));
    }
}

/// Clock of `strftime_now` in a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Local time at rendering.
    System,
    /// Seconds since 1970, in UTC: the same text on every rank and on every day.
    Fixed(i64),
}

impl Clock {
    pub(super) fn format(self, format: &str) -> Result<String, Error> {
        let invalid =
            || Error::new(ErrorKind::InvalidOperation, "strftime_now: the time cannot be written this way");
        if format.is_empty() {
            return Ok(String::new());
        }
        let c_format = std::ffi::CString::new(format).map_err(|_| invalid())?;
        let mut text = vec![0u8; 64 + 16 * format.len()];
        // SAFETY: `tm` is plain data that gmtime_r or localtime_r fills before it is read (they return null on
        // failure), and strftime writes at most `text.len()` bytes and reads the NUL-terminated format.
        let length = unsafe {
            let mut tm: libc::tm = std::mem::zeroed();
            let filled = match self {
                Self::Fixed(seconds) => libc::gmtime_r(&(seconds as libc::time_t), &mut tm),
                Self::System => libc::localtime_r(&libc::time(std::ptr::null_mut()), &mut tm),
            };
            if filled.is_null() {
                return Err(invalid());
            }
            libc::strftime(text.as_mut_ptr().cast(), text.len(), c_format.as_ptr(), &tm)
        };
        text.truncate(length);
        String::from_utf8(text).ok().filter(|text| !text.is_empty()).ok_or_else(invalid)
    }
}

/// The chat template of a model directory.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    /// By name; the names that transformers gives meaning are `default` and `tool_use`.
    sources: BTreeMap<String, String>,
    /// `bos_token`, `eos_token` and others: variables of the template.
    special_tokens: BTreeMap<String, String>,
    marks_generation: bool,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja` (and `additional_chat_templates/`), else `chat_template` of
    /// tokenizer_config.json: a string, or a list of `{name, template}`.
    pub fn load(dir: &Path) -> Result<Self, DataError> {
        Self::load_with_clock(dir, Clock::System)
    }

    /// As [`ChatTemplate::load`], with the clock that the template reads.
    pub fn load_with_clock(dir: &Path, clock: Clock) -> Result<Self, DataError> {
        check_folder(dir)?;
        let config_path = dir.join("tokenizer_config.json");
        let config = read_json(&config_path)?.unwrap_or_default();
        let mut found = template_files(dir)?;
        if found.is_empty() {
            found = config_templates(&config, &config_path)?;
        }
        let special_tokens = SpecialTokens::load(dir)?.texts();

        let invalid = |path: PathBuf| {
            move |error: Error| {
                let problem = format!("{}; mend it, or copy the model's file again", describe(&error));
                DataError::Template { path, problem }
            }
        };
        let mut env = jinja::environment(clock).map_err(invalid(dir.into()))?;
        let mut sources = BTreeMap::new();
        let mut marks_generation = false;
        for (name, (path, source)) in found {
            let source = with_newlines(source);
            let (rewritten, marked) = jinja::rewrite(&source);
            env.add_template_owned(name.clone(), rewritten.into_owned()).map_err(invalid(path))?;
            marks_generation |= marked;
            sources.insert(name, source);
        }
        if sources.is_empty() {
            // A folder without any tokenizer lacks more than a template.
            return Err(without_tokenizer(dir).unwrap_or_else(|| DataError::NoTemplate { dir: dir.into() }));
        }
        Ok(Self { env, sources, special_tokens, marks_generation })
    }

    /// The text of a chat; `add_generation_prompt` ends it where the assistant's answer begins.
    pub fn render(&self, chat: &Chat, add_generation_prompt: bool) -> Result<String, DataError> {
        let rendered = self.render_messages(&chat.messages, chat.tools.as_ref(), add_generation_prompt);
        Ok(rendered.map_err(DataError::Render)?.text)
    }

    /// The text of a chat up to where the assistant's answer begins.
    pub(super) fn render_prompt(&self, chat: &Chat) -> Result<String, LineProblem> {
        Ok(self.render_messages(&chat.messages, chat.tools.as_ref(), true)?.text)
    }

    /// The text of a whole chat.
    pub(super) fn render_text(&self, chat: &Chat) -> Result<String, LineProblem> {
        Ok(self.render_messages(&chat.messages, chat.tools.as_ref(), false)?.text)
    }

    /// True if a template asks for today's date.
    pub fn reads_clock(&self) -> bool {
        self.sources.values().any(|source| source.contains("strftime_now"))
    }

    /// Adds all that determines the rendered text to a hash.
    pub(super) fn hash_into(&self, hash: &mut Sha256) {
        for (name, text) in self.sources.iter().chain(&self.special_tokens) {
            for part in [name, text] {
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part);
            }
        }
    }

    /// True if a template has `{% generation %}` blocks.
    pub(super) fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// True if a template has this word, as it does where it reads a field of that name.
    pub(super) fn names(&self, field: &str) -> bool {
        self.sources.values().any(|source| source.contains(field))
    }

    /// The text of messages, and its generation blocks.
    pub(super) fn render_messages(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        prompt: bool,
    ) -> Result<Rendered, LineProblem> {
        let name =
            if tools.is_some() && self.sources.contains_key("tool_use") { "tool_use" } else { "default" };
        if !self.sources.contains_key(name) {
            let names: Vec<&str> = self.sources.keys().map(String::as_str).collect();
            return Err(LineProblem::Template(format!(
                "the model has no chat template named `default`, only {}",
                names.join(", ")
            )));
        }
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (token, text) in &self.special_tokens {
            context.insert(token, Value::from(text.as_str()));
        }
        let messages: Vec<Value> =
            messages.iter().map(|message| Value::from(Serde(Python(message)))).collect();
        context.insert("messages", Value::from(messages));
        context.insert("tools", tools.map_or(Value::from(()), |tools| Value::from(Serde(Python(tools)))));
        context.insert("documents", Value::from(()));
        context.insert("add_generation_prompt", Value::from(prompt));
        jinja::render(&self.env, name, Value::from(context))
            .map_err(|error| LineProblem::Template(describe(&error)))
    }
}

/// `chat_template.jinja` as `default` and the files of `additional_chat_templates/` by their stem.
fn template_files(dir: &Path) -> Result<BTreeMap<String, (PathBuf, String)>, DataError> {
    let mut found = BTreeMap::new();
    let mut add = |name: String, path: PathBuf| match regular_file::read_to_string(&path) {
        Ok(source) => {
            found.insert(name, (path, source));
            Ok(())
        }
        Err(source) => Err(DataError::Io { path, source }),
    };
    let main = dir.join("chat_template.jinja");
    if main.is_file() {
        add("default".into(), main)?;
        for entry in std::fs::read_dir(dir.join("additional_chat_templates")).into_iter().flatten().flatten()
        {
            let path = entry.path();
            if let Some(stem) = path.file_stem().filter(|_| path.extension().is_some_and(|e| e == "jinja")) {
                add(stem.to_string_lossy().into_owned(), path.clone())?;
            }
        }
    }
    Ok(found)
}

fn config_templates(config: &Json, path: &Path) -> Result<BTreeMap<String, (PathBuf, String)>, DataError> {
    let text = |value: &Json, field: &str| value.get(field).and_then(Json::as_str).map(str::to_string);
    match config.get("chat_template") {
        None | Some(Json::Null) => Ok(BTreeMap::new()),
        Some(Json::String(source)) => Ok([("default".into(), (path.into(), source.clone()))].into()),
        Some(Json::Array(entries)) => {
            let entry = |entry: &Json| Some((text(entry, "name")?, (path.into(), text(entry, "template")?)));
            entries.iter().map(entry).collect::<Option<_>>()
        }
        .ok_or_else(|| DataError::Template {
            path: path.into(),
            problem: "chat_template: expected a list of {name, template}".into(),
        }),
        Some(_) => Err(DataError::Template {
            path: path.into(),
            problem: "chat_template: expected a string or a list of {name, template}".into(),
        }),
    }
}

/// A template with every end of a line as `\n`, as Jinja2 reads it, also within string literals.
fn with_newlines(source: String) -> String {
    if source.contains('\r') { source.replace("\r\n", "\n").replace('\r', "\n") } else { source }
}

/// A JSON file, or `None` if there is no such file.
pub(super) fn read_json(path: &Path) -> Result<Option<Json>, DataError> {
    let bytes = match regular_file::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DataError::Io { path: path.into(), source }),
    };
    let problem = |error| {
        let problem = format!("not valid JSON: {}", json::problem(&bytes, &error));
        DataError::Template { path: path.into(), problem }
    };
    serde_json::from_slice(&bytes).map(Some).map_err(problem)
}

fn describe(error: &Error) -> String {
    let place = error.line().map(|line| format!(" (template line {line})")).unwrap_or_default();
    if error.kind() == ErrorKind::OutOfFuel {
        let most = jinja::FUEL;
        return format!(
            "the chat template fails{place}: it takes more than {most} steps for this chat, as a loop without end does"
        );
    }
    let text = error.detail().map_or_else(|| error.kind().to_string(), str::to_string);
    format!("the chat template fails{place}: {}", one_line(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_without_end_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for endless in [
            "{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x='a') %}{% for a in range(100) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        ] {
            std::fs::write(folder.path().join("chat_template.jinja"), endless).unwrap();
            let template = ChatTemplate::load(folder.path()).unwrap();
            let error = template.render(&Chat::user("a"), true).unwrap_err().to_string();
            assert!(error.contains("takes more than 16777216 steps for this chat"), "{error}");
        }
    }

    #[test]
    fn a_width_that_only_fills_memory_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let rendered = |text: &str| {
            std::fs::write(folder.path().join("chat_template.jinja"), text).unwrap();
            ChatTemplate::load(folder.path()).unwrap().render(&Chat::user("a"), true)
        };
        for wide in [
            "{{ '{:>4000000000}'.format(1) }}",
            "{{ '{:.99999999999999999999}'.format(1.5) }}",
            "{{ 'a'.ljust(4000000000) }}",
            "{{ 'a' | center(4000000000) }}",
            "{{ '1'.zfill(4000000000) }}",
            "{{ '\t'.expandtabs(4000000000) }}",
            "{{ [1] | tojson(indent=4000000000) }}",
        ] {
            let error = rendered(wide).unwrap_err().to_string();
            assert!(error.contains("a width of") && error.contains("more than 65536"), "{wide}: {error}");
        }
        assert_eq!(rendered("{{ '20261201 {:>3}'.format(1) }}").unwrap(), "20261201   1");
    }

    #[test]
    fn clocks_write_dates_as_c_does() {
        let fixed = Clock::Fixed(1_721_952_000);
        assert_eq!(fixed.format("%d %b %Y, %H:%M").unwrap(), "26 Jul 2024, 00:00");
        assert_eq!(fixed.format("").unwrap(), "");
        assert!(fixed.format("a\0b").is_err());
        assert!(fixed.format(&"%c".repeat(500)).is_ok());
        let year: i32 = Clock::System.format("%Y").unwrap().parse().unwrap();
        assert!(year >= 2024, "{year}");
    }
}
