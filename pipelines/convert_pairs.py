"""Convert a set of pairs to the format of another trainer.

One part a shard; any number of processes may share OUT, on one machine or several. Repeat the command to
go on; the process that finds all parts made joins them, reads some samples of each shard back, compares
them with their pairs, and writes manifest.json. The formats: fastgen (webdataset tars of .pth members),
self-forcing (an LMDB, needs lmdb), fastvideo (a .pt file a sample), diffsynth (a table and PNGs), npy
(webdataset tars of .npy members).

Exit status: 0, 2 for what cannot be converted, 75 after a signal.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flowmatch.bridge import parts
from flowmatch.bridge.conversion import STAGE, Conversion
from flowmatch.bridge.formats import FORMATS
from flowmatch.config import UserError, counted, expanded, one_line
from flowmatch.pairs.dataset import PairData
from flowmatch.runs import manifest, process, stopping, storage
from flowmatch.runs.command import exit_codes

if TYPE_CHECKING:
    from flowmatch.bridge.conversion import Decode


def main(argv: list[str] | None = None) -> int:
    """Convert the set; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="flowmatch convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="folder or URL of the pairs (their run_dir)"
    )
    parser.add_argument("out", metavar="OUT", help="folder for the converted set")
    parser.add_argument("--to", required=True, choices=sorted(FORMATS), help="the format")
    parser.add_argument(
        "--conditions",
        metavar="DIR",
        help="for fastgen and fastvideo: a finished encode_prompts of the pairs' prompts",
    )
    parser.add_argument(
        "--pipeline",
        metavar="DIR",
        help="for diffsynth: the pipeline or VAE that decodes the pairs",
    )
    parser.add_argument("--names", metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--device", default="auto", help="for --pipeline (default: auto)")
    parser.add_argument("--lease-seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="check, print the plan, and stop")
    call = parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    with stopping.heard("convert"), exit_codes("convert"):
        convert(call)
    return 0


def convert(call: argparse.Namespace) -> None:
    """Plan the conversion of a command line, and run it."""
    out = expanded(call.out)
    if storage.is_url(out):
        raise UserError(
            f"OUT={out}: other trainers' formats are written to a local folder; name one"
        )
    storage.check_folder(out, "OUT")
    data = PairData(storage.at(expanded(call.folder)), "FOLDER")
    to = FORMATS[call.to]
    names = () if call.names is None else read_names(expanded(call.names))
    if call.pipeline and not to.pictures:
        raise UserError(f"--pipeline: --to {to.name} holds states, not pictures; leave it out")
    if call.conditions and to.name not in ("fastgen", "fastvideo"):
        raise UserError(f"--conditions: --to {to.name} holds prompts as text; leave it out")
    table, decode, inputs = None, None, {}
    if call.conditions:
        from flowmatch.models.rows import Stored

        table = Stored(expanded(call.conditions), "--conditions")
    if call.pipeline:
        decode, inputs["pipeline"] = decoder(expanded(call.pipeline), data, call.device)
    work = Conversion(data, to, Path(out), table, decode, names, call.lease_seconds, inputs)
    refuse_other(work)
    notes = work.check()
    cut = counted(data.shards, "part")
    said = f"{len(data):,} pairs of {list(data.shape)} as {to.name}, in {cut}"
    for line in [said, *notes]:
        process.say(f"convert: {one_line(line)}")
    if call.dry_run:
        return
    if finished(work):
        process.say(f"convert: {out} is sealed: nothing to do")
        return
    with stopping.heard("convert", defer=True):
        work.run()
    process.say(f"convert: sealed {out}")


def read_names(file: str) -> tuple[str, ...]:
    """Read the names of classes, one a line."""
    try:
        return tuple(Path(file).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--names={file} cannot be read: {error}") from None


def decoder(path: str, data: PairData, device: str) -> "tuple[Decode, str]":
    """Load the pipeline or VAE that decodes some pairs; return it with the digest of the VAE."""
    from flowmatch.models import autoencoder, text
    from flowmatch.models.decoding import Decoder
    from flowmatch.models.digest import module_digest
    from flowmatch.models.script import Script

    facts = data.sealed["facts"]
    if scaled := facts.get("latents"):
        vae = autoencoder.load(path, "--pipeline", (), scaled)
        vae.net.to(process.pick_device(device))
        return lambda x, prompts: (vae.decode(x) + 1) / 2, vae.digest
    if not facts.get("script"):
        raise UserError(
            f"--pipeline={path}: the pairs are pictures as they are, or of no known VAE"
        )
    pipe = text.open_pipeline(path, "--pipeline")
    script = Script.of(facts["script"])
    if type(pipe).__name__ != script.pipeline:
        raise UserError(
            f"--pipeline={path} is a {type(pipe).__name__}; the pairs are of a {script.pipeline}"
        )
    pipe.to(process.pick_device(device))
    net = getattr(pipe, "vae", None)
    digest = "none" if net is None else module_digest(net)
    return Decoder(pipe, script, facts.get("call") or {}), digest


def refuse_other(work: Conversion) -> None:
    """Raise UserError where the folder holds another thing than this conversion."""
    names = [name for name in work.store.names() if name != parts.META]
    sealed = manifest.find(work.store, "OUT", [STAGE])
    if names and sealed is None and not parts.begun(work.store):
        raise UserError(f"OUT={work.out} holds other files, such as {names[0]}; use another folder")
    parts.missing(work.store, range(work.data.shards + 1), work.fingerprint)


def finished(work: Conversion) -> bool:
    """Return whether the folder is sealed, and has all of its files in their sizes."""
    every = range(work.data.shards + 1)
    sealed = manifest.find(work.store, "OUT", [STAGE])
    return sealed is not None and not parts.missing(
        work.store, every, work.fingerprint, joined=True
    )


if __name__ == "__main__":
    sys.exit(main())
