"""Import a set of pairs in the format of another trainer, as a sealed set of flowmatch.

The formats: those of `flowmatch convert`, and rfpp (PNGs and generator states) and rectifiedflow
(z0.npy, z1.npy), which are read only. What the set does not tell, such as its teacher, stands as unknown
in manifest.json. Any number of processes may share OUT; repeat the command to go on.

Exit status: 0, 2 for what cannot be imported, 75 after a signal.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowmatch.bridge.formats import READERS
from flowmatch.bridge.importing import STAGE, Import, told_of
from flowmatch.config import UserError, expanded, one_line
from flowmatch.pairs import shards
from flowmatch.runs import manifest, process, stopping, storage
from flowmatch.runs.command import exit_codes

if TYPE_CHECKING:
    from flowmatch.bridge.diffsynth import Encode


def main(argv: list[str] | None = None) -> int:
    """Import the set; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="flowmatch import",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of the set")
    parser.add_argument("out", metavar="OUT", help="folder for the pairs")
    parser.add_argument(
        "--from", dest="format", required=True, choices=sorted(READERS), help="its format"
    )
    parser.add_argument("--count", type=int, help="pairs to take, the first ones (default: all)")
    parser.add_argument("--shard-size", type=int, help="pairs in a shard; must divide the count")
    parser.add_argument(
        "--times",
        help="times in (0, 1), rising, of the states between noise and data: 0.06,0.17,0.38",
    )
    parser.add_argument(
        "--pipeline",
        metavar="DIR",
        help="for diffsynth: the pipeline or VAE that encodes the pictures",
    )
    parser.add_argument("--device", default="auto", help="for --pipeline (default: auto)")
    parser.add_argument("--lease-seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="check, print the plan, and stop")
    call = parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    with stopping.heard("import"), exit_codes("import"):
        bring(call)
    return 0


def bring(call: argparse.Namespace) -> None:
    """Plan the import of a command line, and run it."""
    folder, out = Path(expanded(call.folder)), expanded(call.out)
    if not folder.is_dir():
        raise UserError(f"FOLDER={folder} does not exist or is not a folder")
    if storage.is_url(out):
        raise UserError(f"OUT={out}: a set is imported to a local folder; name one, and upload it")
    storage.check_folder(out, "OUT")
    told = told_of(folder)
    if told and told.get("unit") != call.format:
        raise UserError(f"FOLDER={folder} was written as {told.get('unit')}; use --from that")
    if call.times:
        told["times"] = read_times(call.times)
    if call.pipeline:
        if call.format != "diffsynth":
            raise UserError(f"--pipeline: --from {call.format} holds no pictures; leave it out")
        told["encode"] = encoder(expanded(call.pipeline), told, call.device)
    work = Import(
        folder, call.format, Path(out), told, call.count, call.shard_size, call.lease_seconds
    )
    for line in work.lines():
        process.say(f"import: {one_line(line)}")
    sealed = manifest.find(work.store, "OUT", [STAGE])
    if work.store.names() and sealed is None and shards.META not in work.store.names():
        raise UserError(f"OUT={out} holds other files; use another folder")
    missing = shards.missing(work.store, range(work.shards), work.fingerprint)
    if sealed is not None and sealed["facts"]["fingerprint"] != work.fingerprint:
        raise UserError(f"OUT={out} holds another set; use another folder")
    if call.dry_run:
        return
    if sealed is not None and not missing:
        process.say(f"import: {out} is sealed: nothing to do")
        return
    with stopping.heard("import", defer=True):
        work.run()
    process.say(f"import: sealed {out}")


def read_times(text: str) -> list[float]:
    """Read times between noise and data."""
    try:
        times = [float(word) for word in text.split(",")]
    except ValueError:
        times = []
    if not times or [0.0, *times, 1.0] != sorted({0.0, *times, 1.0}):
        raise UserError(
            f"--times={text}: expected rising numbers between 0 and 1, such as 0.25,0.5"
        )
    return times


def encoder(path: str, told: dict[str, Any], device: str) -> "Encode":
    """Load the pipeline whose VAE makes states of pictures, as the pipeline scales them."""
    from flowmatch.data.prompts import PromptList
    from flowmatch.models import autoencoder, latents, text
    from flowmatch.models.config import CallConfig

    if scaled := told.get("latents"):
        return autoencoder.load(path, "--pipeline", (), scaled).encode
    prompts, call = PromptList(["a picture"], []), CallConfig(**(told.get("call") or {}))
    where = process.pick_device(device)
    teacher = text.load(path, "--pipeline", prompts, call, truncate="", device=where)
    if not callable(getattr(getattr(teacher.pipe, "vae", None), "encode", None)):
        raise UserError(
            f"--pipeline={path}: {teacher.script.pipeline} has no VAE that encodes pictures"
        )
    scale, shift = latents.scaling(teacher, f"--pipeline={path}")
    return lambda x: (latents.encode(teacher.pipe.vae, x) - shift) / scale


if __name__ == "__main__":
    sys.exit(main())
