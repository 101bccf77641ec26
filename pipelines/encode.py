"""Encode pictures with a VAE: a sealed set of latents, on which stage one trains a latent model.

Workers share the folder and nothing else: start any number of them, stop them, start others; each file
is a function of the config, the VAE and its number.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flowmatch.config import LocalPath, UserError, content, counted, option, required, together
from flowmatch.data.config import DataConfig
from flowmatch.models.config import Precision
from flowmatch.runs import command, folder, manifest, process, stopping
from flowmatch.runs.config import StageConfig

if TYPE_CHECKING:
    from flowmatch.data.dataset import Data
    from flowmatch.models.autoencoder import Autoencoder

MEASURED = 256  # pictures that scale=unit is measured on


class EncodeConfig(StageConfig):
    """Config of the encoding."""

    stage: ClassVar[str] = "encode"

    vae: LocalPath = required(
        "a VAE of diffusers, or a pipeline that has one: a folder, or a name on the hub", run=True
    )
    data: DataConfig = required("the pictures; with flip their mirror images are encoded, too")
    scale: Literal["vae", "unit"] = option(
        "vae",
        "how latents are scaled: as the VAE's config says, or (unit) so that their standard deviation, "
        f"over the first {MEASURED} pictures, is 1",
    )
    precision: Precision = option("fp32", "arithmetic of the VAE")
    dtype: Literal["float32", "float16"] = option("float32", "stored dtype of the latents")
    shard_size: int = option(4096, "pictures in a file, the unit of work", ge=1)
    batch_size: int = option(16, "pictures encoded together; changes rounding", ge=1)


@dataclass
class Plan(folder.Plan):
    """The pictures, the VAE, and the shape of a latent."""

    data: "Data"
    vae: "Autoencoder"
    shape: tuple[int, ...]

    @property
    def files(self) -> int:
        """Number of files."""
        return -(-len(self.data) // self.config.shard_size)


def plan(config: EncodeConfig) -> Plan:
    """Open the pictures, load the VAE, and encode and decode zeros to see the shapes."""
    from flowmatch.data import dataset
    from flowmatch.models import autoencoder, precision

    def check_device() -> str:
        device = process.device_of(config)
        precision.check("precision", config.precision, device)
        return device

    def open_pictures() -> "Data":
        data = dataset.load(config.data)
        if not data.images:
            raise UserError(f"data holds {list(data.shape)}; expected pictures")
        if data.part is not None:
            raise UserError("data.crop=random: each picture is encoded once; use crop=centre")
        return data

    device, data, loaded = together(
        check_device, open_pictures, lambda: autoencoder.load(config.vae, "vae", ())
    )
    vae = replace(loaded, picture=data.shape)
    vae.net.to(process.worker_device(device))
    shape = latent_shape(vae, config)
    inputs = {"data": data.digest, "vae": vae.digest}
    values = int(data.shape[0] * data.shape[1] * data.shape[2])
    size = 1
    for side in shape:
        size *= side
    lines = [
        f"{len(data)} samples of {list(data.shape)} become latents of {list(shape)}, "
        f"{values / size:.3g} times fewer values",
        f"{type(vae.net).__name__} of {vae.net.num_parameters():,} parameters, on {device}",
        f"scale {vae.scale}, shift {vae.shift}" if config.scale == "vae" else "scale measured",
        *data.notes,
    ]
    made = Plan(config, inputs, lines, data, vae, shape)
    megabytes = len(data) * size * (2 if config.dtype == "float16" else 4) / 1e6
    lines.append(f"{counted(made.files, 'file')}, {megabytes:,.1f} MB")
    return made


def latent_shape(vae: "Autoencoder", config: EncodeConfig) -> tuple[int, ...]:
    """Return the shape of a latent. Raises UserError where the VAE does not take these pictures."""
    import torch

    picture = list(vae.picture)
    try:
        z = vae.encode(torch.zeros(1, *picture))
        back = list(vae.decode(z).shape[1:])
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"vae={config.vae} does not take pictures of {picture}: {told}") from None
    if back != picture:
        raise UserError(
            f"vae={config.vae} turns pictures of {picture} into {back}; set data.size to a multiple of "
            "what it halves, such as 8 or 16"
        )
    return tuple(z.shape[1:])


def run(plan: Plan) -> None:
    """Encode the missing files; the worker that finds all of them there seals the set."""
    with stopping.heard("encode", defer=True):
        make(plan)


def make(plan: Plan) -> None:
    """Encode the missing files, together with the other workers."""
    import numpy as np
    from tqdm import tqdm

    from flowmatch.data import dataset, encoded
    from flowmatch.models.precision import arithmetic
    from flowmatch.pairs import leases
    from flowmatch.runs import storage
    from flowmatch.runs.files import committed

    config: EncodeConfig = plan.config
    place, data = Path(config.run_dir), plan.data
    storage.at(config.run_dir).make()
    leases.sweep(config.run_dir)  # what dead workers left
    folder.write_config(config, plan.inputs)
    device = next(plan.vae.net.parameters()).device
    with arithmetic(config.precision, device):
        vae = plan.vae if config.scale == "vae" else measured(plan)
        every = range(plan.files)
        own = list(every)[process.rank() :: process.world_size()]
        found = {k for k in every if committed(place / encoded.file_name(k))}
        if found:
            process.say(
                f"encode: resumes: {len(found)} of {counted(plan.files, 'file')} made before"
            )
        with tqdm(total=len(data), unit="picture", **process.bar_options()) as bar:
            for k in [
                *own,
                *(k for k in every if k not in own),
            ]:  # others: of workers that are gone
                begin = k * config.shard_size
                end = min(begin + config.shard_size, len(data))
                if k not in found and not committed(place / encoded.file_name(k)):
                    parts = []
                    for at in range(begin, end, config.batch_size):
                        stopping.leave_if_asked()
                        ids = np.minimum(np.arange(at, at + config.batch_size), end - 1)
                        made = vae.encode(data.batch(ids)["x1"]).numpy()
                        parts.append(made[: end - at].astype(config.dtype))
                    write(place / encoded.file_name(k), np.concatenate(parts))
                bar.update(end - begin)
    if process.leads():
        dataset.write_skipped(data, place)
        seal(plan, vae)


def measured(plan: Plan) -> "Autoencoder":
    """Scale latents to a standard deviation of 1, over the first pictures; so says the VAE's config."""
    import numpy as np
    import torch

    from flowmatch.models.digest import network_digest

    vae = replace(plan.vae, scale=1.0, shift=0.0)
    ids = np.arange(min(MEASURED, len(plan.data)))
    parts = np.split(ids, range(plan.config.batch_size, len(ids), plan.config.batch_size))
    z = torch.cat([vae.encode(plan.data.batch(part)["x1"]) for part in parts])
    deviation = float(z.double().std())
    if not deviation > 0:
        raise UserError(
            f"vae={plan.config.vae}: all latents are equal; scale=unit cannot be measured"
        )
    net = vae.net
    unused = {"shift_factor": None, "latents_mean": None, "latents_std": None}
    known = {name: value for name, value in unused.items() if name in net.config}
    net.register_to_config(scaling_factor=1 / deviation, **known)
    return replace(vae, scale=1 / deviation, digest=network_digest(net))


