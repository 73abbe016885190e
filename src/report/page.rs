//! The page of several runs: one file that loads nothing. Its data are columns of numbers, as `report.js` reads them.

use super::{
    Standing,
    rows::{self, Row},
    state::config_of,
};
use crate::page;
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, io};

const PAGE: &str = include_str!("report.html");
const STYLE: &str = include_str!("report.css");
const SCRIPT: &str = include_str!("report.js");

/// Points of a curve at most; more rows are joined.
const MOST_POINTS: usize = 1500;

/// Keys of a row that are no curve of their own.
const NO_CURVE: [&str; 8] =
    ["step", "steps", "total_steps", "epoch", "tokens", "tokens_total", "tokens_padding", "router"];

/// The page of `runs`, named `names`, made at `now` in seconds since the epoch.
///
/// # Errors
/// Metrics that cannot be read.
pub fn html(runs: &[Standing], names: &[String], now: u64) -> io::Result<String> {
    let read = |(run, name): (&Standing, &String)| -> io::Result<Value> {
        // The metrics of an output directory are those of its last run.
        let (rows, config) = match run.is_current {
            true => (rows::read(&run.output)?, config_of(&run.output)),
            false => (Vec::new(), Value::Null),
        };
        Ok(run_data(run, name, &rows, &config))
    };
    let runs: Vec<Value> = runs.iter().zip(names).map(read).collect::<io::Result<_>>()?;
    let data = json!({"version": env!("CARGO_PKG_VERSION"), "made": now, "runs": runs});
    // No text of a run ends the element that the data are in.
    let data = data.to_string().replace('<', "\\u003c");
    let script = one_script(&[page::NODES, page::CURVES, page::THEME, SCRIPT]);
    Ok(PAGE
        .replace("<!-- style -->", &format!("{}{STYLE}", page::STYLE))
        .replace("<!-- script -->", &script)
        .replace("<!-- data -->", &data))
}

/// Modules as one script: without their lines that import, and the word `export`. Each comes after those that it
/// imports.
fn one_script(modules: &[&str]) -> String {
    let line = |line: &&str| !line.starts_with("import ");
    let lines = modules.iter().flat_map(|module| module.lines().filter(line));
    lines.map(|line| format!("{}\n", line.strip_prefix("export ").unwrap_or(line))).collect()
}

/// A run as the page has it.
fn run_data(run: &Standing, name: &str, rows: &[Row], config: &Value) -> Value {
    let trained: Vec<&Row> = rows.iter().filter(|row| row.step > 0).collect();
    let sum = |key: &str| trained.iter().filter_map(|row| row.number(key)).sum::<f64>();
    let steps = trained.iter().map(|row| row.steps).sum::<usize>().max(1) as f64;
    let lowest = rows.iter().filter_map(|row| Some((row.number("eval_loss")?, row.step)));
    let lowest = lowest.min_by(|a, b| a.0.total_cmp(&b.0));
    let group = trained.len().div_ceil(MOST_POINTS).max(1);
    let axes = StepAxes::of(&trained);
    let evaluated = |row: &&Row| keys(row).iter().any(|key| key.starts_with("eval_"));
    let evaluations: Vec<&Row> = rows.iter().filter(evaluated).collect();
    let mut curves = BTreeMap::new();
    for key in trained.iter().flat_map(|row| keys(row)).filter(|key| !key.starts_with("eval_")) {
        curves.entry(key).or_insert_with_key(|key| means(&trained, group, key));
    }
    let mut evaluated = BTreeMap::new();
    for key in evaluations.iter().flat_map(|row| keys(row)).filter(|key| key.starts_with("eval_")) {
        evaluated.entry(key).or_insert_with_key(|key| means(&evaluations, 1, key));
    }
    let place = |step: usize| axes.at(step);
    json!({
        "name": name, "state": run.state.name(), "reason": run.reason, "step": run.step,
        "total_steps": run.total_steps, "loss": run.loss, "model": run.model,
        "best_eval": lowest.map(|(loss, step)| json!({"loss": loss, "step": step})),
        "total_tokens": sum("tokens_total") - sum("tokens_padding"), "total_seconds": sum("step_seconds"),
        "group": group,
        "steps": lasts(&trained, group).map(|row| row.step).collect::<Vec<_>>(),
        "tokens": lasts(&trained, group).map(|row| place(row.step).0).collect::<Vec<_>>(),
        "seconds": lasts(&trained, group).map(|row| place(row.step).1).collect::<Vec<_>>(),
        "curves": curves,
        "evaluations": {
            "steps": evaluations.iter().map(|row| row.step).collect::<Vec<_>>(),
            "tokens": evaluations.iter().map(|row| place(row.step).0).collect::<Vec<_>>(),
            "seconds": evaluations.iter().map(|row| place(row.step).1).collect::<Vec<_>>(),
            "curves": evaluated,
        },
        "phases": mean_parts(&trained, "phase_seconds", steps),
        "received": mean_parts(&trained, "comm_bytes", steps),
        "config": flat(config),
    })
}

