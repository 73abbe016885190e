//! Runs as a table for a terminal.

use super::Standing;

/// The table of `runs`, named `names`, as of `now` in seconds since the epoch: a line each, below it the reason of one
/// that failed.
pub fn table(runs: &[Standing], names: &[String], now: u64) -> String {
    let heads = ["RUN", "STATE", "STEP", "LOSS", "EVAL", "BEST", "AGE", "MODEL"].map(str::to_owned);
    let lines: Vec<[String; 8]> = std::iter::once(heads)
        .chain(runs.iter().zip(names).map(|(run, name)| cells(run, name, now)))
        .collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..7).map(width).collect();
    let mut text = String::new();
    for (i, line) in lines.iter().enumerate() {
        let mut row = String::new();
        for (cell, &width) in line.iter().zip(widths.iter().chain([&0])) {
            row += &format!("{cell:<width$}  ");
        }
        text += row.trim_end();
        text.push('\n');
        let reason = i.checked_sub(1).and_then(|i| runs[i].reason.as_deref());
        if let Some(reason) = reason {
            text += &format!("  {reason}\n");
        }
    }
    text
}

fn cells(run: &Standing, name: &str, now: u64) -> [String; 8] {
    let dash = || "-".to_owned();
    let number = |value: Option<f64>| value.map_or_else(dash, |value| format!("{value:.4}"));
    let count = |value: Option<usize>| value.map_or_else(dash, |value| value.to_string());
    let step = match run.total_steps {
        Some(total) => format!("{}/{total}", run.step.unwrap_or(0)),
        None => count(run.step),
    };
    // The last part of a path is the name of a model.
    let model = run.model.as_deref().and_then(|path| path.trim_end_matches('/').rsplit('/').next());
    [
        name.to_owned(),
        run.state.name().to_owned(),
        step,
        number(run.loss),
        number(run.eval_loss),
        count(run.best_step),
        run.updated.map_or_else(dash, |time| age(now.saturating_sub(time))),
        model.map_or_else(dash, str::to_owned),
    ]
}

/// `12 s`, `5 min`, `3 h` or `9 d`.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::State;

    #[test]
    fn a_table_has_a_line_a_run_and_the_reason_of_one_that_failed() {
        let run = Standing {
            state: State::Failed,
            reason: Some("the disk is full".into()),
            step: Some(40),
            total_steps: Some(100),
            loss: Some(1.23456),
            best_step: Some(20),
            updated: Some(1000),
            model: Some("/models/org/base/".into()),
            ..Standing::of_path("/x/a".into(), "run")
        };
        let empty = Standing::of_path("/x/longer".into(), "run");
        let text = table(&[run, empty], &["a".into(), "longer".into()], 1000 + 7200);
        let expected = "\
            RUN     STATE        STEP    LOSS    EVAL  BEST  AGE  MODEL\n\
            a       failed       40/100  1.2346  -     20    2 h  base\n\
            \x20 the disk is full\n\
            longer  interrupted  -       -       -     -     -    -\n";
        assert_eq!(text, expected);
        assert_eq!([5, 65, 7300, 999_999].map(age), ["5 s", "1 min", "2 h", "11 d"]);
    }
}
