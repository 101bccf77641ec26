"""The config of a data set."""

from typing import Any, ClassVar, Literal

import pydantic

from flowmatch.config import Config, option, used

IDX_NAMES = {"train": "train", "test": "t10k"}  # split -> how its files' names begin
EMBEDDED = ("digits", "ring")


class DataConfig(Config):
    """A dataset, for training or for comparison."""

    called: ClassVar[str] = "source"

    source: Literal["digits", "ring", "idx", "npz", "latents", "images"] = option(
        "images",
        "digits: sklearn's 8x8 digits; ring: 2-D Gaussians on a circle; idx: a folder of gzipped "
        "IDX files (MNIST's format); npz: an .npz or .npy file; latents: an .npz or .npy file of scaled "
        "latents; images: image files, parquet files, webdataset tars or a dataset on the hub",
    )
    path: str = option(
        "",
        "path of the data; for images: a folder, a parquet file, a webdataset tar, a glob of these, "
        "or the name of a dataset on the hub",
        run=True,
        validate_default=True,
    )
    split: str = option("train", "name of the split; of idx train or test, of images any")
    subset: str | None = option(None, "configuration of a dataset on the hub that has several")
    revision: str | None = option(None, "commit, branch or tag of a dataset on the hub")
    image_column: str | None = option(
        None, "name of the column of images; default: the only such column"
    )
    label_column: str | None = option(
        None, "name of the column of labels; default: the only such column"
    )
    size: int | None = option(
        None,
        "pixels; the short side is resized to it, never enlarged, and the centre is cropped to a "
        "square; default: the stored size",
        ge=1,
    )
    channels: Literal[1, 3] | None = option(
        None, "convert images to 1 (grey) or 3 (RGB) channels; default: the stored channels"
    )
    flip: bool = option(False, "add the mirror image of every image to the set")
    labels: bool = option(
        False, "read class labels and train a class-conditional flow", validate_default=True
    )
    samples: int = option(50_000, "ring: number of samples", ge=1)
    seed: int = option(0, "ring: seed of the samples", ge=0, lt=1 << 63)
    memory: int = option(2048, "keep decoded images in memory up to so many MiB", run=True, ge=0)
    threads: int = option(1, "number of threads that decode images", run=True, ge=1)

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
        "samples", "seed", "subset", "revision", "image_column", "label_column"
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

    @pydantic.field_validator("split", "size", "channels", "flip")
    @classmethod
    def _fits(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        source, name = info.data.get("source"), info.field_name
        if name == "split" and source in ("digits", "ring", "npz", "latents") and value != "train":
            raise ValueError(f"source {source} has one split, train")
        if name == "split" and source == "idx" and value not in IDX_NAMES:
            raise ValueError(f"source idx has the splits {' and '.join(IDX_NAMES)}")
        if source in ("ring", "latents") and name in ("size", "channels", "flip") and value:
            what = "the ring's samples are points" if source == "ring" else "latents are encoded"
            raise ValueError(f"{what}, not images; remove {name}")
        return value
