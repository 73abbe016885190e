//! Text to a tree of nodes with their lines. The text is YAML 1.2, of which JSON is a subset.
//!
//! Scalars stay text: the field that they are given to decides the meaning of `1e-5` or `yes`. So the same code reads
//! files and the command line. Broken, nested or repeated input is an error, never a panic.

use saphyr_parser::{Event, Parser, ScalarStyle, Tag};

/// No configuration needs more; a bound keeps hostile nesting off the stack.
const MAX_DEPTH: usize = 16;

/// A value and the line (from 1) that it starts on.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub line: usize,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Kind {
    /// `quoted` scalars are never null.
    Scalar {
        text: String,
        quoted: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
    /// A flag of the command line without a value.
    Bare,
}

/// A key of a mapping, the line of the key, and its value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub key: String,
    pub line: usize,
    pub value: Node,
}

/// A document that was read to its end.
#[derive(Debug, PartialEq)]
pub(super) struct Document {
    pub root: Node,
    /// Keys that are given twice; the first counts until the file is mended.
    pub repeated: Vec<SyntaxError>,
}

/// Text that is not YAML, or YAML that no configuration needs.
#[derive(Debug, PartialEq)]
pub(super) struct SyntaxError {
    pub line: usize,
    pub message: String,
}

impl Node {
    /// A plain scalar, as if written without quotes.
    pub fn plain(text: &str) -> Self {
        Self { line: 1, kind: Kind::Scalar { text: text.to_owned(), quoted: false } }
    }

    /// The text of a scalar.
    pub fn text(&self) -> Option<&str> {
        match &self.kind {
            Kind::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    /// Suffix (`[0].path`) and line of every part of a list or mapping.
    pub fn parts(&self) -> Vec<(String, usize)> {
        let children: Vec<(String, usize, &Node)> = match &self.kind {
            Kind::List(items) => {
                items.iter().enumerate().map(|(i, node)| (format!("[{i}]"), node.line, node)).collect()
            }
            Kind::Map(entries) => {
                entries.iter().map(|entry| (format!(".{}", entry.key), entry.line, &entry.value)).collect()
            }
            Kind::Scalar { .. } | Kind::Bare => Vec::new(),
        };
        let mut parts = Vec::new();
        for (suffix, line, node) in children {
            parts.extend(node.parts().into_iter().map(|(rest, line)| (format!("{suffix}{rest}"), line)));
            parts.push((suffix, line));
        }
        parts
    }

    /// True for the spellings of null in YAML, JSON and xorl's command line.
    pub fn is_null(&self) -> bool {
        matches!(&self.kind, Kind::Scalar { text, quoted: false } if is_null_word(text))
    }

    /// The value as an error message shows it.
    pub fn shown(&self) -> String {
        const LONGEST: usize = 60;
        match &self.kind {
            Kind::Scalar { quoted: false, text } if is_null_word(text) => "null".into(),
            Kind::Scalar { quoted: false, text } if text.parse::<f64>().is_ok() => text.clone(),
            Kind::Scalar { quoted: false, text } if matches!(text.as_str(), "true" | "false") => text.clone(),
            Kind::Scalar { text, .. } if text.chars().count() > LONGEST => {
                format!("{:?}…", text.chars().take(LONGEST).collect::<String>())
            }
            Kind::Scalar { text, .. } => format!("{text:?}"),
            Kind::List(items) if items.is_empty() => "an empty list".into(),
            Kind::List(_) => "a list".into(),
            Kind::Map(_) => "a mapping".into(),
            Kind::Bare => "no value".into(),
        }
    }
}

/// See [`Node::is_null`].
pub(super) fn is_null_word(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL" | "None" | "none")
}

/// Parses one YAML document. Empty text is an empty mapping.
pub(super) fn parse_yaml(text: &str) -> Result<Document, SyntaxError> {
    Reader { parser: Parser::new_from_str(text), line: 1, repeated: Vec::new() }.document()
}

/// Parses JSON; numbers and words stay text as in YAML.
pub(super) fn parse_json(text: &str) -> Result<Document, SyntaxError> {
    serde_json::from_str::<serde::de::IgnoredAny>(text)
        .map_err(|error| SyntaxError { line: error.line(), message: error.to_string() })?;
    // A raw tab in valid JSON is only ever white space, which YAML does not accept as indentation.
    parse_yaml(&text.replace('\t', " "))
}

struct Reader<'a> {
    parser: Parser<'a, saphyr_parser::StrInput<'a>>,
    /// Line of the event read last.
    line: usize,
    repeated: Vec<SyntaxError>,
}

impl<'a> Reader<'a> {
    fn document(mut self) -> Result<Document, SyntaxError> {
        let mut root = None;
        while let Some(event) = self.next()? {
            match event {
                Event::StreamStart | Event::StreamEnd | Event::DocumentEnd | Event::Nothing => {}
                Event::DocumentStart(_) if root.is_some() => {
                    return Err(self.error("a second YAML document starts here; a file holds one"));
                }
                Event::DocumentStart(_) => {
                    let first = self.expect_next()?;
                    root = Some(self.node(first, 0)?);
                }
                _ => return Err(self.error("unexpected content after the end of the document")),
            }
        }
        let empty = || Node { line: 1, kind: Kind::Map(Vec::new()) };
        let root = root.filter(|node| !node.is_null()).unwrap_or_else(empty);
        Ok(Document { root, repeated: self.repeated })
    }

