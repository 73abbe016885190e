//! The data room through its front door: files in, rows out, with packing, order, the cache and the loader.

use serde_json::json;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tempfile::TempDir;
use xorl_dist::{
    config::{DataArgs, DatasetArgs, DatasetType, PackingMethod, SampleBy},
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
    DatasetArgs { path: path.into(), kind, ..DatasetArgs::default() }
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
            .contains("data.jsonl: expected at least one sample, found none; give it rows")
    );
    let missing = plain(vec![entry(dir.path().join("none.jsonl"), DatasetType::Tokenized)]);
    assert!(open(&missing).contains("none.jsonl: No such file"), "{}", open(&missing));
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    let empty = plain(vec![entry(dir.path().join("empty"), DatasetType::Tokenized)]);
    let none = "empty: the folder holds no file of data (jsonl, json, parquet, arrow, csv, tsv, txt)";
    assert!(open(&empty).ends_with(none), "{}", open(&empty));
    for name in ["a.JSONL", "b.xlsx", "c.bin", "d.jsonl.bz2", "README.md", ".hidden"] {
        std::fs::write(dir.path().join("empty").join(name), "{}").unwrap();
    }
    let said = open(&empty);
    assert!(said.ends_with(&format!("{none}; it has a.JSONL, b.xlsx, c.bin and 1 more")), "{said}");
    for (name, bytes, words) in [
        ("a", &b"PK\x03\x04"[..], "a zip archive; unpack it"),
        ("a", b"BZh9", "bunzip2"),
        ("a", b"\xff\xfe{\0", "text in UTF-16; write it in UTF-8"),
        ("a", b"{\0\"\0", "UTF-16"),
        ("a", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.parquet", b"hello", "by its name a parquet file, but it does not begin like one"),
        ("a.arrow", b"", "by its name an arrow file, but it is empty"),
        ("a.jsonl.gz", b"{}", "by its name a packed file, but it does not begin like one"),
        (
            "a.json",
            b"[{\"input_ids\": [1]},\n {\"input_ids\": [1, 2",
            "the row that begins at line 2; it is cut",
        ),
        ("a.json", b"[{\"input_ids\": [1]}\n", "the list of rows has no end (line 2)"),
        ("a.json", b"[{\"input_ids\": [1]}\n{}]", "not valid JSON at line 2: expected `,` or `]`"),
        ("a.json", b"[{\"input_ids\": [1]}] x", "expected the end of the file"),
        ("a.json", b"[{\"input_ids\": [1]},\n {\"input_ids\": 3}]", "a.json:2: input_ids: expected a list"),
        ("a.json", b"{\n\"input_ids\":\n[1, }", "the row that begins at line 1; it is cut"),
        (
            "a.csv",
            b"input_ids,labels\n\"[1, 2]\",\"[1, 2]\"\n1,2,3\n",
            "a.csv:3: 3 cells where the header has 2",
        ),
        (
            "a.csv",
            b"input_ids\n\"[1, 2\"\n",
            "a.csv:2: input_ids: not valid JSON, as which a cell holds a list",
        ),
        ("a.csv", b"input_ids,input_ids\n", "the header names the column `input_ids` twice"),
        ("a.csv", b"ids\n\"[1, 2]\"\n", "a.csv:2: expected field `input_ids`, found `ids`"),
        (
            "a.txt",
            b"one\ntwo \xff\n",
            "a.txt:1: expected field `input_ids`, found `text`; type text reads `text`",
        ),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let said = open(&plain(vec![entry(&path, DatasetType::Tokenized)]));
        assert!(said.contains(&format!("{name}:")) && said.contains(words), "{said}");
        std::fs::remove_file(&path).unwrap();
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

/// A folder with the byte-level test tokenizer and a chat template.
fn tokenizer_dir() -> TempDir {
    let (dir, chat) = (TempDir::new().unwrap(), at("tests/data/chat"));
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(chat.join("byte_level").join(file), dir.path().join(file)).unwrap();
    }
    std::fs::copy(chat.join("templates/qwen25.jinja"), dir.path().join("chat_template.jinja")).unwrap();
    dir
}

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Writes `lines` in the forms of JSON, and packed, into `dir`.
fn write_forms(dir: &Path, lines: &str) {
    let rows: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).unwrap();
    write("list.json", json!(rows).to_string().as_bytes());
    write("pretty.json", serde_json::to_string_pretty(&rows).unwrap().as_bytes());
    write(
        "wrapped.json",
        serde_json::to_string_pretty(&json!({"version": 1, "data": rows})).unwrap().as_bytes(),
    );
    let objects: Vec<String> = rows.iter().map(|row| serde_json::to_string_pretty(row).unwrap()).collect();
    write("objects.json", objects.join("\n").as_bytes());
    write("lines.json", lines.as_bytes());
    write("marked.jsonl", format!("\u{feff}\r\n{}", lines.replace('\n', "\r\n\r\n")).as_bytes());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut gzip, lines.as_bytes()).unwrap();
    write("packed.jsonl.gz", &gzip.finish().unwrap());
    write("packed.jsonl.zst", &zstd::encode_all(lines.as_bytes(), 3).unwrap());
    write("packed.json.zst", &zstd::encode_all(json!(rows).to_string().as_bytes(), 3).unwrap());
}