/// Tokens without padding, and seconds in steps, up to each row.
struct StepAxes(Vec<(usize, f64, f64)>);

impl StepAxes {
    fn of(rows: &[&Row]) -> Self {
        let (mut tokens, mut seconds) = (0.0, 0.0);
        let place = |row: &&Row| {
            let number = |key: &str| row.number(key).unwrap_or(0.0);
            tokens += number("tokens_total") - number("tokens_padding");
            seconds += number("step_seconds");
            // Sums of unlike rows that are one time are one number.
            (row.step, tokens, (seconds * 1e3).round() / 1e3)
        };
        Self(rows.iter().map(place).collect())
    }

    /// Those of the last row up to `step`.
    fn at(&self, step: usize) -> (f64, f64) {
        let after = self.0.partition_point(|place| place.0 <= step);
        after.checked_sub(1).map_or((0.0, 0.0), |i| (self.0[i].1, self.0[i].2))
    }
}

/// The last row of every `group` rows.
fn lasts<'a>(rows: &'a [&Row], group: usize) -> impl Iterator<Item = &'a Row> {
    rows.chunks(group).filter_map(|rows| rows.last().copied())
}

/// Names of the curves that a row has a point of.
fn keys(row: &Row) -> Vec<String> {
    let Some(values) = row.values.as_object() else { return Vec::new() };
    let own = values.iter().filter(|(key, value)| value.is_number() && !NO_CURVE.contains(&key.as_str()));
    let mut keys: Vec<String> = own.map(|(key, _)| key.clone()).collect();
    if values.contains_key("comm_bytes") {
        keys.push(RECEIVED.to_owned());
    }
    let router = values.get("router").and_then(Value::as_object);
    keys.extend(router.into_iter().flat_map(Map::keys).map(|key| format!("router.{key}")));
    keys
}

/// The curve of the bytes of all operations together.
const RECEIVED: &str = "received_bytes";

/// A row's point of the curve `key`: of a step, where the row has a sum over several.
fn point(row: &Row, key: &str) -> Option<f64> {
    match key.split_once('.') {
        Some(("router", key)) => row.values["router"][key].as_f64(),
        _ if key == RECEIVED => {
            let bytes = row.values["comm_bytes"].as_object()?;
            Some(bytes.values().filter_map(Value::as_f64).sum::<f64>() / row.steps.max(1) as f64)
        }
        _ if key == "step_seconds" => Some(row.number(key)? / row.steps.max(1) as f64),
        _ => row.number(key),
    }
}

/// Means of the curve `key` over every `group` rows; null where none has a point.
fn means(rows: &[&Row], group: usize, key: &str) -> Vec<Option<f64>> {
    let mean = |rows: &[&Row]| {
        let points: Vec<f64> = rows.iter().filter_map(|row| point(row, key)).collect();
        (!points.is_empty()).then(|| points.iter().sum::<f64>() / points.len() as f64)
    };
    rows.chunks(group).map(mean).collect()
}

/// The numbers of the rows' objects `key`, by their own keys: their sums over `steps`.
fn mean_parts(rows: &[&Row], key: &str, steps: f64) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for (part, value) in rows.iter().filter_map(|row| row.values[key].as_object()).flatten() {
        *sums.entry(part.clone()).or_default() += value.as_f64().unwrap_or(0.0) / steps;
    }
    sums
}

