"""`flowmatch new NAME --data DATA`: one commented file, from your own pictures to one-step samples."""

import json
import re
from pathlib import Path

from flowmatch.config import UserError

BODY = """\
# {name}: from your own pictures to samples in one step. flowmatch run {name}.yaml --dry-run checks every
# picture and prints what the counts come to; every key: flowmatch STAGE --help. The guide:
# docs/guides/own-data.md.
name: {name}

data:
  source: {source}
  path: {path}
{size}  channels: {channels}  # 3: RGB, 1: grey
{ways}{labels}{reference}{encode}
net:  # on a GPU: block_out_channels: {large}
  name: UNet2DModel
  block_out_channels: {small}
  layers_per_block: 1
  norm_num_groups: 8
  down_block_types: [{down}]
  up_block_types: [{up}]
  add_attention: false

flow:  # stage one: train a flow
  fit:
    epochs: 200  # passes over the pictures; or steps: 4000
    batch_size: 64
    lr: 1.0e-3
    sample_every: 250  # updates between two pictures of samples: flowmatch monitor runs/{name}
  times: {{name: logit_normal}}

pairs:  # stage two: noise and where the flow carries it
  per_image: 10  # pairs for each picture; fewer for many thousands. Or shards: 8
  shard_size: 512
  block: 64
  compute_batch: 64
  solver: {{name: heun, steps: 16}}

reflow:  # stage three: train on the pairs, to sample in one step
  fit:
    epochs: 20  # passes over the pairs; or steps: 2500
    batch_size: 64
    lr: 1.0e-3
    sample_every: 250
  times: {{name: noise_heavy, zero: 0.5}}
  loss: {{name: normalised, power: 1.0}}

evaluate:  # report.html: the distance to real pictures, and samples
  per_image: 1  # samples for each real picture; or samples: 1000
  features: values
  distance: sliced_wasserstein  # with labels and thousands of pictures: see the guide for better ones
  compute_batch: 64
  steps: [1, 2, 4, 8]
  converged_steps: 16

export: {{}}  # a folder that diffusers loads
"""
WAYS = {  # source -> what is done with pictures that do not fit
    "images": """\
  background: white  # behind transparent pixels; without it such pictures are refused
  small: enlarge  # pictures smaller than size: refuse, enlarge or skip
  bad: skip  # files that are no pictures: refuse, or skip and list in skipped.txt
  # crop: random  # another part of a picture each time that it is read; flip: true adds mirror images
""",
    "npz": "  small: enlarge  # pictures smaller than size: refuse or enlarge\n",
}


def body(
    name: str,
    data: str,
    size: str | None,
    channels: int,
    labels: bool,
    reference: str | None,
    vae: str | None,
) -> str:
    """Write the text of the file.

    Args:
        name: Of the experiment.
        data: Path of the pictures: a folder, parquet files, tars, an array, or a name on the hub.
        size: Pixels of a side, or HEIGHTxWIDTH; None for the size of an array.
        channels: 1 or 3.
        labels: Whether the pictures have classes.
        reference: Path of pictures that no stage trains on.
        vae: A VAE, for a model of latents.

    Raises:
        UserError: There is no size, or none that a network halves.
    """
    source = "npz" if Path(data).suffix.lower() in (".npz", ".npy") else "images"
    sides = [int(side) for side in size.split("x")] if size and is_size(size) else []
    if (size and not sides) or (source == "images" and not size):
        raise UserError(f"--size {size}: expected pixels of a side, such as 32, or 32x48")
    inner = [side // halved(vae) for side in sides] if vae else sides
    levels = depth(inner or [4])
    small, large = ([first * width for width in (1, 2, 4, 4)] for first in (16, 64))
    written = sides[0] if len(set(sides)) == 1 else sides
    shape = f"  size: {written}  # pixels of a side, or [height, width]\n" if sides else ""
    classes = "  labels: true  # folders, or a column of words or numbers\n" if labels else ""
    common = f"{shape}  channels: {channels}\n{WAYS[source]}{classes}"
    other = f"\nreference:  # no stage trains on these\n  source: {source}\n"
    other += f"  path: {quoted(reference or '')}\n{common}"
    return BODY.format(
        name=name,
        source=source,
        path=quoted(data),
        size=shape,
        channels=channels,
        ways=WAYS[source],
        labels=classes,
        reference=other if reference else "",
        encode=f"\nencode:  # the pictures become latents\n  vae: {quoted(vae)}\n" if vae else "",
        small=small[:levels],
        large=large[:levels],
        down=", ".join(["DownBlock2D"] * levels),
        up=", ".join(["UpBlock2D"] * levels),
    )


def is_size(size: str) -> bool:
    """Tell whether a word is N or NxN."""
    return re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", size) is not None


def halved(vae: str) -> int:
    """Return how many pixels of a side become one latent; 8 where the folder does not say."""
    for file in (Path(vae) / "config.json", Path(vae) / "vae" / "config.json"):
        if file.is_file():
            blocks = json.loads(file.read_text()).get("block_out_channels")
            return 2 ** (len(blocks) - 1) if isinstance(blocks, list) else 8
    return 8


def depth(sides: list[int]) -> int:
    """Choose the number of levels of a network: the sides are halved between them, to 7 or more."""
    levels = 1
    while levels < 4 and all(side % 2**levels == 0 and side >= 7 * 2**levels for side in sides):
        levels += 1
    return levels


def quoted(text: str) -> str:
    """Return a text as a YAML value."""
    return text if re.fullmatch(r"[\w./-]+", text) else json.dumps(text, ensure_ascii=False)