    fn node(&mut self, event: Event<'a>, depth: usize) -> Result<Node, SyntaxError> {
        let line = self.line;
        if depth > MAX_DEPTH {
            return Err(self.error("nested too deeply"));
        }
        let kind = match event {
            Event::Scalar(text, style, _, tag) => {
                let is_text = self.check_tag(tag.as_deref())?;
                Kind::Scalar { text: text.into_owned(), quoted: is_text || style != ScalarStyle::Plain }
            }
            Event::SequenceStart(_, tag) => {
                self.check_tag(tag.as_deref())?;
                let mut items = Vec::new();
                loop {
                    match self.expect_next()? {
                        Event::SequenceEnd => break Kind::List(items),
                        event => items.push(self.node(event, depth + 1)?),
                    }
                }
            }
            Event::MappingStart(_, tag) => {
                self.check_tag(tag.as_deref())?;
                self.mapping(depth)?
            }
            Event::Alias(_) => {
                return Err(self.error("YAML aliases (*name) are not supported; write the value out"));
            }
            _ => return Err(self.error("expected a value")),
        };
        Ok(Node { line, kind })
    }

    fn mapping(&mut self, depth: usize) -> Result<Kind, SyntaxError> {
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let event = self.expect_next()?;
            let line = self.line;
            let key = match event {
                Event::MappingEnd => return Ok(Kind::Map(entries)),
                Event::Scalar(key, _, _, tag) => {
                    self.check_tag(tag.as_deref())?;
                    key.into_owned()
                }
                _ => return Err(self.error("expected a key: a plain word before the colon")),
            };
            let first = entries.iter().find(|entry| entry.key == key).map(|entry| entry.line);
            if let Some(first) = first {
                self.repeated.push(self.error(&format!("{key:?} is given twice, first on line {first}")));
            }
            let event = self.expect_next()?;
            let value = self.node(event, depth + 1)?;
            if first.is_none() {
                entries.push(Entry { key, line, value });
            }
        }
    }

    /// Refuses tags that ask for a computation, as `!env NAME`. Returns true for one that makes a scalar text.
    fn check_tag(&self, tag: Option<&Tag>) -> Result<bool, SyntaxError> {
        let Some(tag) = tag else { return Ok(false) };
        match tag.suffix.as_str() {
            "str" if tag.is_yaml_core_schema() => Ok(true),
            "int" | "float" | "bool" | "null" | "seq" | "map" if tag.is_yaml_core_schema() => Ok(false),
            _ => Err(self.error(&format!("the YAML tag {tag} is not read; write the value out"))),
        }
    }

