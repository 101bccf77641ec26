"""The configs of a data set and of a list of prompts."""

import math
import string
from typing import Any, ClassVar, Literal

import pydantic

from flowmatch.config import Config, Place, expanded, option, used

IDX_NAMES = {"train": "train", "test": "t10k"}  # split -> how its files' names begin
SPLITS = {  # source -> its splits; a source that is not here but images has one, train
    "idx": tuple(IDX_NAMES),
    "digits_text": tuple(IDX_NAMES),
    "digits": ("train", "two_thirds", "third"),
}
EMBEDDED = ("digits", "digits_text", "ring")
PLAIN = {
    "ring": "the ring's samples are points",
    "latents": "latents are encoded",
    "arrays": "arrays are taken as they are",
}
LARGEST = 10_000_000  # prompts that templates may make; all are held in memory


class DataConfig(Config):
    """A dataset, for training or for comparison."""

    called: ClassVar[str] = "source"

    source: Literal[
        "digits", "digits_text", "ring", "idx", "npz", "latents", "arrays", "images"
    ] = option(
        "images",
        "digits: sklearn's 8x8 digits; digits_text: these in colour at places of a square, with "
        "captions; ring: 2-D Gaussians on a circle; idx: a folder of gzipped "
        "IDX files (MNIST's format); npz: an .npz or .npy file; latents: the folder of a finished "
        "encode, or an .npz or .npy file of scaled latents; arrays: such a file of floats [N, C, ...] "
        "that are taken as they are: signals, volumes, video; images: image files, parquet files, "
        "webdataset tars or a dataset on the hub",
    )
    path: Place = option(
        "",
        "path of the data; for images: a folder, a parquet file, a webdataset tar, a glob of these, "
        "or the name of a dataset on the hub",
        run=True,
        validate_default=True,
    )
    split: str = option(
        "train",
        "name of the split; of idx and digits_text train or test; of digits train (all 1,797), third "
        "(a third of each class) or two_thirds (the others); of images any",
    )
    subset: str | None = option(None, "configuration of a dataset on the hub that has several")
    revision: str | None = option(None, "commit, branch or tag of a dataset on the hub")
    image_column: str | None = option(
        None, "name of the column of images; default: the only such column"
    )
    label_column: str | None = option(
        None, "name of the column of labels; default: the only such column"
    )
    caption_column: str | None = option(
        None,
        "name of the column of captions, which train_flow reads with start; default: the only one of "
        "prompt, caption, text and txt",
        run=True,
    )
    truncate: bool = option(
        False, "allow captions that are longer than what the tokenizer keeps", run=True
    )
    size: int | list[int] | None = option(
        None,
        "pixels of a side of the square, or [height, width]; pictures are resized until they cover it, "
        "and cropped; default: the stored size",
    )
    fit: Literal["crop", "pad"] = option(
        "crop",
        "with size: crop what covers it, or pad what lies inside it with data.background",
        validate_default=True,
    )
    crop: Literal["centre", "random"] = option(
        "centre",
        "with fit=crop: which part is kept; random: another one each time that training reads a "
        "picture, drawn by its place in the training",
        validate_default=True,
    )
    small: Literal["refuse", "enlarge", "skip"] = option(
        "refuse", "what is done with pictures that are smaller than size"
    )
    bad: Literal["refuse", "skip"] = option(
        "refuse",
        "what is done with files that are no readable 8-bit pictures; those that are skipped are listed "
        "in skipped.txt of the run folder",
    )
    background: Literal["white", "grey", "black"] | None = option(
        None,
        "colour behind transparent pixels, and around pictures that fit=pad pads; default: partly "
        "transparent pictures are refused",
    )
    channels: Literal[1, 3] | None = option(
        None, "convert images to 1 (grey) or 3 (RGB) channels; default: the stored channels"
    )
    flip: bool = option(False, "add the mirror image of every image to the set")
    labels: bool = option(
        False, "read class labels and train a class-conditional flow", validate_default=True
    )
    samples: int = option(50_000, "ring: number of samples", ge=1, le=100_000_000)
    seed: int = option(0, "ring: seed of the samples", ge=0, lt=1 << 63)
    megapixels: int = option(
        179, "largest image that is decoded, in millions of pixels", run=True, ge=1
    )
    memory: int = option(2048, "keep decoded images in memory up to so many MiB", run=True, ge=0)
    threads: int = option(1, "number of threads that decode images", run=True, ge=1)

    @pydantic.field_validator("source", mode="before")
    @classmethod
    def _source(cls, source: Any) -> Any:
        if isinstance(source, str) and ("/" in source or "." in source):
            raise ValueError(f"this is no source; set data={{source: images, path: {source}}}")
        return source

    @pydantic.field_validator("path")
    @classmethod
    def _path(cls, path: str, info: pydantic.ValidationInfo) -> str:
        source = info.data.get("source")  # missing if the source itself is invalid
        if source in EMBEDDED and path:
            raise ValueError(f"source {source} is built in; remove path")
        if source and source not in EMBEDDED and not path:
            raise ValueError(f"source {source} needs a path; set it to the place of the data")
        return path

    @pydantic.field_validator(
        "samples", "seed", "subset", "revision", "image_column", "label_column", "caption_column"
    )
    @classmethod
    def _used(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        source = "ring" if info.field_name in ("samples", "seed") else "images"
        return used(cls, value, info, "source", source)

    @pydantic.field_validator("labels", mode="after")
    @classmethod
    def _labelled(cls, value: bool, info: pydantic.ValidationInfo) -> bool:
        column = info.data.get("label_column")
        if column is not None and not value:
            raise ValueError(
                f"label_column={column} is read with labels=true only; set that, or remove label_column"
            )
        return value

    @pydantic.field_validator("size", mode="before")
    @classmethod
    def _sides(cls, size: Any) -> Any:
        given = size if isinstance(size, list) else [size, size]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in given)
        if size is not None and not (len(given) == 2 and whole):
            raise ValueError("expected a number of pixels, or [height, width], each from 1")
        return size if size is None or given[0] != given[1] else given[0]

    @pydantic.field_validator("fit", "crop")
    @classmethod
    def _sized(cls, value: str, info: pydantic.ValidationInfo) -> str:
        if value in ("pad", "random") and info.data.get("size", 0) is None:
            raise ValueError("says how pictures are brought to data.size; set that, too")
        if value == "random" and info.data.get("fit") == "pad":
            raise ValueError("with fit=pad nothing is cropped; leave it out")
        return value

    @pydantic.model_validator(mode="after")
    def _padded(self) -> "DataConfig":
        if self.fit == "pad" and self.background is None:
            raise ValueError("fit=pad needs a colour; set background=white, grey or black")
        return self

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of `size`."""
        if isinstance(self.size, list):
            return self.size[0], self.size[1]
        return None if self.size is None else (self.size, self.size)

    @pydantic.field_validator("fit", "crop", "small", "bad", "background")
    @classmethod
    def _of_files(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """Refuse keys of files where samples come from arrays or formulas."""
        arrays = ("npz", "idx") if info.field_name in ("fit", "small", "background") else ()
        return used(cls, value, info, "source", "images", *arrays)

    @pydantic.field_validator("split", "size", "channels", "flip")
    @classmethod
    def _fits(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        source, name = info.data.get("source"), info.field_name
        if name == "split" and source not in (None, "images"):
            known = SPLITS.get(source, ("train",))
            if value not in known:
                has = "the splits " if len(known) > 1 else "one split, "
                raise ValueError(f"source {source} has {has}{', '.join(known)}")
        if source == "digits_text" and name == "flip" and value:
            raise ValueError("captions of digits_text say left and right; remove flip")
        if source in PLAIN and name in ("size", "channels", "flip") and value:
            what = PLAIN[source]
            raise ValueError(f"{what}, not images; remove {name}")
        return value


class PromptsConfig(Config):
    """A list of prompts. What it says enters a fingerprint as the digest of the list that it makes."""

    called: ClassVar[str] = "path"

    path: Place = option(
        "",
        "a .txt file with one prompt a line, a .jsonl, .json, .csv or .parquet file, a webdataset "
        "tar, a folder or a glob of one of these kinds, a folder saved by datasets, or the name of a "
        "dataset on the hub",
        run=True,
    )
    column: str | None = option(
        None,
        "name of the column of prompts; default: the only one of prompt, caption, text and txt",
        run=True,
    )
    weight_column: str | None = option(
        None,
        "name of a column of positive weights: a prompt is drawn in proportion to its own; those of "
        "templates weigh 1; default: all weigh the same",
        run=True,
    )
    split: str = option("train", "name of the split of a dataset", run=True)
    subset: str | None = option(
        None, "configuration of a dataset on the hub that has several", run=True
    )
    revision: str | None = option(None, "commit, branch or tag of a dataset on the hub", run=True)
    templates: list[str] = option(
        [],
        "prompts with {place}s, each filled with every word that words gives for it, the first place "
        "varying slowest; they come before the prompts of path",
        run=True,
        validate_default=True,
    )
    words: dict[str, list[str]] = option(
        {}, "the words of each place of the templates", run=True, validate_default=True
    )
    negative: str | None = option(None, "negative prompt of guided runs")
    held_out: float | str = option(
        0.0,
        "prompts kept for evaluation: a share in [0, 1), in which a prompt falls or not by its own "
        "text, or the path of another list",
        run=True,
    )
    truncate: bool = option(
        False, "allow prompts that are longer than what the tokenizer keeps", run=True
    )

    @pydantic.field_validator("column", "weight_column", "split", "subset", "revision")
    @classmethod
    def _read(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        default = cls.model_fields[str(info.field_name)].get_default()
        if info.data.get("path") == "" and value != default:
            raise ValueError("says how path is read; set path, or remove this key")
        return value

    @pydantic.field_validator("templates")
    @classmethod
    def _some(cls, templates: list[str], info: pydantic.ValidationInfo) -> list[str]:
        if info.data.get("path") == "" and not templates:
            raise ValueError("there are no prompts; set path, or templates")
        for template in templates:
            places(template)
        return templates

    @pydantic.field_validator("words")
    @classmethod
    def _fit(
        cls, words: dict[str, list[str]], info: pydantic.ValidationInfo
    ) -> dict[str, list[str]]:
        templates = info.data.get("templates")
        if templates is None:  # a fault of their own
            return words
        asked = [places(template) for template in templates]
        unknown = dict.fromkeys(name for names in asked for name in names if not words.get(name))
        unused = [name for name in words if not any(name in names for names in asked)]
        faults = [f"no words for {{{name}}}, which a template has" for name in unknown]
        faults += [f"no template has the place {{{name}}}" for name in unused]
        if faults:
            raise ValueError("; ".join(faults))
        count = sum(math.prod(len(words[name]) for name in names) for names in asked)
        if count > LARGEST:
            raise ValueError(f"the templates make {count:,} prompts; expected at most {LARGEST:,}")
        return words

    @pydantic.field_validator("held_out", mode="before")
    @classmethod
    def _share(cls, held_out: Any) -> Any:
        number = isinstance(held_out, int | float) and not isinstance(held_out, bool)
        if not (number and 0 <= held_out < 1) and not (isinstance(held_out, str) and held_out):
            raise ValueError("expected a share in [0, 1), or the path of a list of prompts")
        return float(held_out) if number else expanded(held_out)


def places(template: str) -> list[str]:
    """Return the names of a template's places, each once, in their order.

    Raises:
        ValueError: for braces that are no {place}.
    """
    found = []
    try:
        for _, name, spec, conversion in string.Formatter().parse(template):
            if name is not None and (spec or conversion or not name.isidentifier()):
                raise ValueError(f"{{{name}}} is no place")
            found += [] if name is None else [name]
    except ValueError as error:
        raise ValueError(
            f"{template!r}: {error}; write a place as {{word}}, a brace as {{{{ or }}}}"
        ) from None
    return list(dict.fromkeys(found))
