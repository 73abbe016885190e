//! Types of fields: one trait describes, reads and writes them. Files and the command line share it, so both accept the
//! same spellings.

use super::error::{Issue, Issues, Problem};
use super::server::is_model_id;
use super::source::{Kind, Node, is_null_word};
use serde_json::{Map, Value as Json};
use std::path::PathBuf;

/// A demand on a field beyond its type; stands in the field's declaration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    Any,
    /// Greater than zero.
    Positive,
    /// Zero or greater.
    NonNegative,
    /// From 0 to 1.
    Ratio,
    /// From 0 to less than 1.
    BelowOne,
    /// A count of at least one.
    OneOrMore,
    /// A count of at least one that others are multiplied with, or that memory is asked for: at most [`LARGEST_SIZE`].
    Size,
    /// A size of the mesh: -1 stands for the ranks that are left.
    SizeOrRest,
    /// A name that is safe as a directory name.
    DirectoryName,
    /// A list with an element.
    NonEmpty,
    /// A port of TCP, or 0.
    Port,
    /// A name that an adapter may have on the server.
    ModelId,
    /// A list of such names.
    ModelIds,
    /// null is accepted and means true.
    NullIsTrue,
}

/// A type in the help (`number > 0`) and in an error (`a positive number`).
pub(super) struct Description {
    pub short: String,
    pub phrase: String,
}

impl Description {
    fn new(short: impl Into<String>, phrase: impl Into<String>) -> Self {
        Self { short: short.into(), phrase: phrase.into() }
    }
}

/// A type that a field can have.
pub(super) trait Value: Sized {
    fn describe(rule: Rule) -> Description;

    /// Reads the value.
    ///
    /// # Errors
    /// All issues, each with a phrase for a right value.
    fn read(node: &Node, rule: Rule) -> Result<Self, Issues>;

    /// The value as YAML flow text that [`Value::read`] turns into the same value.
    fn write(&self) -> String;
}

/// The issue of a value that is no `T` under `rule`.
fn mismatch<T: Value>(node: &Node, rule: Rule) -> Issues {
    vec![Issue::expected(T::describe(rule).phrase, node.shown())]
}

impl Value for bool {
    fn describe(rule: Rule) -> Description {
        match rule {
            Rule::NullIsTrue => Description::new("true | false | null", "true, false or null"),
            _ => Description::new("true | false", "true or false"),
        }
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        if node.kind == Kind::Bare || (rule == Rule::NullIsTrue && node.is_null()) {
            return Ok(true);
        }
        node.text().and_then(truth).ok_or_else(|| mismatch::<Self>(node, rule))
    }

    fn write(&self) -> String {
        self.to_string()
    }
}

/// The truth words of xorl's command line and of YAML 1.1.
pub(super) fn truth(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "t" | "y" | "1" | "on" => Some(true),
        "false" | "no" | "f" | "n" | "0" | "off" => Some(false),
        _ => None,
    }
}

impl Value for f64 {
    fn describe(rule: Rule) -> Description {
        match rule {
            Rule::Positive => Description::new("number > 0", "a positive number"),
            Rule::NonNegative => Description::new("number >= 0", "a number of at least 0"),
            Rule::Ratio => Description::new("number in 0..1", "a number from 0 to 1"),
            Rule::BelowOne => Description::new("number >= 0 and < 1", "a number from 0 to below 1"),
            _ => Description::new("number", "a number"),
        }
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        let holds = |x: &f64| {
            x.is_finite()
                && match rule {
                    Rule::Positive => *x > 0.0,
                    Rule::NonNegative => *x >= 0.0,
                    Rule::Ratio => (0.0..=1.0).contains(x),
                    Rule::BelowOne => (0.0..1.0).contains(x),
                    _ => true,
                }
        };
        let number = node.text().and_then(|text| text.parse().ok()).filter(holds);
        number.ok_or_else(|| mismatch::<Self>(node, rule))
    }

    fn write(&self) -> String {
        format!("{self:?}")
    }
}

/// No run counts further; products of a few counts stay within 64 bits.
const LARGEST_COUNT: i128 = i32::MAX as i128;
/// Ranks of adapters, rows and tokens that a rank holds at a time.
const LARGEST_SIZE: i128 = 1 << 20;

