//! Files of data: rows in every format, and prepared rows.

use super::Folder;
use std::path::{Path, PathBuf};
use xorl_dist::{
    config::{DataArgs, DatasetArgs, DatasetType, SampleBy},
    data::{RowReader, prepared_rows},
};

const ENDINGS: [&str; 8] = ["jsonl", "json", "csv", "tsv", "txt", "jsonl.gz", "jsonl.zst", "data"];
const KINDS: [DatasetType; 7] = [
    DatasetType::Auto,
    DatasetType::Chat,
    DatasetType::Tokenized,
    DatasetType::Preference,
    DatasetType::Alpaca,
    DatasetType::Completion,
    DatasetType::Text,
];
/// Above the ids of the tokenizer.
const VOCABULARY: usize = 400;

/// A reader of the file `rows.{ending}` of `folder`, each ending and kind an entry, and then tables of each kind.
struct Reader {
    rows: RowReader<'static>,
    folder: PathBuf,
}

impl Reader {
    fn new(folder: &Path) -> Self {
        let texts = [
            ("tokenizer.json", &include_bytes!("../../data/chat/byte_level/tokenizer.json")[..]),
            ("tokenizer_config.json", include_bytes!("../../data/chat/byte_level/tokenizer_config.json")),
            ("chat_template.jinja", include_bytes!("../../data/chat/templates/qwen25.jinja")),
        ];
        let tokenizer = folder.join("tokenizer");
        std::fs::create_dir_all(&tokenizer).expect("a folder");
        for (name, bytes) in texts {
            std::fs::write(tokenizer.join(name), bytes).expect("room for a file");
        }
        let entry = |ending: &str, kind: DatasetType, by: SampleBy| DatasetArgs {
            path: folder.join(format!("rows.{ending}")),
            kind,
            sample_by: by,
            ..DatasetArgs::default()
        };
        let lines = ENDINGS.iter().flat_map(|ending| KINDS.map(|kind| entry(ending, kind, SampleBy::Line)));
        let documents = KINDS.map(|kind| entry("parquet", kind, SampleBy::Document));
        let datasets = lines.chain(documents).collect();
        // Lives as long as the process, as readers do.
        let args = Box::leak(Box::new(DataArgs { datasets, ..DataArgs::default() }));
        let rows = RowReader::new(args, &tokenizer, VOCABULARY).expect("a reader");
        Self { rows, folder: folder.to_owned() }
    }

    fn read(&self, entry: usize, ending: &str, bytes: &[u8]) {
        let path = self.folder.join(format!("rows.{ending}"));
        std::fs::write(&path, bytes).expect("room for a file");
        match self.rows.read(entry) {
            Ok((_, refused)) => refused.iter().for_each(|problem| drop(problem.to_string())),
            Err(error) => drop(error.to_string()),
        }
    }
}

fn with_reader(folder: &Folder, read: impl FnOnce(&Reader)) {
    thread_local! {
        static READER: std::cell::OnceCell<Reader> = const { std::cell::OnceCell::new() };
    }
    READER.with(|reader| read(reader.get_or_init(|| Reader::new(folder.path()))));
}

/// The first byte names the ending of the file and the type of its rows.
pub fn rows(input: &[u8], folder: &Folder) {
    let Some((&first, file)) = input.split_first() else { return };
    let entry = usize::from(first) % (ENDINGS.len() * KINDS.len());
    with_reader(folder, |reader| reader.read(entry, ENDINGS[entry / KINDS.len()], file));
}

/// The first byte names the type of the rows; parquet and arrow files are known by their bytes.
pub fn tables(input: &[u8], folder: &Folder) {
    let Some((&first, file)) = input.split_first() else { return };
    let entry = ENDINGS.len() * KINDS.len() + usize::from(first) % KINDS.len();
    with_reader(folder, |reader| reader.read(entry, "parquet", file));
}

pub fn prepared(input: &[u8], folder: &Folder) {
    let path = folder.put("prepared.safetensors", Some(input));
    let _ = prepared_rows(&path);
}
