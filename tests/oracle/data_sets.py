"""Files of data sets as HF datasets chooses them, read from stdin: [{files, readme, name}], a list of cases.

    data_sets.py < CASES           writes a list of {split: [file]}, null for a case that datasets refuses
"""

import json
import os
import pathlib
import sys
import tempfile

import datasets


def chosen(folder: str, case: dict) -> dict | None:
    for name in case["files"]:
        path = pathlib.Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    if case["readme"] is not None:
        pathlib.Path(folder, "README.md").write_text(case["readme"])
    try:
        builder = datasets.load_dataset_builder(folder, name=case["name"])
    except (ValueError, FileNotFoundError):
        return None
    files = builder.config.data_files
    return {str(split): [os.path.relpath(path, os.path.realpath(folder)) for path in files[split]] for split in files}


answers = []
for case in json.load(sys.stdin):
    with tempfile.TemporaryDirectory() as folder:
        answers.append(chosen(os.path.realpath(folder), case))
print(json.dumps(answers))
