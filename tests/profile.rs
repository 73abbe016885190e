//! `train.profile_steps`: the trace of every rank holds what the metrics say, nests, and changes nothing.

use crate::common::{
    metrics, succeeded,
    tiny::{TinyRun, differences},
};
use serde_json::Value;
use std::{collections::BTreeMap, fs};

/// A save lies between the traced steps, 3 and 4.
const RUN: [&str; 4] = ["--train.max_steps", "5", "--train.save_steps", "3"];
/// Microseconds that are lost where a time is written as a float.
const ROUNDING: f64 = 1e-2;

/// A span or a transfer.
#[derive(Debug)]
struct Event {
    category: String,
    name: String,
    begin: f64,
    end: f64,
    arguments: Value,
}

impl Event {
    fn is(&self, category: &str) -> bool {
        self.category == category
    }

    fn contains(&self, other: &Event) -> bool {
        self.begin - ROUNDING <= other.begin && other.end <= self.end + ROUNDING
    }
}

/// The spans of a rank's trace, and its transfers.
fn events(run: &TinyRun, out: &str, rank: usize) -> (Vec<Event>, Vec<Event>) {
    let path = run.at(out).join(format!("trace/run/rank_{rank}.json"));
    let trace: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let all = trace["traceEvents"].as_array().unwrap();
    let named = all.iter().find(|event| event["name"] == "process_name").unwrap();
    assert_eq!(named["args"]["name"], format!("rank {rank}"));
    assert!(all.iter().all(|event| event["pid"] == rank));
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} in a time's place"));
    let event = |line: &Value, end: f64| Event {
        category: line["cat"].as_str().unwrap().into(),
        name: line["name"].as_str().unwrap().into(),
        begin: number(&line["ts"]),
        end,
        arguments: line["args"].clone(),
    };
    let of = |ph: &'static str| all.iter().filter(move |line| line["ph"] == ph);
    let spans = of("X").map(|line| event(line, number(&line["ts"]) + number(&line["dur"])));
    let ended = |id: &Value| of("e").find(|line| line["id"] == *id).unwrap();
    let transfers = of("b").map(|line| event(line, number(&ended(&line["id"])["ts"])));
    (spans.collect(), transfers.collect())
}

/// Any two spans are one inside the other or apart.
fn nest(spans: &[Event]) {
    let mut sorted: Vec<&Event> = spans.iter().collect();
    sorted.sort_by(|a, b| a.begin.total_cmp(&b.begin).then(b.end.total_cmp(&a.end)));
    let mut open: Vec<&Event> = Vec::new();
    for event in sorted {
        while open.pop_if(|outer| outer.end <= event.begin + ROUNDING).is_some() {}
        if let Some(outer) = open.last() {
            assert!(outer.contains(event), "{event:?} begins in {outer:?} and ends outside");
        }
        open.push(event);
    }
}

/// Holds one rank's trace against the metrics of the steps in it; returns the step spans.
fn check(spans: Vec<Event>, transfers: &[Event], metrics: &[Value]) -> Vec<Event> {
    nest(&spans);
    let (steps, spans): (Vec<Event>, Vec<Event>) = spans.into_iter().partition(|event| event.is("step"));
    let numbers: Vec<_> = steps.iter().map(|event| event.arguments["step"].as_u64().unwrap()).collect();
    assert_eq!(numbers, [3, 4]);
    let saves: Vec<&Event> = spans.iter().filter(|event| event.name == "save").collect();
    let [save] = saves[..] else { panic!("not one save: {saves:?}") };
    assert!(steps[0].end <= save.begin && save.end <= steps[1].begin);
    for event in spans.iter().chain(transfers) {
        let places = steps.iter().chain([save]).filter(|place| place.contains(event)).count();
        assert_eq!(places, 1, "{event:?}");
    }
    for (step, line) in steps.iter().zip(&metrics[2..]) {
        let inside = || spans.iter().filter(|event| step.contains(event));
        for (phase, seconds) in line["phase_seconds"].as_object().unwrap() {
            assert!(inside().any(|event| event.is("phase") && event.name == *phase), "{phase}: {seconds}");
        }
        let forward = ["linear", "attention", "norm", "rope", "swiglu"].map(|of| format!("{of}.forward"));
        let backward = ["attention", "norm", "rope", "swiglu"].map(|of| format!("{of}.backward"));
        let linear = ["linear.backward_input", "linear.backward_parameters"].map(str::to_owned);
        let forward = forward.into_iter().map(|name| ("layer.forward", name));
        let backward = backward.into_iter().chain(linear).map(|name| ("layer.backward", name));
        for (layer, name) in forward.chain(backward) {
            let layers = || inside().filter(|event| event.name == layer);
            let found = inside().any(|event| event.name == name && layers().any(|l| l.contains(event)));
            assert!(found, "{name} in no {layer}");
        }
        for operation in ["cross_entropy.add_rows", "optimizer.step"] {
            assert!(inside().any(|event| event.name == operation && event.is("operation")), "{operation}");
        }
        let mut received = BTreeMap::new();
        for event in inside().chain(transfers.iter().filter(|event| step.contains(event))) {
            if let Some(bytes) = event.arguments["bytes"].as_u64() {
                assert!(event.is("collective"), "{event:?}");
                let group = event.arguments["group"].as_str().unwrap();
                *received.entry(format!("{}/{group}", event.name)).or_default() += bytes;
            }
        }
        let counted: BTreeMap<String, u64> = serde_json::from_value(line["comm_bytes"].clone()).unwrap();
        assert_eq!(received, counted);
        assert!(!counted.is_empty());
    }
    steps
}

