"""Pairs as others read them, with webdataset and datasets alone: flowmatch cannot be imported.

python -m tests.stock FOLDER CACHE OUT [CODE.py]: read a folder, pickle what was read into a file, and
run some code.
"""

import glob
import os
import pickle
import sys
import warnings

import numpy as np

from tests import forked


def read(folder, root, *code):
    """Read a folder in a process without flowmatch, and run code there; return reader -> arrays."""
    out, script = root / "read.pickle", root / "code.py"
    script.write_text("\n".join(code))
    words = ["tests.stock", folder, root / "cache", out, script]
    forked.run(words, cwd=folder, env=os.environ | {"HF_HOME": str(root / "home")}, check=True)
    return pickle.loads(out.read_bytes())


def joined(rows):
    """Concatenate the blocks of each array."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0] if name[0] != "_"}


def main(folder, cache, out, script):
    import datasets
    import webdataset

    warnings.simplefilter("ignore")
    datasets.config.HF_DATASETS_CACHE = cache
    tars = sorted(glob.glob(f"{folder}/*.tar"))
    arrays = {"webdataset": joined(list(webdataset.WebDataset(tars, shardshuffle=False).decode()))}
    for streaming in (False, True):
        files = {"path": "webdataset", "data_files": f"{folder}/*.tar"}
        for name, source in {"files": files, "folder": {"path": folder}}.items():
            how = {"split": "train", "cache_dir": cache, "streaming": streaming}
            rows = datasets.load_dataset(**source, **how)
            assert "x0.npy" in rows.features, (name, rows.features)
            arrays[f"{name} {streaming}"] = joined(list(rows.with_format("numpy")))
    with open(out, "wb") as file:
        pickle.dump(arrays, file)
    with open(script) as file:
        exec(compile(file.read(), script, "exec"), {})


if __name__ == "__main__":
    for name in [name for name in sys.modules if name.split(".")[0] == "flowmatch"]:
        del sys.modules[name]
    sys.modules["flowmatch"] = None
    main(*sys.argv[1:])
