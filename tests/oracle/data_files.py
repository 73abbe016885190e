"""Writes tests/fixtures/data: the same few rows of each type in the formats of pyarrow, pandas and HF datasets.

    data_files.py [OUT_DIR]        needs pyarrow, pandas and datasets, which the tests themselves do not

Each folder has rows.jsonl, and other files that hold the same rows.
"""

import json
import pathlib
import shutil
import sys

import datasets
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
ROWS = {
    "chat": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is 2 + 2?"},
                {"role": "assistant", "content": "4"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Weather in Paris?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "18 degrees"},
                {"role": "assistant", "content": "It is 18 degrees."},
            ],
            "tools": [WEATHER],
        },
        {
            "messages": [
                {"role": "user", "content": 'Say "hi",\n\tplease: äé\U0001f600'},
                {"role": "assistant", "content": "hi", "weight": 0},
                {"role": "user", "content": "Again"},
                {"role": "assistant", "content": "hi, again"},
            ]
        },
    ],
    "alpaca": [
        {"instruction": "Add the numbers.", "input": "2, 3", "output": "5"},
        {"instruction": "Name a colour.", "input": "", "output": 'It is "red",\nor blue.'},
    ],
    "completion": [
        {"prompt": "The capital of France is", "completion": " Paris."},
        {"prompt": "a, b,\n", "completion": 'c "d"'},
    ],
    "text": [{"text": "Once upon a time."}, {"text": "  Two words, äé"}, {"text": "three"}],
    "tokenized": [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, 9]},
        {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
    ],
}


def cell(value):
    """A value as tables of text hold it: lists and objects as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def write(kind, rows, out):
    out.mkdir(parents=True)
    (out / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    columns = list({name: None for row in rows for name in row})
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
    pyarrow.parquet.write_table(table, out / "snappy.parquet")
    frame = pandas.DataFrame([{name: cell(row.get(name)) for name in columns} for row in rows])
    frame.to_csv(out / "rows.csv", index=False)
    frame.to_csv(out / "rows.tsv", index=False, sep="\t")
    if kind == "text":
        (out / "rows.txt").write_text("".join(row["text"] + "\n" for row in rows))
    if kind != "chat":
        return
    for compression in ["zstd", "gzip", "brotli", "lz4", "none"]:
        pyarrow.parquet.write_table(table, out / f"{compression}.parquet", compression=compression)
    pyarrow.feather.write_feather(table, out / "lz4.arrow", compression="lz4")
    with pyarrow.ipc.new_file(out / "file.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=2)
    with pyarrow.ipc.new_stream(out / "stream.arrow", table.schema) as sink:
        sink.write_table(table, max_chunksize=2)
    large = table.cast(pyarrow.schema([("messages", pyarrow.large_list(table.schema.field(0).type.value_type)), table.schema.field(1)]))
    pyarrow.parquet.write_table(large, out / "large.parquet")
    hf = datasets.Dataset(table)
    hf.save_to_disk(out / "saved", num_shards=2)
    datasets.DatasetDict({"train": hf, "test": hf.select([0])}).save_to_disk(out / "dict")


def main():
    here = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "data"
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here
    shutil.rmtree(out, ignore_errors=True)
    for kind, rows in ROWS.items():
        write(kind, rows, out / kind)


main()
