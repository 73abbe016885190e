//! The lines of metrics.jsonl.

use crate::{regular_file, train::metrics::METRICS_FILE};
use serde_json::Value;
use std::{io, path::Path};

/// A line of metrics.jsonl: a step, or several of which it is the last. It may lack any key.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The last step of the line, from 1; 0 is an evaluation before training.
    pub step: usize,
    /// Steps of the line.
    pub steps: usize,
    pub values: Value,
}

impl Row {
    /// A number of the line.
    pub fn number(&self, key: &str) -> Option<f64> {
        self.values[key].as_f64()
    }
}

/// The lines of `output`, each step once, ascending; none where there is no file. A line that is torn, as of a run that
/// writes it or was killed, is left out. Where steps begin anew, the later lines count.
///
/// # Errors
/// A file that cannot be read.
pub fn read(output: &Path) -> io::Result<Vec<Row>> {
    match regular_file::read(&output.join(METRICS_FILE)) {
        Ok(text) => Ok(parse(&text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn parse(text: &[u8]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for line in text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n")) {
        let Ok(values) = serde_json::from_slice::<Value>(line) else { continue };
        let count = |key: &str| values[key].as_u64().and_then(|count| usize::try_from(count).ok());
        let Some(step) = count("step") else { continue };
        let steps = count("steps").unwrap_or(1);
        while rows.last().is_some_and(|last| last.step >= step) {
            rows.pop();
        }
        rows.push(Row { step, steps, values });
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_and_foreign_lines_are_left_out_and_later_lines_win() {
        let steps = |text: &str| parse(text.as_bytes()).iter().map(|row| row.step).collect::<Vec<_>>();
        let line = |step: usize| format!("{{\"step\":{step}}}\n");
        assert_eq!(steps(""), [0; 0]);
        assert_eq!(steps(&(line(0) + &line(1) + "{\"step\":2,\"lo")), [0, 1]);
        assert_eq!(steps(&(line(1) + line(2).trim_end())), [1]);
        assert_eq!(steps(&(line(1) + "\0\0\n[]\n{\"step\":\"x\"}\n" + &line(2))), [1, 2]);
        assert_eq!(steps(&(line(1) + &line(2) + &line(3) + &line(2))), [1, 2]);
        let rows = parse(b"{\"step\":8,\"steps\":4,\"loss\":0.5}\n{\"step\":9,\"loss\":null}\n");
        assert_eq!((rows[0].steps, rows[0].number("loss")), (4, Some(0.5)));
        assert_eq!((rows[1].steps, rows[1].number("loss")), (1, None));
    }
}
