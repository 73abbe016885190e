//! Data of every format and type.

use super::{Case, case};

pub const CASES: &[Case] = &[
    case("labels that do not align", &["rows.jsonl:1", "labels", "expected 2 values like input_ids"], |w| {
        w.write("rows.jsonl", "{\"input_ids\": [1, 2], \"labels\": [1]}\n")
    }),
    case("a token that is a text", &["rows.jsonl:1", "input_ids", "expected an integer"], |w| {
        w.write("rows.jsonl", "{\"input_ids\": [\"a\"]}\n")
    }),
    case(
        "a line that is no JSON",
        &["rows.jsonl:3: not valid JSON", "write the row as one JSON object"],
        |w| w.write("rows.jsonl", "{\"input_ids\": [1, 2]}\n\n{\"input_ids\": [1,\n"),
    ),
    case(
        "a line without tokens",
        &["rows.jsonl:1:", "`input_ids`, found `ids`", "name the field by columns"],
        |w| w.write("rows.jsonl", "{\"ids\": [1]}\n"),
    ),
    case(
        "a token beyond the vocabulary",
        &["rows.jsonl:2: input_ids[1]: token id 64", "tokenize with the model's own tokenizer"],
        |w| w.write("rows.jsonl", "{\"input_ids\": [1]}\n{\"input_ids\": [1, 64]}\n"),
    ),
    case(
        "a file that is not there",
        &["run.yaml:5:", "rows.jsonl: no such file or folder", "expected a data file, a folder of them"],
        |w| w.remove("rows.jsonl"),
    ),
    case(
        "a table of other columns",
        &["rows.csv:2:", "`input_ids`, found `question`, `answer`; in data.datasets set type"],
        |w| {
            w.write("rows.csv", "question,answer\n1,2\n");
            w.edit("run.yaml", "rows.jsonl", "rows.csv");
        },
    ),
    case(
        "a table of another delimiter",
        &["rows.csv:2: no type fits a row of `question;answer`, whose columns commas should divide"],
        |w| {
            w.write("rows.csv", "question;answer\n1;2\n");
            w.edit("run.yaml", "rows.jsonl", "rows.csv");
            w.edit("run.yaml", "      type: tokenized\n", "");
        },
    ),
    case("a device", &["/dev/zero: a pipe or a device", "write its rows to a file"], |w| {
        w.set("rows.jsonl", "/dev/zero")
    }),
    case("a shard that is a pipe", &["saved/rows.arrow: no regular file", "copy the data set again"], |w| {
        w.write("saved/state.json", r#"{"_data_files": [{"filename": "rows.arrow"}]}"#);
        w.write("saved/rows.arrow", "");
        w.pipe("saved/rows.arrow");
        w.set("rows.jsonl", "saved");
    }),
    case("a weight that leaves nothing", &["no row is left to train on", "raise weight"], |w| {
        w.edit("run.yaml", "      type: tokenized\n", "      type: tokenized\n      weight: 0.01\n")
    }),
    case(
        "an answer that is null",
        &["t.jsonl:1: output: expected a text, got null", "leave the row out"],
        |w| w.rows("alpaca", "t.jsonl", r#"{"instruction": "a", "output": null}"#),
    ),
    case(
        "the address of a data set's page",
        &["run.yaml:5: data.datasets[0].path:", "name it by its hub id, tatsu-lab/alpaca"],
        |w| w.set("rows.jsonl", "https://huggingface.co/datasets/tatsu-lab/alpaca"),
    ),
    case(
        "a fault of every line",
        &["rows.jsonl:1", "`input_ids`, found `text`; type text reads `text`; 29 more lines are wrong too"],
        |w| {
            w.write("rows.jsonl", &"{\"text\": \"a\"}\n".repeat(30));
        },
    ),
    case("a file without a line", &["rows.jsonl", "give it rows, as configs/README.md shows"], |w| {
        w.write("rows.jsonl", "")
    }),
    case(
        "a file whose name is misspelt",
        &["run.yaml:5", "rosw.jsonl: no such file", "did you mean rows.jsonl?"],
        |w| w.edit("run.yaml", "rows.jsonl", "rosw.jsonl"),
    ),
    case("a model folder whose name is misspelt", &["run.yaml:2", "did you mean model?"], |w| {
        w.edit("run.yaml", "model_path: model", "model_path: modle")
    }),
    case("samples that are all too long", &["max_seq_len", "or shorten the data"], |w| {
        w.edit("run.yaml", "sample_packing_method: none", "sample_packing_method: none\n  max_seq_len: 2");
    }),
    case(
        "a table's line with a comma too many",
        &["t.csv:3: 3 cells where the header has 2", "put cells with delimiters", "in quotes"],
        |w| w.rows("completion", "t.csv", "prompt,completion\na,b\na,b,a\n"),
    ),
    case("a table in latin-1", &["t.csv:2: not UTF-8 at byte", "iconv -t UTF-8"], |w| {
        w.rows("completion", "t.csv", "");
        w.write_bytes("t.csv", b"prompt,completion\na,caf\xe9\n");
    }),
    case(
        "a list of rows that is cut",
        &["t.json: the file ends within the row that begins at line 2", "copy or write it again"],
        |w| w.rows("text", "t.json", "[{\"text\": \"a\"},\n{\"text\": \"b"),
    ),
    case(
        "a parquet file by its name alone",
        &["t.parquet: by its name a parquet file", "does not begin like one", "write it again"],
        |w| w.rows("text", "t.parquet", "text\na\n"),
    ),
    case("an arrow file that is cut", &["t.arrow: not a whole arrow file", "copy or write it again"], |w| {
        w.rows("text", "t.arrow", "ARROW1 and no more")
    }),
    case("a gz file that is cut", &["t.txt.gz: the data that gzip packed", "copy or write it again"], |w| {
        w.rows("text", "t.txt.gz", "");
        w.write_gz("t.txt.gz", "a b\n");
        w.cut("t.txt.gz", 6);
    }),
    case("a table of Excel", &["t.xlsx: a zip archive", "unpack it"], |w| {
        w.rows("text", "t.xlsx", "");
        w.write_bytes("t.xlsx", b"PK\x03\x04");
    }),
    case(
        "a folder without data",
        &["rows: the folder holds no file of data", "jsonl, json, parquet", "it has data.pkl"],
        |w| {
            w.write("rows/data.pkl", "a");
            w.set("rows.jsonl", "rows");
        },
    ),
    case(
        "a split that the folder has not",
        &["d: no split validation", "set split to one of: train, test"],
        |w| {
            w.write("d/dataset_dict.json", r#"{"splits": ["train", "test"]}"#);
            w.set("path: rows.jsonl", "path: d\n      split: validation");
        },
    ),
    case(
        "rows that were filtered and saved as indices",
        &["d/state.json: rows chosen by indices", "save the data set again after flatten_indices()"],
        |w| {
            w.write("d/state.json", r#"{"_indices_data_files": [{"filename": "i.arrow"}]}"#);
            w.set("rows.jsonl", "d");
        },
    ),
    case(
        "a slice of a split",
        &["run.yaml:6: data.datasets[0].split:", "a name alone", "num_samples takes rows from the start"],
        |w| w.entry("split: train[:100]"),
    ),
    case(
        "an address",
        &["run.yaml:5: data.datasets[0].path:", "a s3 address is refused", "local files only"],
        |w| w.set("rows.jsonl", "s3://bucket/rows.jsonl"),
    ),
    case(
        "a data set of the hub",
        &[
            "run.yaml:5: data.datasets[0].path: tatsu-lab/alpaca:",
            "no such file or folder here, and no such data set in the cache",
            "unset HF_HUB_OFFLINE",
        ],
        |w| w.set("rows.jsonl", "tatsu-lab/alpaca"),
    ),
    case(
        "a column that the file has not",
        &["rows.jsonl:1: expected field `tokens`, found `input_ids`", "columns of the data set names it"],
        |w| w.entry("columns: {input_ids: tokens}"),
    ),
    case(
        "rows of no type",
        &[
            "t.jsonl:1: no type fits a row of `question`, `answer`",
            "columns: {prompt: question, completion: answer}",
        ],
        |w| w.rows("auto", "t.jsonl", r#"{"question": "a", "answer": "b"}"#),
    ),
    case(
        "alpaca rows as chats",
        &["t.jsonl:1: expected field `messages`", "type alpaca reads `instruction` and `output`"],
        |w| w.rows("chat", "t.jsonl", r#"{"instruction": "a", "output": "b"}"#),
    ),
    case(
        "alpaca rows with a history",
        &["t.jsonl:1: history:", "not read of type alpaca", "write the row as `messages`, of type chat"],
        |w| w.rows("alpaca", "t.jsonl", r#"{"instruction": "a", "output": "b", "history": [["a", "b"]]}"#),
    ),
    case("a text before messages", &["t.jsonl:1: prompt:", "expected messages, like the other part"], |w| {
        w.rows(
            "completion",
            "t.jsonl",
            r#"{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}"#,
        )
    }),
    case(
        "the last turn and all inputs",
        &["data.turns: last", "data.train_on_inputs", "set one of them"],
        |w| {
            w.chats();
            w.add("data", "turns: last");
            w.add("data", "train_on_inputs: true");
        },
    ),
    case(
        "a pair without a rejected answer",
        &["t.jsonl:1: expected field `rejected`", "a row has prompt, chosen and rejected"],
        |w| w.pairs(r#"{"prompt": "a", "chosen": "b"}"#),
    ),
];