#[test]
fn the_same_rows_in_every_format_give_the_same_tokens() {
    let (tokenizer, mut compared) = (tokenizer_dir(), 0);
    for kind in ["chat", "alpaca", "completion", "text", "tokenized"] {
        let folder = at("tests/fixtures/data").join(kind);
        let rows = |path: &Path| {
            let args = plain(vec![entry(path, DatasetType::Auto)]);
            let dataset = Dataset::open(&args, Some(tokenizer.path()), 1000, 0, 1);
            let dataset = dataset.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert_eq!(dataset.types(), [kind], "{}", path.display());
            all_rows(&dataset, 0)
        };
        let right = rows(&folder.join("rows.jsonl"));
        assert_eq!(right.len(), if kind == "alpaca" || kind == "completion" { 2 } else { 3 });
        let made = TempDir::new().unwrap();
        write_forms(made.path(), &std::fs::read_to_string(folder.join("rows.jsonl")).unwrap());
        for entry in
            [folder.as_path(), made.path()].into_iter().flat_map(|dir| std::fs::read_dir(dir).unwrap())
        {
            let path = entry.unwrap().path();
            assert_eq!(rows(&path), right, "{}", path.display());
            compared += 1;
        }
    }
    assert!(compared >= 75, "{compared} files");
}

#[test]
fn cut_and_damaged_files_are_one_line_each() {
    let dir = TempDir::new().unwrap();
    let fixtures = at("tests/fixtures/data");
    write_forms(dir.path(), &std::fs::read_to_string(fixtures.join("tokenized/rows.jsonl")).unwrap());
    for name in
        ["snappy.parquet", "zstd.parquet", "brotli.parquet", "file.arrow", "lz4.arrow", "stream.arrow"]
    {
        std::fs::copy(fixtures.join("chat").join(name), dir.path().join(name)).unwrap();
    }
    let tokenizer = tokenizer_dir();
    let open = |path: &Path| {
        let args = plain(vec![entry(path, DatasetType::Auto)]);
        Dataset::open(&args, Some(tokenizer.path()), 1000, 0, 1)
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    let names = [
        "packed.jsonl.gz",
        "packed.jsonl.zst",
        "snappy.parquet",
        "zstd.parquet",
        "brotli.parquet",
        "file.arrow",
        "lz4.arrow",
        "stream.arrow",
    ];
    for name in names {
        let path = dir.path().join(name);
        let whole = std::fs::read(&path).unwrap();
        for cut in [whole.len() / 2, whole.len() - 3] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            // Behind the rows of an arrow file, and the last frame of a stream, nothing is lost.
            match open(&path) {
                Ok(()) => assert!(name.ends_with(".arrow") && cut > whole.len() / 2, "{name}: {cut}"),
                Err(said) => assert!(
                    said.contains(&format!("{name}: "))
                        && said.contains("cut or damaged")
                        && !said.contains('\n'),
                    "{said}"
                ),
            }
        }
        // Arrow's reader asks for as much memory as a damaged header says.
        if name.ends_with(".arrow") {
            continue;
        }
        // A changed byte is told, or changes a text; it never is a panic.
        for at in (8..whole.len()).step_by(41) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            std::fs::write(&path, &bytes).unwrap();
            if let Err(said) = open(&path) {
                assert!(said.contains(name), "{name} at {at}: {said}");
            }
        }
    }
}

#[test]
fn folders_splits_and_globs_give_the_files_that_they_say() {
    let tokenizer = tokenizer_dir();
    let saved = at("tests/fixtures/data/chat");
    let rows = |dataset: DatasetArgs| {
        let args = plain(vec![dataset]);
        let dataset = Dataset::open(&args, Some(tokenizer.path()), 1000, 0, 1);
        dataset.map(|dataset| dataset.rows()).map_err(|error| error.to_string())
    };
    let split = |path: &Path, split: Option<&str>| {
        let chosen = split.map(str::to_owned);
        rows(DatasetArgs { split: chosen, ..entry(path, DatasetType::Auto) })
    };
    assert_eq!(split(&saved.join("saved"), None), Ok(3));
    assert_eq!(split(&saved.join("dict"), None), Ok(3));
    assert_eq!(split(&saved.join("dict"), Some("test")), Ok(1));
    let said = split(&saved.join("dict"), Some("dev")).unwrap_err();
    assert!(said.ends_with("dict: no split dev; set split to one of: train, test"), "{said}");
    assert_eq!(rows(entry(saved.join("*.arrow"), DatasetType::Chat)), Ok(9));
    let said = rows(entry(saved.join("*.orc"), DatasetType::Chat)).unwrap_err();
    assert!(said.ends_with("*.orc: no file matches this glob"), "{said}");

    let dir = TempDir::new().unwrap();
    let line = r#"{"input_ids": [1, 2]}"#;
    write(dir.path(), "train-00.jsonl", &[line, line]);
    write(dir.path(), "train-01.jsonl", &[line]);
    write(dir.path(), "test-00.jsonl", &[line]);
    assert_eq!(split(dir.path(), None), Ok(4));
    assert_eq!(split(dir.path(), Some("train")), Ok(3));
    assert!(split(dir.path(), Some("dev")).unwrap_err().contains("neither a folder nor a file of split dev"));
}