def write(path: Path, array: Any) -> None:
    """Write an array, whole or not at all."""
    import io

    import numpy as np

    from flowmatch.runs.files import commit

    stream = io.BytesIO()
    np.save(stream, array)
    commit(path, stream.getvalue())


def seal(plan: Plan, vae: "Autoencoder") -> None:
    """Write labels, the VAE and the manifest."""
    import numpy as np

    from flowmatch.data import encoded
    from flowmatch.models import networks

    config, data = plan.config, plan.data
    place = Path(config.run_dir)
    outputs = [encoded.file_name(k) for k in range(plan.files)]
    facts: dict[str, Any] = {}
    if data.label is not None:
        write(place / encoded.LABELS, data.label[np.arange(len(data)) % data.count])
        outputs.append(encoded.LABELS)
        facts["classes"] = data.classes
    if data.names:
        facts["id2label"] = {str(k): name for k, name in enumerate(data.names)}
    vae.net.to("cpu")
    outputs += [f"{encoded.VAE}/{name}" for name in networks.save(vae.net, place / encoded.VAE)]
    first = np.load(place / encoded.file_name(0)).astype(np.float64)
    manifest.seal(
        place,
        stage="encode",
        config=content(config),
        inputs=plan.inputs,
        outputs=outputs,
        samples=len(data),
        shape=list(plan.shape),
        shard_size=config.shard_size,
        latents=vae.facts,
        **facts,
    )
    spread = f"of the latents: mean {first.mean():.3g}, standard deviation {first.std():.3g}"
    process.say(f"encode: {spread}")
    if not 0.5 < first.std() < 2:
        process.say("encode: a flow trains best where that is about 1: scale=unit makes it so")
    process.say(f"encode: sealed {place}")


STAGE = command.Stage("encode", EncodeConfig, plan, run, __doc__)

if __name__ == "__main__":
    command.main(STAGE)
