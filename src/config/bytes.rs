//! A number of bytes with its unit, `10TB`.

use super::error::{Issue, Issues};
use super::source::Node;
use super::value::{Description, Rule, Value};
use std::fmt;

/// A number of bytes. As xorl has it, units are powers of 1024: 1KB is 1024 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

/// A text that is no number of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {EXPECTED}, got {0:?}")]
pub struct ByteSizeError(String);

const EXPECTED: &str = "a number of bytes of at least 1, such as 500MB or 10TB";

/// Each unit with its power of 1024.
const UNITS: [(&str, u32); 5] = [("TB", 4), ("GB", 3), ("MB", 2), ("KB", 1), ("B", 0)];

impl ByteSize {
    /// Reads `10TB`, `1.5 GiB`, `64m` or `1048576`.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let unit = unit.trim().to_ascii_uppercase();
        let power = match unit.as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 1,
            "M" | "MB" | "MIB" => 2,
            "G" | "GB" | "GIB" => 3,
            "T" | "TB" | "TIB" => 4,
            _ => return None,
        };
        let unit = 1024_u64.pow(power);
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(unit)?,
            // Fractions of a unit are exact enough: no limit is meant to the byte.
            Err(_) => (number.parse::<f64>().ok()? * unit as f64) as u64,
        };
        (1..u64::MAX).contains(&bytes).then_some(Self(bytes))
    }
}

impl fmt::Display for ByteSize {
    /// In the largest unit of which it is a whole number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |(_, power): &&(&str, u32)| self.0.is_multiple_of(1024_u64.pow(*power));
        let (unit, power) = UNITS.iter().find(whole).unwrap_or(&("B", 0));
        write!(f, "{}{unit}", self.0 / 1024_u64.pow(*power))
    }
}

impl TryFrom<String> for ByteSize {
    type Error = ByteSizeError;

    fn try_from(text: String) -> Result<Self, ByteSizeError> {
        Self::parse(&text).ok_or(ByteSizeError(text))
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

impl Value for ByteSize {
    fn describe(_: Rule) -> Description {
        Description { short: "bytes".into(), phrase: EXPECTED.into() }
    }

    fn read(node: &Node, rule: Rule) -> Result<Self, Issues> {
        let size = node.text().and_then(Self::parse);
        size.ok_or_else(|| vec![Issue::expected(Self::describe(rule).phrase, node.shown())])
    }

    fn write(&self) -> String {
        self.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024_in_every_spelling() {
        for (text, bytes) in [
            ("1", 1),
            ("1024B", 1024),
            ("100KB", 102_400),
            ("500mb", 524_288_000),
            ("500 M", 524_288_000),
            ("1GB", 1_073_741_824),
            ("1.5GiB", 1_610_612_736),
            ("10TB", 10_995_116_277_760),
        ] {
            assert_eq!(ByteSize::parse(text), Some(ByteSize(bytes)), "{text}");
        }
        for text in
            ["", "0", "GB", "-1GB", "1PB", "1.2.3GB", "1e9", "a lot", "99999999999TB", "18446744073709551616"]
        {
            assert_eq!(ByteSize::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_size_reads_back_as_it_was_written() {
        for (bytes, text) in
            [(1, "1B"), (1025, "1025B"), (10 << 40, "10TB"), (3 << 20, "3MB"), (1536, "1536B")]
        {
            assert_eq!(ByteSize(bytes).to_string(), text);
            assert_eq!(ByteSize::try_from(text.to_owned()), Ok(ByteSize(bytes)));
        }
    }
}
