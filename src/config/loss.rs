//! Parameters of a loss, as clients and `train.loss_fn_params` give them.

use super::error::{Issue, Issues};
use super::source::{Kind, Node};
use super::value::{Description, Rule, Value, quote};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// A number or a text of a loss's parameters. A truth value is the number 0 or 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, from = "Given")]
pub enum Param {
    Number(f64),
    Text(String),
}

/// The forms in which a [`Param`] is read.
#[derive(Deserialize)]
#[serde(untagged)]
enum Given {
    Flag(bool),
    Number(f64),
    Text(String),
}

impl From<Given> for Param {
    fn from(given: Given) -> Self {
        match given {
            Given::Flag(flag) => Self::Number(f64::from(u8::from(flag))),
            Given::Number(number) => Self::Number(number),
            Given::Text(text) => Self::Text(text),
        }
    }
}

impl fmt::Display for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

impl Param {
    fn of(node: &Node) -> Option<Self> {
        let Kind::Scalar { text, quoted } = &node.kind else { return None };
        Some(match (text.parse::<f64>(), text.as_str()) {
            (Ok(number), _) if !quoted => Self::Number(number),
            (_, "true") if !quoted => Self::Number(1.0),
            (_, "false") if !quoted => Self::Number(0.0),
            _ => Self::Text(text.clone()),
        })
    }
}

/// Parameters by name; those that are null are left out.
impl Value for BTreeMap<String, Param> {
    fn describe(_: Rule) -> Description {
        Description {
            short: "map of numbers and names".into(),
            phrase: "a mapping of parameters, {eps_clip: 0.1}".into(),
        }
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        let entries = match &node.kind {
            Kind::Map(entries) => entries,
            _ if node.is_null() => return Ok(Self::new()),
            _ => return Err(vec![Issue::expected(Self::describe(rule).phrase, node.shown())]),
        };
        let (mut params, mut issues) = (Self::new(), Issues::new());
        for entry in entries.iter().filter(|entry| !entry.value.is_null()) {
            match Param::of(&entry.value) {
                Some(param) => drop(params.insert(entry.key.clone(), param)),
                None => issues.push(
                    Issue::expected("a number, true, false or a name", entry.value.shown())
                        .inside(&format!(".{}", entry.key), entry.line),
                ),
            }
        }
        if issues.is_empty() { Ok(params) } else { Err(issues) }
    }

    fn write(&self) -> String {
        let entry = |(name, param): (&String, &Param)| match param {
            Param::Number(number) => format!("{}: {}", quote(name), number.write()),
            Param::Text(text) => format!("{}: {}", quote(name), quote(text)),
        };
        format!("{{{}}}", self.iter().map(entry).collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::source::parse_yaml;

    fn read(text: &str) -> Result<BTreeMap<String, Param>, Issues> {
        BTreeMap::read(&parse_yaml(text).unwrap().root, Rule::Any)
    }

    #[test]
    fn parameters_are_numbers_truth_values_and_names() {
        let params = read("{a: 0.5, b: true, c: k1, d: null, e: '7'}").unwrap();
        let text = |text: &str| Param::Text(text.into());
        let expected =
            [("a", Param::Number(0.5)), ("b", Param::Number(1.0)), ("c", text("k1")), ("e", text("7"))];
        assert_eq!(params, expected.map(|(name, param)| (name.to_owned(), param)).into());
        assert_eq!(read(&params.write()).unwrap(), params);
        assert_eq!(serde_yaml::from_str::<BTreeMap<String, Param>>(&params.write()).unwrap(), params);
        assert_eq!(read("{}").unwrap().write(), "{}");
        assert_eq!(read("{a: [1]}").unwrap_err()[0].suffix, ".a");
        assert!(read("[1]").is_err());
    }
}