/// The fields of a configuration by their full names.
fn flat(config: &Value) -> Map<String, Value> {
    let mut fields = Map::new();
    for (section, values) in config.as_object().into_iter().flatten() {
        for (key, value) in values.as_object().into_iter().flatten() {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            fields.insert(format!("{section}.{key}"), text.into());
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn row(values: Value) -> Row {
        let steps = values["steps"].as_u64().unwrap_or(1) as usize;
        Row { step: values["step"].as_u64().unwrap() as usize, steps, values }
    }

    fn data(rows: &[Row]) -> Value {
        run_data(
            &Standing::of_path("/x/a".into(), "run"),
            "a",
            rows,
            &json!({"train": {"lr": 0.5, "run_id": "r"}}),
        )
    }

    #[test]
    fn a_run_is_told_in_columns() {
        let rows = [
            json!({"step": 0, "eval_loss": 4.0}),
            json!({"step": 1, "loss": 3.0, "tokens": 7, "tokens_total": 10, "tokens_padding": 2, "step_seconds": 2.0,
                "phase_seconds": {"forward": 1.5}, "comm_bytes": {"all_gather/shard": 30, "all_reduce/world": 10}}),
            json!({"step": 5, "steps": 4, "loss": null, "tokens_total": 40, "tokens_padding": 8, "step_seconds": 4.0,
                "phase_seconds": {"forward": 1.0, "loss": 0.5}, "comm_bytes": {"all_gather/shard": 120},
                "router": {"entropy": 0.5}, "eval_loss": 2.0, "eval_accuracy": 0.25}),
        ];
        let data = data(&rows.map(row));
        assert_eq!(data["steps"], json!([1, 5]));
        assert_eq!((&data["tokens"], &data["seconds"]), (&json!([8.0, 40.0]), &json!([2.0, 6.0])));
        assert_eq!(
            data["curves"],
            json!({"loss": [3.0, null], "received_bytes": [40.0, 30.0], "router.entropy": [null, 0.5],
                "step_seconds": [2.0, 1.0]})
        );
        assert_eq!(
            data["evaluations"],
            json!({"steps": [0, 5], "tokens": [0.0, 40.0], "seconds": [0.0, 6.0],
                "curves": {"eval_accuracy": [null, 0.25], "eval_loss": [4.0, 2.0]}})
        );
        assert_eq!(data["phases"], json!({"forward": 0.5, "loss": 0.1}));
        assert_eq!(data["received"], json!({"all_gather/shard": 30.0, "all_reduce/world": 2.0}));
        assert_eq!(data["best_eval"], json!({"loss": 2.0, "step": 5}));
        assert_eq!(data["config"], json!({"train.lr": "0.5", "train.run_id": "r"}));
    }

    #[test]
    fn rows_of_a_long_run_are_joined() {
        let rows: Vec<Row> =
            (1..=2 * MOST_POINTS + 1).map(|step| row(json!({"step": step, "loss": step}))).collect();
        let data = data(&rows);
        assert_eq!(data["group"], 3);
        let points = data["steps"].as_array().unwrap();
        assert_eq!((points.len(), &points[0]), ((2 * MOST_POINTS + 1).div_ceil(3), &json!(3)));
        assert_eq!(points.last().unwrap(), 2 * MOST_POINTS + 1);
        assert_eq!(data["curves"]["loss"][0], 2.0);
    }

    #[test]
    fn the_page_is_one_file_and_its_names_do_not_clash() {
        let script = one_script(&[page::NODES, page::CURVES, page::THEME, SCRIPT]);
        assert!(!script.contains("import") && !script.contains("export"), "{script}");
        let mut names = BTreeSet::new();
        for line in script.lines() {
            let name =
                ["function ", "const ", "class ", "let "].iter().find_map(|word| line.strip_prefix(word));
            let name = name.and_then(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '$').next());
            if let Some(name) = name.filter(|name| !name.is_empty()) {
                assert!(names.insert(name), "{name} is declared twice");
            }
        }
        let mut run = Standing::of_path("/x/a".into(), "run");
        run.reason = Some("</script><b>".into());
        let page = html(&[run], &["<!-- script -->".into()], 0).unwrap();
        assert!(!page.contains("</script><b>") && !page.contains("<!-- data -->"));
        assert_eq!(page.matches("<script").count(), 2);
        let elsewhere = page.replace("http://www.w3.org/", "");
        assert!(
            !elsewhere.contains("http:") && !elsewhere.contains("https:") && !elsewhere.contains("@import")
        );
    }
}