/// `any`: without a rule the type takes every value, as a seed does.
macro_rules! whole_number {
    ($($ty:ty, any: $any:literal);+) => {$(
        impl Value for $ty {
            fn describe(rule: Rule) -> Description {
                match rule {
                    Rule::OneOrMore | Rule::Size => Description::new("integer >= 1", "a whole number of at least 1"),
                    Rule::SizeOrRest => {
                        Description::new("integer >= 1 or -1", "a whole number of at least 1, or -1 for the rest")
                    }
                    Rule::Port => Description::new("integer in 0..65535", "a port from 0 to 65535"),
                    _ => Description::new("integer >= 0", "a whole number of at least 0"),
                }
            }

            fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
                let holds = |x: &$ty| {
                    let wide = i128::try_from(*x).unwrap_or(i128::MAX);
                    match rule {
                        Rule::OneOrMore | Rule::Size => wide >= 1,
                        Rule::SizeOrRest => wide >= 1 || wide == -1,
                        _ => wide >= 0,
                    }
                };
                let most = match rule {
                    Rule::Size => LARGEST_SIZE,
                    Rule::Any if $any => i128::MAX,
                    _ => LARGEST_COUNT,
                };
                if node.text().and_then(|text| text.parse().ok()).is_some_and(|wide: i128| wide > most) {
                    return Err(vec![Issue::expected(format!("a whole number of at most {most}"), node.shown())]);
                }
                let number = node.text().and_then(|text| text.parse().ok()).filter(holds);
                number.ok_or_else(|| mismatch::<Self>(node, rule))
            }

            fn write(&self) -> String {
                self.to_string()
            }
        }
    )+};
}
whole_number!(usize, any: false; u64, any: true; i64, any: false; u16, any: false);

impl Value for String {
    fn describe(rule: Rule) -> Description {
        match rule {
            Rule::DirectoryName => Description::new(
                "name",
                "a name of letters, digits, '.', '_' and '-' that starts with a letter or digit (at most 128)",
            ),
            Rule::ModelId => Description::new(
                "name",
                "a name of letters, digits, '.', '_', '-' and ':' that starts with a letter or digit (at most 128)",
            ),
            _ => Description::new("text", "text"),
        }
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        let holds = |text: &&str| match rule {
            Rule::DirectoryName => is_directory_name(text),
            Rule::ModelId => is_model_id(text),
            _ => true,
        };
        let text = node.text().filter(|text| !text.is_empty() && !node.is_null()).filter(holds);
        text.map(str::to_owned).ok_or_else(|| mismatch::<Self>(node, rule))
    }

    fn write(&self) -> String {
        quote(self)
    }
}