#[test]
fn weights_and_caps_choose_the_samples_of_an_epoch() {
    let dir = TempDir::new().unwrap();
    let path = numbered(&dir, "n.jsonl", 0..40);
    let ids = |dataset: DatasetArgs, seed| {
        let dataset = Dataset::open(&plain(vec![dataset]), None, 1000, 0, seed).unwrap();
        let ids: Vec<i64> = all_rows(&dataset, 0).iter().map(|row| row.input_ids[0]).collect();
        (ids, dataset.summary().clone())
    };
    let tokenized = || entry(&path, DatasetType::Tokenized);
    assert_eq!(ids(DatasetArgs { num_samples: Some(5), ..tokenized() }, 1).0, [0, 1, 2, 3, 4]);
    let (half, summary) = ids(DatasetArgs { weight: 0.5, ..tokenized() }, 1);
    assert!(half.len() == 20 && half.is_sorted() && half.windows(2).all(|two| two[0] != two[1]), "{half:?}");
    assert_eq!((summary.samples, summary.sources[0].samples), (20, 40));
    assert_ne!(half, ids(DatasetArgs { weight: 0.5, ..tokenized() }, 2).0);
    let (more, _) = ids(DatasetArgs { weight: 2.5, ..tokenized() }, 1);
    assert_eq!(more.len(), 100);
    assert!((0..40).all(|id| matches!(more.iter().filter(|&&other| other == id).count(), 2 | 3)));
}

#[test]
fn long_texts_are_cut_and_samples_without_a_loss_are_named() {
    let (dir, tokenizer) = (TempDir::new().unwrap(), tokenizer_dir());
    let open = |name: &str, text: &str, args: &dyn Fn(PathBuf) -> DataArgs| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        Dataset::open(&args(path), Some(tokenizer.path()), 1000, 0, 1).map_err(|error| error.to_string())
    };
    let short =
        |path: PathBuf| DataArgs { max_seq_len: Some(7), ..plain(vec![entry(path, DatasetType::Auto)]) };
    let cut = open("a.txt", "abcdefghijklmnopqrstuvwxyz 0123456789\n\nab\n", &short).unwrap();
    let whole = open("a.txt", "abcdefghijklmnopqrstuvwxyz 0123456789\n", &|path| {
        plain(vec![entry(path, DatasetType::Text)])
    });
    let whole = whole.unwrap().row_at(0, 0).unwrap().input_ids;
    let rows = all_rows(&cut, 0);
    let ids: Vec<i64> = rows[..rows.len() - 1].iter().flat_map(|row| row.input_ids.clone()).collect();
    assert_eq!(ids, whole);
    assert!(rows.iter().all(|row| row.input_ids.len() <= 7 && row.labels == row.input_ids));
    let said = &cut.summary().remarks;
    assert!(
        matches!(&said[..], [(0, said)] if said.ends_with(": 1 text longer than a sample may be")),
        "{said:?}"
    );

    let document = |path: PathBuf| {
        plain(vec![DatasetArgs { sample_by: SampleBy::Document, ..entry(path, DatasetType::Auto) }])
    };
    assert_eq!(open("b.txt", "one\n\ntwo\n", &document).unwrap().rows(), 1);
    let auto = |path: PathBuf| plain(vec![entry(path, DatasetType::Auto)]);
    let said = open("c.txt", "one\n", &|path| {
        let columns = [("text".to_owned(), "body".to_owned())].into();
        plain(vec![DatasetArgs { columns, ..entry(path, DatasetType::Text) }])
    });
    assert!(
        said.unwrap_err()
            .ends_with("c.txt:1: expected field `body`, found `text`; columns of the data set names it")
    );
    let said = open("d.jsonl", r#"{"question": "a", "answer": "b"}"#, &auto).unwrap_err();
    assert!(said.contains("d.jsonl:1: no type fits a row of `question`, `answer`; chat reads"), "{said}");
    let masked = "{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 2], \"labels\": [-100, -100]}\n";
    let said = open("e.jsonl", masked, &auto).unwrap().summary().remarks[0].1.clone();
    assert!(
        said.starts_with("1 of 2 samples have no token with a loss, the first at ")
            && said.ends_with("e.jsonl:2"),
        "{said}"
    );
}

#[test]
fn processes_that_prepare_the_same_data_get_the_same_rows() {
    let dir = TempDir::new().unwrap();
    let path = numbered(&dir, "n.jsonl", 0..3000);
    let args = DataArgs { datasets: vec![entry(path, DatasetType::Tokenized)], ..DataArgs::default() };
    let prints: Vec<String> = std::thread::scope(|scope| {
        let open = || Dataset::open(&args, None, 4000, 0, 1).unwrap().fingerprint().to_owned();
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(prints.iter().all(|print| *print == prints[0]));
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
