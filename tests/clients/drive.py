"""Everything that the tests ask of one client of the server, in one process.

    drive.py xorl|tinker URL OUTPUT_DIR BASE_MODEL ADAPTERS REPORT [WAY...]

REPORT gets {model: the base's folder, methods: the table of methods, train: adapters trained in several ways, merged: whole models that were
saved with an adapter, loop: of xorl-client's README}; with WAY, which is one of those of equality.py, only adapters that are trained so. The table is printed too, a line each. A client
without torch borrows that of the folder $BORROWED_PACKAGES.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import equality


def main(client, url, output_dir, base_model, adapters, report, *ways):
    # Last: what the client has itself comes first.
    sys.path.extend(filter(None, [os.environ.get("BORROWED_PACKAGES")]))
    module = importlib.import_module({"xorl": "xorl_client_methods", "tinker": "tinker_methods"}[client])
    driver = module.Driver(url, output_dir, base_model)
    told = {"model": str(Path(base_model).resolve())}
    if ways:
        told["train"] = equality.run(driver, int(adapters), ways)
    else:
        if client == "xorl":
            told["loop"] = importlib.import_module("xorl_client_loop").run(url)
        told["methods"] = module.TABLE.run(driver)
        for row in told["methods"]:
            print(json.dumps(row), flush=True)
        told["merged"] = getattr(driver, "merged", None)
        told["train"] = equality.run(driver, int(adapters))
    Path(report).write_text(json.dumps(told))
    bad = [row["method"] for row in told.get("methods", []) if row["state"] in ("missing", "fails")]
    if bad:
        sys.exit(f"these methods are missing or fail: {bad}")


if __name__ == "__main__":
    main(*sys.argv[1:])