fn is_directory_name(text: &str) -> bool {
    text.len() <= 128
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// A scalar that reads back as `text`: plain where that is safe, else in JSON's quotes, which are YAML's too.
pub(super) fn quote(text: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-');
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && text.chars().all(safe)
        && !is_null_word(text);
    if plain { text.to_owned() } else { serde_json::Value::from(text).to_string() }
}

impl Value for PathBuf {
    fn describe(_: Rule) -> Description {
        Description::new("path", "a path")
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        let text = node.text().filter(|text| !text.is_empty() && !node.is_null());
        text.map(PathBuf::from).ok_or_else(|| mismatch::<Self>(node, rule))
    }

    fn write(&self) -> String {
        quote(&self.to_string_lossy())
    }
}

impl<T: Value> Value for Option<T> {
    fn describe(rule: Rule) -> Description {
        let Description { short, phrase } = T::describe(rule);
        Description { short: format!("{short} or null"), phrase: format!("{phrase}, or null") }
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        if node.is_null() {
            return Ok(None);
        }
        T::read(node, rule).map(Some).map_err(|mut issues| {
            for issue in issues.iter_mut().filter(|issue| issue.suffix.is_empty()) {
                if let Problem::Expected { expected, .. } = &mut issue.problem {
                    expected.push_str(", or null");
                }
            }
            issues
        })
    }

    fn write(&self) -> String {
        self.as_ref().map_or_else(|| "null".to_owned(), T::write)
    }
}

impl<T: ListItem> Value for Vec<T> {
    fn describe(rule: Rule) -> Description {
        let some = if rule == Rule::NonEmpty { "non-empty list" } else { "list" };
        Description::new(format!("list of {}", T::PLURAL), format!("a {some} of {}", T::PLURAL))
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        let items = match &node.kind {
            Kind::List(items) => items.as_slice(),
            // One value stands for a list of one, as on the command line.
            Kind::Scalar { .. } if T::LONE && !node.is_null() => std::slice::from_ref(node),
            _ => return Err(mismatch::<Self>(node, rule)),
        };
        if items.is_empty() && rule == Rule::NonEmpty {
            return Err(mismatch::<Self>(node, rule));
        }
        let of_items = if rule == Rule::ModelIds { Rule::ModelId } else { Rule::Any };
        let (mut values, mut issues) = (Vec::new(), Issues::new());
        for (i, item) in items.iter().enumerate() {
            match T::read(item, of_items) {
                Ok(value) => values.push(value),
                Err(wrong) => {
                    issues.extend(wrong.into_iter().map(|e| e.inside(&format!("[{i}]"), item.line)))
                }
            }
        }
        if issues.is_empty() { Ok(values) } else { Err(issues) }
    }

    fn write(&self) -> String {
        let items: Vec<_> = self.iter().map(T::write).collect();
        format!("[{}]", items.join(", "))
    }
}

/// Numbers by name, in the order of the file: whole ones under [`Rule::Size`].
impl Value for Map<String, Json> {
    fn describe(rule: Rule) -> Description {
        let numbers = if rule == Rule::Size { "whole numbers" } else { "numbers" };
        Description::new(format!("map of {numbers}"), format!("a mapping of {numbers}, {{q_proj: 8}}"))
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        let entries = match &node.kind {
            Kind::Map(entries) => entries,
            _ if node.is_null() => return Ok(Self::new()),
            _ => return Err(mismatch::<Self>(node, rule)),
        };
        let (mut numbers, mut issues) = (Self::new(), Issues::new());
        for entry in entries {
            let number = match rule {
                Rule::Size => usize::read(&entry.value, rule).map(Json::from),
                _ => f64::read(&entry.value, rule).map(Json::from),
            };
            match number {
                Ok(number) => drop(numbers.insert(entry.key.clone(), number)),
                Err(wrong) => {
                    let place = format!(".{}", entry.key);
                    issues.extend(wrong.into_iter().map(|issue| issue.inside(&place, entry.line)));
                }
            }
        }
        if issues.is_empty() { Ok(numbers) } else { Err(issues) }
    }

    fn write(&self) -> String {
        let entries: Vec<_> =
            self.iter().map(|(name, number)| format!("{}: {number}", quote(name))).collect();
        format!("{{{}}}", entries.join(", "))
    }
}

/// An element of a list.
pub(super) trait ListItem: Value {
    /// "a list of …"
    const PLURAL: &'static str;
    /// A lone scalar may stand for a list of one.
    const LONE: bool;
}

impl ListItem for String {
    const PLURAL: &'static str = "names";
    const LONE: bool = true;
}

/// "a, b or c"
pub(super) fn alternatives(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [most @ .., last] => format!("{} or {last}", most.join(", ")),
    }
}

/// Declares an enum of named choices: the enum, its serde names and its [`Value`].
macro_rules! choices {
    ($(
        $(#[doc = $doc:literal])+
        pub enum $name:ident { $( $(#[doc = $variant_doc:literal])* $variant:ident = $text:literal, )+ }
    )+) => {$(
        $(#[doc = $doc])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $( $(#[doc = $variant_doc])* #[serde(rename = $text)] $variant, )+
        }

        impl $crate::config::value::Value for $name {
            fn describe(_: $crate::config::value::Rule) -> $crate::config::value::Description {
                let names = [$($text),+];
                $crate::config::value::Description {
                    short: names.join(" | "),
                    phrase: $crate::config::value::alternatives(&names),
                }
            }

            fn read(
                node: &$crate::config::source::Node,
                rule: $crate::config::value::Rule,
            ) -> Result<Self, $crate::config::error::Issues> {
                match node.text() {
                    $( Some($text) => Ok(Self::$variant), )+
                    _ => Err(vec![$crate::config::error::Issue::expected(
                        Self::describe(rule).phrase,
                        node.shown(),
                    )]),
                }
            }

            fn write(&self) -> String {
                match self {
                    $( Self::$variant => $text.to_owned(), )+
                }
            }
        }
    )+};
}
pub(super) use choices;
