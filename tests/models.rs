//! Every model configuration and checkpoint computes what transformers makes of it, or is refused in a line that names
//! the reason: the fields of every family's config class, changed and absent; rope types and their spellings; names,
//! files and formats of weights. tests/oracle/models.py makes the cases and their right values.

use crate::common::python;
use serde_json::{Map, Value};
use std::{
    io::Write,
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
};
use tch::Device;
use xorl_dist::{
    comm::World,
    model::{
        base_plan::Options,
        family::FAMILIES,
        hf_config::{HfModel, known},
        stored_base,
        transformer::{Batch, Transformer},
    },
    shard::ProcessGroups,
};

/// Distance of logits from those of transformers, both in fp32.
const NEAR: f64 = 1e-4;

/// Text of the warnings of this thread.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<u8>>>);

impl Write for Warnings {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Result of `work`, and the text of its warnings.
fn with_warnings<T>(work: impl FnOnce() -> T) -> (T, String) {
    let warnings = Warnings::default();
    let sink = warnings.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_ansi(false)
        .with_writer(move || sink.clone())
        .finish();
    let result = tracing::subscriber::with_default(subscriber, work);
    let text = String::from_utf8(warnings.0.lock().unwrap().clone()).unwrap();
    (result, text)
}

/// Lets transformers write cases and defaults.
fn oracle() -> tempfile::TempDir {
    let out = tempfile::tempdir().unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/models.py");
    let status = Command::new(python()).arg(script).arg(out.path()).env("HF_HUB_OFFLINE", "1").status();
    assert!(status.expect("launch/setup.sh makes .venv").success());
    out
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn object(value: &Value) -> &Map<String, Value> {
    value.as_object().unwrap()
}

fn words(case: &Value, list: &str) -> Vec<String> {
    case[list].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
}

/// Logits of the documents, one after another.
fn logits(case: &Value, documents: &[Vec<i64>], groups: &ProcessGroups) -> Result<Vec<f32>, String> {
    let path = Path::new("config.json");
    let mut spec =
        HfModel::parse(path, object(&case["config"]).clone()).map_err(|error| error.to_string())?.spec;
    let weights = Path::new(case["weights"].as_str().unwrap());
    let source = stored_base::open(weights, &mut spec).map_err(|error| error.to_string())?;
    let mut model = Transformer::new(spec, Options::default(), groups).unwrap();
    model.load(&source).unwrap();
    let lengths: Vec<usize> = documents.iter().map(Vec::len).collect();
    let ids = documents.concat();
    let logits = model.logits(&Batch::new(&ids, &ids, &lengths, Device::Cpu), &mut []).unwrap();
    Ok(Vec::try_from(logits.view([-1])).unwrap())
}

/// The logits of transformers, if it gave any.
fn theirs(case: &Value) -> Option<Vec<f64>> {
    let documents = case["logits"].as_array()?.iter();
    let numbers = documents.flat_map(|document| document.as_array().unwrap());
    Some(numbers.map(|number| number.as_f64().unwrap_or(f64::NAN)).collect())
}

fn distance<A: Copy + Into<f64>>(a: &[A], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| (a.into() - b).abs()).fold(0.0, f64::max)
}

/// The reason why the case is not as it should be, if it is not.
fn fault(case: &Value, ours: &Result<Vec<f32>, String>, warnings: &str) -> Option<String> {
    let expected = case["expect"].as_str().unwrap();
    match (ours, theirs(case)) {
        (Ok(_), _) if expected == "refused" => Some("should be refused".to_owned()),
        (Ok(_), None) => Some(format!("is loaded, but not by transformers: {}", case["error"])),
        (Ok(ours), Some(theirs)) => {
            let off = distance(ours, &theirs);
            if off.is_nan() || off > NEAR {
                return Some(format!("logits are {off} apart"));
            }
            let warns = words(case, "warns");
            let expects_none = warns.is_empty() && expected == "same" && !warnings.is_empty();
            let lacks = warns.iter().find(|word| !warnings.contains(*word));
            (expects_none || lacks.is_some()).then(|| format!("warnings {warnings:?}, expected {warns:?}"))
        }
        (Err(line), _) if expected == "same" => Some(format!("is refused: {line}")),
        (Err(line), _) => {
            let lacks = words(case, "words").into_iter().find(|word| !line.contains(word));
            let fault = lacks.map(|word| format!("{word:?} is not in {line}"));
            fault.or_else(|| line.contains('\n').then(|| format!("more than a line: {line}")))
        }
    }
}

#[test]
fn python_configs_and_checkpoints_are_what_transformers_makes_of_them_or_refused() {
    let out = oracle();
    absent_fields_are_as_in_transformers(&read(&out.path().join("defaults.json")));
    let read = read(&out.path().join("cases.json"));
    ends_are_as_in_transformers(&read["ends"]);
    let documents: Vec<Vec<i64>> = serde_json::from_value(read["documents"].clone()).unwrap();
    let world = World::start().unwrap();
    let groups = ProcessGroups::one_block(&world);
    let (mut faults, mut loaded, mut base) = (Vec::new(), 0, None);
    let cases = read["cases"].as_array().unwrap();
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let (ours, warnings) = with_warnings(|| logits(case, &documents, &groups));
        loaded += usize::from(ours.is_ok());
        faults.extend(fault(case, &ours, &warnings).map(|fault| format!("{name}: {fault}")));
        if name.ends_with(": as it is") {
            base = theirs(case);
        }
        // A field that is on the list has no effect in transformers either.
        for field in words(case, "fields").iter().filter(|field| known::harmless(field).is_some()) {
            let family = FAMILIES.iter().find(|family| case["config"]["model_type"] == family.model_type);
            if family.unwrap().reads(field) {
                continue;
            }
            let (theirs, base) = (theirs(case).unwrap(), base.as_ref().unwrap());
            assert!(ours.is_ok() && distance(&theirs, base) == 0.0, "{name}: {field} has an effect");
        }
    }
    println!("{} cases, {loaded} loaded, {} refused", cases.len(), cases.len() - loaded);
    assert!(faults.is_empty(), "{} of {} cases:\n{}", faults.len(), cases.len(), faults.join("\n"));
    assert!(cases.len() > 400 && loaded > 200, "{loaded} of {} cases", cases.len());
}