#[test]
fn mpi_traces_hold_what_the_metrics_say_and_change_nothing() {
    let run = TinyRun::new();
    // Two shards gather and reduce-scatter; two replicas all-reduce.
    for (name, replicas) in [("shards", "1"), ("replicas", "2")] {
        let mesh = ["--train.data_parallel_replicate_size", replicas];
        let plain = format!("{name} plain");
        succeeded(&run.run(2, &plain, &[&RUN[..], &mesh].concat()));
        assert!(!run.at(&plain).join("trace").exists());
        // What an earlier run of more ranks has left.
        fs::create_dir_all(run.at(name).join("trace/run")).unwrap();
        fs::write(run.at(name).join("trace/run/rank_7.json"), "{}").unwrap();
        let output = run.run(2, name, &[&RUN[..], &mesh, &["--train.profile_steps", "2"]].concat());
        succeeded(&output);

        assert_eq!(run.story(name), run.story(&plain));
        for step in [3, 5] {
            let different = differences(&run.step(&plain, step), &run.step(name, step));
            assert!(different.is_empty(), "{different:?}");
        }
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(said.matches("traced steps 3 to 4: ").count(), 1, "{said}");

        let metrics = metrics(&run.at(name));
        let [first, second] = [0, 1].map(|rank| {
            let (spans, transfers) = events(&run, name, rank);
            check(spans, &transfers, &metrics)
        });
        // A step ends with a collective of all ranks, so no rank leaves one before all are in it.
        for (a, b) in first.iter().zip(&second) {
            assert!(a.begin.max(b.begin) < a.end.min(b.end), "{a:?} beside {b:?}");
        }
        let mut files: Vec<_> = fs::read_dir(run.at(name).join("trace/run"))
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(files, ["rank_0.json", "rank_0.txt", "rank_1.json", "rank_1.txt"]);
        let table = fs::read_to_string(run.at(name).join("trace/run/rank_0.txt")).unwrap();
        assert!(table.contains("linear.backward") && table.contains("all_reduce_host"), "{table}");
    }
}

#[test]
fn a_short_run_traces_what_it_has_or_says_that_it_has_nothing() {
    let run = TinyRun::new();
    let of = |out: &str, steps: &str| {
        let output = run.run(1, out, &["--train.max_steps", steps, "--train.profile_steps", "9"]);
        succeeded(&output);
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let said = of("three", "3");
    assert!(said.contains("traced steps 3 to 3: "), "{said}");
    let (spans, transfers) = events(&run, "three", 0);
    assert!(spans.iter().any(|event| event.is("step")) && transfers.is_empty());
    let said = of("two", "2");
    assert!(said.contains("nothing is traced in 2 steps") && !run.at("two").join("trace").exists(), "{said}");
}

#[test]
fn a_trace_that_cannot_be_written_ends_the_run_with_one_line() {
    let run = TinyRun::new();
    fs::create_dir_all(run.at("out")).unwrap();
    fs::write(run.at("out").join("trace"), "").unwrap();
    let output = run.run(1, "out", &["--train.profile_steps", "1"]);
    let line = crate::common::failed(&output, 1);
    assert!(line.contains("out/trace/run: cannot write the trace"), "{line}");
}
