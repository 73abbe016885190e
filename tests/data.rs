//! The data room through its front door: files in, rows out, with packing, order, the cache and the loader.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use serde_json::json;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tempfile::TempDir;
use xorl_dist::{
    config::{DataArgs, DatasetArgs, DatasetType, PackingMethod},
    data::{
        DataError, Dataset, Loader, Row, StepPlan,
        schedule::{self, BatchSplit},
    },
};

fn write(dir: &Path, name: &str, lines: &[&str]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn entry(path: impl Into<PathBuf>, kind: DatasetType) -> DatasetArgs {
    DatasetArgs { path: path.into(), kind, num_samples: None }
}

/// A sample a row in the order of the files.
fn plain(datasets: Vec<DatasetArgs>) -> DataArgs {
    DataArgs {
        datasets,
        sample_packing_method: PackingMethod::None,
        shuffle_merged_datasets: false,
        shuffle_before_merging_datasets: false,
        ..DataArgs::default()
    }
}

fn tokenized(dir: &TempDir, lines: &[&str]) -> DataArgs {
    plain(vec![entry(write(dir.path(), "data.jsonl", lines), DatasetType::Tokenized)])
}

/// A file of `count` samples: sample i has `1 + i % 7` tokens of id i.
fn numbered(dir: &TempDir, name: &str, range: std::ops::Range<usize>) -> PathBuf {
    let lines: Vec<String> = range.map(|i| json!({ "input_ids": vec![i; 1 + i % 7] }).to_string()).collect();
    write(dir.path(), name, &lines.iter().map(String::as_str).collect::<Vec<_>>())
}

fn all_rows(dataset: &Dataset, epoch: usize) -> Vec<Row> {
    (0..dataset.rows()).map(|position| dataset.row_at(epoch, position).unwrap()).collect()
}

/// The documents of rows, sorted, without padding of id 999.
fn documents(rows: &[Row]) -> Vec<Vec<i64>> {
    let mut found = Vec::new();
    for row in rows {
        let mut rest = &row.input_ids[..];
        for &length in &row.document_lengths {
            let (document, tail) = rest.split_at(length);
            found.push(document.to_vec());
            rest = tail;
        }
    }
    found.retain(|document| document[0] != 999);
    found.sort();
    found
}

#[test]
fn bad_lines_name_file_and_line() {
    let dir = TempDir::new().unwrap();
    let good = r#"{"input_ids": [1, 2]}"#;
    for (bad, expected) in [
        (r#"{"input_ids": [1,"#, "data.jsonl:3: not valid JSON at column 17"),
        (r#"{"labels": [1]}"#, "data.jsonl:3: expected field `input_ids`, found `labels`"),
        (r#"{"input_ids": "x"}"#, "data.jsonl:3: input_ids: expected a list of integers, got \"x\""),
        (
            r#"{"input_ids": [1], "labels": []}"#,
            "data.jsonl:3: labels: expected 1 values like input_ids, got 0",
        ),
        (
            r#"{"input_ids": [10]}"#,
            "data.jsonl:3: input_ids[0]: token id 10 is not in the model's vocabulary of 10",
        ),
        (r#"{"input_ids": []}"#, "data.jsonl:3: expected at least one token, found none"),
    ] {
        let error = Dataset::open(&tokenized(&dir, &[good, "", bad, good]), None, 10, 0, 1).unwrap_err();
        assert!(error.is_input() && error.to_string().contains(expected), "{error}");
        assert!(xorl_dist::Error::from(error).exit_code() == 2);
    }
}

#[test]
fn the_first_three_different_faults_of_a_file_are_told_and_the_others_counted() {
    let dir = TempDir::new().unwrap();
    let (good, none, far) = (r#"{"input_ids": [1, 2]}"#, r#"{"input_ids": []}"#, r#"{"input_ids": [10]}"#);
    let told = |lines: &[&str]| {
        let error = Dataset::open(&tokenized(&dir, lines), None, 10, 0, 1).unwrap_err().to_string();
        error.lines().map(|line| line.split_once("data.").unwrap().1.to_owned()).collect::<Vec<_>>()
    };
    let lines = told(&[good, none, far, none, good, "{", "[]", r#"{"labels": [1]}"#, none]);
    let begin = [
        "jsonl:2: expected at least one token",
        "jsonl:3: input_ids[0]: token id 10",
        "jsonl:6: not valid JSON",
    ];
    assert!(
        lines.len() == 3 && lines.iter().zip(begin).all(|(line, begin)| line.starts_with(begin)),
        "{lines:?}"
    );
    assert!(lines[2].ends_with("; 4 more lines are wrong too"), "{lines:?}");
    let lines = told(&[none, good, none]);
    assert_eq!(lines, ["jsonl:1: expected at least one token, found none; 1 more line is wrong too"]);
    assert_eq!(told(&[good, none]), ["jsonl:2: expected at least one token, found none"]);
}

#[test]
fn data_that_cannot_be_used_say_why() {
    let dir = TempDir::new().unwrap();
    let open = |args: &DataArgs| Dataset::open(args, None, 10, 0, 1).unwrap_err().to_string();
    assert!(open(&plain(vec![])).contains("data.datasets: expected at least one entry"));
    assert!(
        open(&tokenized(&dir, &["", " "]))
            .contains("data.jsonl: expected at least one sample, found none; write a JSON")
    );
    let missing = plain(vec![entry(dir.path().join("none.jsonl"), DatasetType::Tokenized)]);
    assert!(open(&missing).contains("none.jsonl: No such file"), "{}", open(&missing));
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    let empty = plain(vec![entry(dir.path().join("empty"), DatasetType::Tokenized)]);
    assert!(open(&empty).ends_with("empty: the folder holds no .jsonl file"));
    for name in ["a.JSONL", "b.json", "c.ndjson", "d.jsonl.gz", "README.md", ".hidden"] {
        std::fs::write(dir.path().join("empty").join(name), "{}").unwrap();
    }
    let said = open(&empty);
    assert!(said.ends_with("no .jsonl file; it has a.JSONL, b.json, c.ndjson and 1 more"), "{said}");
    for (bytes, words) in [
        (&b"\x1f\x8b\x08\0"[..], "that gzip packed; unpack it with `gunzip`"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PAR1", "a parquet file; one row a line is wanted (jsonl)"),
        (b"\xff\xfe{\0", "text in UTF-16; write it in UTF-8"),
        (b"{\0\"\0", "UTF-16"),
        (b"[{\"input_ids\": [1]}]", "a JSON list; one row a line is wanted (jsonl)"),
        (b"\xef\xbb\xbf\n [\n  {", "a JSON list"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ] {
        let path = dir.path().join("foreign");
        std::fs::write(&path, bytes).unwrap();
        let said = open(&plain(vec![entry(&path, DatasetType::Tokenized)]));
        assert!(said.contains("foreign: ") && said.contains(words), "{said}");
    }
    let chat = plain(vec![entry(dir.path().join("data.jsonl"), DatasetType::Chat)]);
    assert!(open(&chat).contains("set model.tokenizer_path"));
    let long = DataArgs { max_seq_len: Some(2), ..tokenized(&dir, &[r#"{"input_ids": [1, 2, 3]}"#]) };
    assert_eq!(
        open(&long),
        "all 1 samples are longer than 2 tokens: raise data.max_seq_len or shorten the data"
    );
    let packed =
        DataArgs { sample_packing_method: PackingMethod::Multipack, sample_packing_sequence_len: 1, ..long };
    assert!(open(&packed).contains("raise data.sample_packing_sequence_len"));
    let unpaddable = DataArgs { max_seq_len: None, sample_packing_sequence_len: 20, ..packed };
    assert!(matches!(
        Dataset::open(&unpaddable, None, 10, 10, 1),
        Err(DataError::PadId { pad_id: 10, vocab_size: 10 })
    ));
    let none = plain(vec![DatasetArgs { num_samples: Some(0), ..entry("dummy", DatasetType::Tokenized) }]);
    assert!(open(&none).contains("expected at least one sample, found none; set its num_samples"));
}

#[test]
fn folders_are_read_in_order_of_their_names() {
    let dir = TempDir::new().unwrap();
    for (name, id) in [("b.jsonl", 2), ("a.jsonl", 1), ("c.jsonl", 3), ("notes.txt", 4)] {
        write(dir.path(), name, &[&json!({ "input_ids": [id, id] }).to_string()]);
    }
    std::fs::create_dir(dir.path().join("d.jsonl")).unwrap();
    let args = plain(vec![entry(dir.path(), DatasetType::Tokenized)]);
    let rows = all_rows(&Dataset::open(&args, None, 10, 0, 1).unwrap(), 0);
    assert_eq!(rows.iter().map(|row| row.input_ids[0]).collect::<Vec<_>>(), [1, 2, 3]);
}

#[test]
fn packing_keeps_every_document_and_pads_with_one_of_its_own() {
    let dir = TempDir::new().unwrap();
    let path = numbered(&dir, "n.jsonl", 0..100);
    let reference =
        Dataset::open(&plain(vec![entry(&path, DatasetType::Tokenized)]), None, 1000, 999, 1).unwrap();
    for method in [PackingMethod::Sequential, PackingMethod::Multipack] {
        let args = DataArgs {
            sample_packing_method: method,
            sample_packing_sequence_len: 20,
            pad_to_multiple_of: Some(8),
            ..DataArgs { datasets: vec![entry(&path, DatasetType::Tokenized)], ..DataArgs::default() }
        };
        let dataset = Dataset::open(&args, None, 1000, 999, 1).unwrap();
        let rows = all_rows(&dataset, 0);
        assert_eq!(documents(&rows), documents(&all_rows(&reference, 0)), "{method:?}");
        let mut padding = 0;
        for row in &rows {
            assert_eq!(
                (row.input_ids.len() % 8, row.document_lengths.iter().sum::<usize>()),
                (0, row.input_ids.len())
            );
            let pad: Vec<usize> = (0..row.input_ids.len()).filter(|&i| row.input_ids[i] == 999).collect();
            assert!(row.input_ids.len() - pad.len() <= 20);
            assert!(pad.iter().all(|&i| row.labels[i] == -100));
            assert!(pad.is_empty() || row.document_lengths.last() == Some(&pad.len()));
            padding += pad.len();
        }
        let summary = dataset.summary();
        assert_eq!((summary.samples, summary.dropped, summary.rows), (100, 0, rows.len()));
        assert_eq!(
            (summary.padding_tokens, summary.tokens),
            (padding, rows.iter().map(|r| r.input_ids.len()).sum::<usize>())
        );
        assert_eq!(summary.valid_tokens, rows.iter().map(Row::valid_tokens).sum::<usize>());
        assert_eq!(summary.valid_tokens, reference.summary().valid_tokens);
        assert_eq!(Some(summary.longest_row), rows.iter().map(|row| row.input_ids.len()).max());
    }
}

#[test]
fn too_long_samples_are_dropped_and_counted() {
    let dir = TempDir::new().unwrap();
    let path = numbered(&dir, "n.jsonl", 0..70);
    let args = DataArgs { max_seq_len: Some(5), ..plain(vec![entry(path, DatasetType::Tokenized)]) };
    let dataset = Dataset::open(&args, None, 1000, 0, 1).unwrap();
    assert_eq!((dataset.summary().samples, dataset.summary().dropped, dataset.rows()), (50, 20, 50));
}

#[test]
fn the_order_is_a_function_of_seed_epoch_and_position() {
    let dir = TempDir::new().unwrap();
    let datasets = || {
        vec![
            entry(dir.path().join("a.jsonl"), DatasetType::Tokenized),
            entry(dir.path().join("b.jsonl"), DatasetType::Tokenized),
        ]
    };
    numbered(&dir, "a.jsonl", 0..40);
    numbered(&dir, "b.jsonl", 40..80);
    let open = |args: &DataArgs, seed| Dataset::open(args, None, 1000, 999, seed).unwrap();
    let shuffled = DataArgs {
        shuffle_merged_datasets: true,
        shuffle_before_merging_datasets: true,
        ..plain(datasets())
    };
    let (first, again, other) = (open(&shuffled, 1), open(&shuffled, 1), open(&shuffled, 2));
    let in_order = all_rows(&first, 0);
    // Positions are asked for in any order and across epochs.
    for position in (0..80).rev() {
        again.row_at(1, position).unwrap();
        assert_eq!(again.row_at(0, position).unwrap(), in_order[position]);
    }
    assert_ne!(all_rows(&first, 1), in_order);
    assert_ne!(all_rows(&other, 0), in_order);
    assert_eq!(documents(&all_rows(&first, 1)), documents(&in_order));
    assert_eq!(first.fingerprint(), again.fingerprint());
    assert_ne!(first.fingerprint(), other.fingerprint());
    assert!(matches!(first.row_at(0, 80), Err(DataError::DataCursor { position: 80, rows: 80, .. })));

    let unshuffled = open(&plain(datasets()), 1);
    assert_eq!(all_rows(&unshuffled, 0), all_rows(&unshuffled, 3));
    assert_eq!(unshuffled.row_at(0, 41).unwrap().input_ids[0], 41);
    let each = open(&DataArgs { shuffle_before_merging_datasets: true, ..plain(datasets()) }, 1);
    assert!(all_rows(&each, 0)[..40].iter().all(|row| row.input_ids[0] < 40));
    assert_ne!(all_rows(&each, 0), all_rows(&unshuffled, 0));
}

#[test]
fn dummy_data_are_random_ids_of_the_asked_length() {
    let dummy = || DatasetArgs { num_samples: Some(5), ..entry("dummy", DatasetType::Chat) };
    let args = DataArgs { max_seq_len: Some(12), ..plain(vec![dummy(), dummy()]) };
    let dataset = Dataset::open(&args, None, 50, 0, 7).unwrap();
    let rows = all_rows(&dataset, 0);
    assert_eq!(rows.len(), 10);
    assert!(rows.iter().all(|row| row.input_ids.len() == 12 && row.labels == row.input_ids));
    assert!(rows.iter().flat_map(|row| &row.input_ids).all(|id| (0..50).contains(id)));
    assert_ne!(rows[0], rows[1]);
    assert_ne!(rows[0], rows[5], "two dummy datasets are different");
    assert_eq!(rows, all_rows(&Dataset::open(&args, None, 50, 0, 7).unwrap(), 0));
    assert!(matches!(Dataset::open(&args, None, 0, 0, 7), Err(DataError::DummyShape { .. })));
}

#[test]
fn prepared_rows_are_reused_and_damaged_ones_are_not() {
    let dir = TempDir::new().unwrap();
    let data = numbered(&dir, "n.jsonl", 0..60);
    let cache = dir.path().join("cache/rows");
    let args = DataArgs {
        datasets: vec![entry(&data, DatasetType::Tokenized)],
        dataset_prepared_path: Some(cache.clone()),
        sample_packing_sequence_len: 30,
        ..DataArgs::default()
    };
    let open = |args: &DataArgs| Dataset::open(args, None, 1000, 999, 1).unwrap();
    let files =
        || -> Vec<PathBuf> { std::fs::read_dir(&cache).unwrap().map(|file| file.unwrap().path()).collect() };
    let fresh = open(&DataArgs { dataset_prepared_path: None, ..args.clone() });
    let check = |dataset: Dataset| {
        assert_eq!(all_rows(&dataset, 1), all_rows(&fresh, 1));
        assert_eq!((dataset.summary(), dataset.fingerprint()), (fresh.summary(), fresh.fingerprint()));
    };
    check(open(&args));
    let [file] = &files()[..] else { panic!("expected one file, got {:?}", files()) };
    let bytes = std::fs::read(file).unwrap();
    check(open(&args));
    assert!(std::fs::read(file).unwrap() == bytes, "the file has changed");

    // It is really read: rows that the data do not hold come out, as long as they carry their own hash.
    let other = open(&DataArgs { sample_packing_sequence_len: 40, ..args.clone() });
    let other_file = files().into_iter().find(|path| path != file).unwrap();
    std::fs::copy(&other_file, file).unwrap();
    assert_eq!(open(&args).fingerprint(), other.fingerprint());

    // Whatever is damaged is built again.
    for at in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x01;
        std::fs::write(file, &damaged).unwrap();
        check(open(&args));
        std::fs::write(file, &bytes[..at]).unwrap();
        check(open(&args));
    }
    assert!(std::fs::read(file).unwrap() == bytes, "the file has changed");

    // Another content, another file.
    numbered(&dir, "n.jsonl", 0..61);
    assert_eq!(open(&args).summary().samples, 61);
    assert_eq!(files().len(), 3);
    assert!(files().iter().all(|path| path.extension().unwrap() == "safetensors"));
}

fn ten_rows(dir: &TempDir) -> Arc<Dataset> {
    let path = numbered(dir, "n.jsonl", 0..10);
    Arc::new(Dataset::open(&plain(vec![entry(path, DatasetType::Tokenized)]), None, 1000, 0, 1).unwrap())
}

#[test]
fn the_loader_yields_the_plan_in_order() {
    let dataset = ten_rows(&TempDir::new().unwrap());
    let split = BatchSplit { data_parallel_size: 2, micro_batch_size: 1, rows_per_group: 1 };
    let plan = |rank| {
        (0..3).map(move |step| StepPlan {
            step,
            epoch: 0,
            micro_batches: schedule::deal(4 * step..(4 * step + 4).min(10), rank, split),
        })
    };
    let mut seen = Vec::new();
    for rank in 0..2 {
        for (step, loaded) in Loader::start(dataset.clone(), plan(rank), 2).unwrap().enumerate() {
            let loaded = loaded.unwrap();
            assert_eq!((loaded.step, loaded.epoch, loaded.micro_batches.len()), (step, 0, [2, 2, 1][step]));
            seen.extend(loaded.micro_batches.into_iter().flatten().map(|row| row.input_ids[0]));
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..10).collect::<Vec<i64>>());
}

#[test]
fn an_error_of_the_loader_reaches_the_trainer() {
    let dataset = ten_rows(&TempDir::new().unwrap());
    let step = |step, position| StepPlan { step, epoch: 0, micro_batches: vec![vec![position]] };
    let mut loader = Loader::start(dataset.clone(), [step(0, 1), step(1, 10), step(2, 2)], 1).unwrap();
    assert!(loader.next().unwrap().is_ok());
    assert!(matches!(loader.next(), Some(Err(DataError::DataCursor { position: 10, .. }))));
    assert!(loader.next().is_none());

    let plan = (0..2).map(move |number| if number == 0 { step(0, 1) } else { panic!("the plan broke") });
    let mut loader = Loader::start(dataset, plan, 4).unwrap();
    assert!(loader.next().unwrap().is_ok());
    let error = loader.next().unwrap().unwrap_err();
    assert!(matches!(&error, DataError::LoaderDied(text) if text == "the plan broke"), "{error}");
    assert!(!error.is_input() && loader.next().is_none());
}

#[test]
fn dropping_the_loader_ends_its_thread() {
    let dataset = ten_rows(&TempDir::new().unwrap());
    let endless =
        (0..).map(|step| StepPlan { step, epoch: step / 10, micro_batches: vec![vec![step % 10], vec![]] });
    let mut loader = Loader::start(dataset.clone(), endless, 3).unwrap();
    assert_eq!(loader.next().unwrap().unwrap().micro_batches[1], []);
    drop(loader);
    assert_eq!(Arc::strong_count(&dataset), 1, "the thread still holds the data");
}