/// Holds the tokens that end a generation against transformers', or the refusal of a wrong type.
fn ends_are_as_in_transformers(folders: &Value) {
    for case in folders.as_array().unwrap() {
        let folder = case["folder"].as_str().unwrap();
        let ours = HfModel::open(Path::new(folder));
        match &case["right"] {
            Value::Null => {
                let line = ours.unwrap_err().to_string();
                assert!(line.contains("generation_config.json: eos_token_id: expected an id"), "{line}");
            }
            right => assert_eq!(Value::from(ours.unwrap().end_token_ids), *right, "{folder}"),
        }
    }
}

/// Holds the values of absent fields against the defaults of transformers' config classes.
fn absent_fields_are_as_in_transformers(defaults: &Value) {
    for family in FAMILIES {
        let name = family.model_type;
        let theirs = object(&defaults[name]["fields"]);
        assert_eq!(defaults[name]["rope_theta"], family.rope_theta, "{name}");
        for (field, value) in theirs {
            let own = family.absent_fields().find(|(own, _)| own == field).map(|(_, absent)| absent.value());
            let neutral = known::NEUTRAL.iter().find(|(own, _)| own == field);
            let ours = own.or(neutral.map(|(_, values)| serde_json::from_str(values[0]).unwrap()));
            match ours {
                Some(ours) => assert_eq!(ours, *value, "{name}: {field}"),
                None => assert!(
                    known::harmless(field).is_some() || ["dtype", "rope_parameters"].contains(&&field[..]),
                    "{name}: {field} is not known"
                ),
            }
        }
        for (field, absent) in family.absent_fields().filter(|(field, _)| !theirs.contains_key(*field)) {
            assert!(absent.value().is_null(), "{name}: transformers' class has no {field}");
        }
    }
}
