"""Captions of pictures: the distinct texts are conditions, a picture's label is its text's number."""

import hashlib
import json
from dataclasses import replace

from flowmatch.config import UserError
from flowmatch.data import prompts
from flowmatch.data.config import DataConfig
from flowmatch.data.dataset import Data
from flowmatch.data.prompt_sources import GUESSED


def read(data: Data, config: DataConfig, key: str = "data") -> tuple[Data, list[str], str]:
    """Read the captions of some pictures.

    Args:
        data: The pictures.
        config: That they were opened with.
        key: The key of that config, for errors.

    Returns:
        The pictures with the numbers of their captions as labels; the distinct captions in the order of
        their first use; and a sha256 of both.

    Raises:
        UserError: There are no captions, several columns may be they, or one of them is empty.
    """
    where = f"{key}.path={config.path}" if config.path else f"{key}.source={config.source}"
    if data.table is None:
        raise UserError(
            f"{where} has no captions; expected pictures with a column of text, such as a folder with "
            "metadata.jsonl, parquet files, webdataset tars with .txt members, or a dataset on the hub"
        )
    names, asked = list(data.table), config.caption_column
    fitting = [name for name in GUESSED if name in names] if asked is None else [asked]
    listed = f"the columns are {', '.join(names)}"
    if asked is not None and asked not in names:
        raise UserError(f"{key}.caption_column={asked} does not exist; {listed}")
    if len(fitting) != 1:
        reason = "several columns can be the" if fitting else "no column can be the"
        raise UserError(f"{where}: {reason} captions; set {key}.caption_column; {listed}")
    texts, label = prompts.numbered(data.table[fitting[0]](), where)
    sha = hashlib.sha256(json.dumps(texts).encode() + label.tobytes())
    return replace(data, label=label, classes=len(texts)), texts, sha.hexdigest()
