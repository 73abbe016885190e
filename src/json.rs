//! Faults of JSON files in words.

/// Numbers that Python writes and reads, and JSON does not have.
const NOT_JSON: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

/// The fault that the reader found in `bytes`, with its place. A number that JSON lacks is named.
pub fn problem(bytes: &[u8], error: &serde_json::Error) -> String {
    let line = bytes.split(|&byte| byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    // The reader stops at the number, or behind its sign or first letter.
    let word = (0..=error.column().min(line.len()))
        .rev()
        .take(3)
        .find_map(|at| NOT_JSON.into_iter().find(|word| line[at..].starts_with(word.as_bytes())));
    match word {
        Some(word) => format!("{word} is not JSON; write a number (line {})", error.line()),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::problem;

    #[test]
    fn numbers_that_json_lacks_are_named() {
        for (text, words) in [
            ("NaN", "NaN is not JSON; write a number (line 1)"),
            ("{\"a\": [1, NaN, 2]}", "NaN is not JSON; write a number (line 1)"),
            ("{\n  \"a\": Infinity\n}", "Infinity is not JSON; write a number (line 2)"),
            ("{\n  \"a\":\n  -Infinity\n}", "Infinity is not JSON; write a number (line 3)"),
            ("{\"a\": \"NaN\", \"b\": x}", "expected value at line 1 column 19"),
            ("", "EOF while parsing a value at line 1 column 0"),
        ] {
            let error = serde_json::from_str::<serde_json::Value>(text).unwrap_err();
            let said = problem(text.as_bytes(), &error);
            assert!(said.ends_with(words), "{text:?}: {said}");
        }
    }
}
