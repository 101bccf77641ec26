"""Verify a set of pairs: hold what is there against what its sidecars and its manifest promise.

Looked at are names, sizes, counts, sidecars, fingerprints and the header of every tar member; with
--full also the sha256 of every tar, that every value is finite, and that labels are classes. Nothing is
changed without --repair. A set that is not finished is not sound, and says which shards it lacks.

Exit status: 0 sound, 2 not; then each fault is a line, and the last lines are the commands that mend it.
"""

import argparse
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

from flowmatch import audit, claims, stage
from flowmatch.audit import BAD, Findings
from flowmatch.config import UserError


def main(argv: list[str] | None = None) -> int:
    """Look, say what was found, with --repair set aside what is bad; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.verify_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="the folder of the pairs (their run_dir)")
    parser.add_argument(
        "--full", action="store_true", help="also read, hash and look at every value"
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help=f"rename what is bad to *{BAD} and remove what dead processes left, so that repeating "
        "generate_pairs makes exactly the bad shards again; nothing else is touched",
    )
    call = parser.parse_args(argv)
    try:
        return report(Path(call.folder), call.full, call.repair)
    except UserError as error:
        for line in error.faults:
            print(f"verify_pairs: {line}", file=sys.stderr)
        return stage.USER_ERROR
    except OSError as error:
        if error.errno not in stage.REFUSED:
            raise
        print(f"verify_pairs: {error}; make it readable, for --repair writable", file=sys.stderr)
        return stage.USER_ERROR


def report(folder: Path, full: bool, repair: bool) -> int:
    """Print the findings and what to do; return the exit status."""
    quiet = not (full and sys.stderr.isatty())
    with tqdm(unit="B", unit_scale=True, disable=quiet) as shown:
        found = audit.examine(folder, full, shown.update)
    for remark in found.remarks:
        stage.say(f"verify_pairs: remark: {remark}")
    for fault in found.faults:
        print(f"verify_pairs: {fault.what}", file=sys.stderr)
    if repair:
        claims.sweep(folder)
        for name in dict.fromkeys(name for fault in found.faults for name in fault.aside):
            stage.say(f"verify_pairs: {name} is set aside as {set_aside(folder / name).name}")
    looked = "every byte" if full else "names, sizes, sidecars and headers, not values (--full)"
    if not found.faults:
        assert found.layout is not None
        size = found.shards * found.layout.tar_bytes / 1e6
        stage.say(
            f"verify_pairs: {folder} is sound: sealed, {found.shards} shards, "
            f"{found.shards * found.layout.shard_size:,} pairs, {size:,.1f} MB; looked at {looked}"
        )
        return 0
    lines = [f"{found.sound} of {found.shards} shards are sound; looked at {looked}. To mend:"]
    if not repair and any(fault.aside for fault in found.faults):
        flags = "--full --repair" if full else "--repair"
        lines += [f"  python -m pipelines.verify_pairs {shlex.quote(str(folder))} {flags}"]
    lines += [f"  {command(folder, found)}"]
    for line in lines:
        print(f"verify_pairs: {line}", file=sys.stderr)
    return stage.USER_ERROR


def set_aside(path: Path) -> Path:
    """Rename a file so that no reader and no stage takes it for what it was; return its new path."""
    target, number = path.with_name(path.name + BAD), 1
    while target.exists():
        target, number = path.with_name(f"{path.name}{BAD}.{number}"), number + 1
    return path.rename(target)


def command(folder: Path, found: Findings) -> str:
    """Write the command that makes again what is missing or set aside."""
    words = ["python", "-m", "pipelines.generate_pairs"]
    config = audit.read_config(folder)
    if config is None or any("config.yaml" in fault.aside for fault in found.faults):
        words += ["THE_CONFIG_IT_WAS_MADE_WITH.yaml", f"run_dir={folder}"]
        return " ".join([*words[:4], *map(shlex.quote, words[4:])])
    words += [str(folder / "config.yaml")]
    if Path(str(config.get("run_dir"))).absolute() != folder.absolute():
        words += [f"run_dir={folder}"]
    if config.get("shards") != found.shards and found.shards:
        words += [f"shards={found.shards}"]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