    fn next(&mut self) -> Result<Option<Event<'a>>, SyntaxError> {
        match self.parser.next_event() {
            None => Ok(None),
            Some(Ok((event, span))) => {
                self.line = span.start.line().max(1);
                Ok(Some(event))
            }
            Some(Err(error)) => Err(SyntaxError {
                line: error.marker().line().max(1),
                message: format!(
                    "not valid YAML: {}; expected `key: value` in each line, the fields of a section indented by as \
                     many spaces",
                    error.info()
                ),
            }),
        }
    }

    fn expect_next(&mut self) -> Result<Event<'a>, SyntaxError> {
        self.next()?.ok_or_else(|| self.error("the text ends inside a value"))
    }

    fn error(&self, message: &str) -> SyntaxError {
        SyntaxError { line: self.line, message: message.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys_and_lines(node: &Node) -> Vec<(String, usize)> {
        match &node.kind {
            Kind::Map(entries) => entries
                .iter()
                .flat_map(|e| {
                    std::iter::once((e.key.clone(), e.line))
                        .chain(keys_and_lines(&e.value))
                        .collect::<Vec<_>>()
                })
                .collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn keys_know_their_line_in_block_and_in_flow_style() {
        let text = "# head\ntrain:\n  lr: 1e-5 # peak\n\n  note: |\n    a\n    b\n  seed: 3\nlora: {rank: 1,\n  alpha: 2}\n";
        let lines = keys_and_lines(&parse_yaml(text).unwrap().root);
        let expected =
            [("train", 2), ("lr", 3), ("note", 5), ("seed", 8), ("lora", 9), ("rank", 9), ("alpha", 10)];
        assert_eq!(lines, expected.map(|(key, line)| (key.to_owned(), line)));
    }

    #[test]
    fn json_with_tabs_is_read_with_lines() {
        let lines = keys_and_lines(&parse_json("{\n\t\"train\": {\n\t\t\"lr\": 1e-5\n\t}\n}").unwrap().root);
        assert_eq!(lines, [("train".to_owned(), 2), ("lr".to_owned(), 3)]);
        assert_eq!(parse_json("{\n\"train\": }").unwrap_err().line, 2);
    }

    #[test]
    fn what_no_configuration_needs_is_refused_with_its_line() {
        let deep = format!("{}{}", "[".repeat(20), "]".repeat(20));
        let abyss = "[".repeat(100_000);
        for (text, line, words) in [
            ("a: &x 1\nb: *x\n", 2, "aliases"),
            ("a: 1\n---\nb: 2\n", 2, "second YAML document"),
            ("a: [1, 2\n", 2, "not valid YAML"),
            ("a: 1\nb: !env FOO\n", 2, "the YAML tag !env is not read; write the value out"),
            ("a: !include x.yaml\n", 1, "!include"),
            ("a:\n  - !!binary aGk=\n", 2, "binary"),
            ("a: !path {b: 1}\n", 1, "!path"),
            ("!key a: 1\n", 1, "!key"),
            (deep.as_str(), 1, "nested too deeply"),
            (abyss.as_str(), 1, "recursion limit"),
        ] {
            let error = parse_yaml(text).unwrap_err();
            assert!(error.message.contains(words), "{error:?}");
            assert_eq!(error.line, line, "{error:?}");
        }
    }

    #[test]
    fn tags_of_plain_types_are_read() {
        let Kind::Map(entries) = parse_yaml("a: !!str null\nb: !!int 3\nc: !!seq [x]\n").unwrap().root.kind
        else {
            panic!("no mapping")
        };
        assert!(!entries[0].value.is_null() && entries[0].value.text() == Some("null"));
        assert_eq!(entries[1].value.text(), Some("3"));
        assert!(matches!(&entries[2].value.kind, Kind::List(items) if items.len() == 1));
    }

    #[test]
    fn empty_text_is_an_empty_mapping() {
        for text in ["", "# only a comment\n", "---\n", "null"] {
            assert_eq!(parse_yaml(text).unwrap().root.kind, Kind::Map(Vec::new()), "{text:?}");
        }
    }

    #[test]
    fn keys_that_are_given_twice_are_all_told() {
        let document = parse_yaml("a: 1\nb: {c: 1, c: 2}\na: 3\nd: 4\n").unwrap();
        let told: Vec<_> = document.repeated.iter().map(|e| (e.line, e.message.as_str())).collect();
        let twice = |key, line| format!("{key:?} is given twice, first on line {line}");
        assert_eq!(told, [(2, twice("c", 2).as_str()), (3, twice("a", 1).as_str())]);
        assert_eq!(keys_and_lines(&document.root).len(), 4, "the first of each, and what follows");
    }
}
