"""Verify a set of pairs: compare its files with its sidecars and its manifest.

Checks names, sizes, counts, sidecars, fingerprints and the header of every tar member; with --full also
the sha256 of every tar, that every value is finite, and that labels are classes. Changes nothing without
--repair. An unfinished set is not sound, and its missing shards are listed. The tars of a URL are
fetched with --full only, one after another; without it their sizes are checked.

Exit status: 0 if the set is sound, 2 if not; then each fault is a line, and the last lines are the
commands that repair it.
"""

import argparse
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

from flowmatch.config import UserError, expanded, one_line
from flowmatch.pairs import audit, leases
from flowmatch.pairs.audit import BAD, Findings
from flowmatch.runs import process, stopping, storage
from flowmatch.runs.command import refusal
from flowmatch.runs.config import USER_ERROR
from flowmatch.runs.storage import Store

HEADERS = "names, sizes, sidecars and headers, not values"


def main(argv: list[str] | None = None) -> int:
    """Check the set, print the findings, and with --repair rename bad files; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="flowmatch verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="folder or URL of the pairs (their run_dir)")
    parser.add_argument(
        "--full", action="store_true", help="also read and hash every tar, and check every value"
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help=f"rename bad files to *{BAD} and remove what dead processes left; repeating generate_pairs "
        "then makes the bad shards again, and no others",
    )
    call = parser.parse_args(argv)
    with stopping.heard("verify"):
        return answer(call)


def answer(call: argparse.Namespace) -> int:
    """Do what a command line asks for; return the exit status."""
    try:
        return report(storage.at(expanded(call.folder)), call.full, call.repair)
    except (UserError, OSError) as error:
        refused = refusal(error)
        assert refused is not None
        complain(*refused.faults)
        return USER_ERROR


def report(folder: Store, full: bool, repair: bool) -> int:
    """Print the findings and what to do; return the exit status."""
    quiet = not (full and sys.stderr.isatty())
    with tqdm(unit="B", unit_scale=True, disable=quiet) as shown:
        found = audit.examine(folder, full, shown.update)
    for remark in found.remarks:
        process.say(f"verify_pairs: remark: {one_line(remark)}")
    complain(*(fault.what for fault in found.faults))
    if repair:
        leases.sweep(folder)
        for name in dict.fromkeys(name for fault in found.faults for name in fault.aside):
            line = f"{name} is set aside as {set_aside(folder, name)}"
            process.say(f"verify_pairs: {one_line(line)}")
    within = "names, sizes and sidecars, not contents" if storage.is_url(folder) else HEADERS
    looked = "every byte" if full else f"{within} (--full)"
    if not found.faults:
        assert found.layout is not None
        size = found.shards * found.layout.tar_bytes / 1e6
        process.say(
            f"verify_pairs: {one_line(str(folder))} is sound: sealed, {found.shards} shards, "
            f"{found.shards * found.layout.shard_size:,} pairs, {size:,.1f} MB; looked at {looked}"
        )
        return 0
    lines = [
        f"{found.sound} of {found.shards} shards are sound; looked at {looked}. To repair the set:"
    ]
    if not repair and any(fault.aside for fault in found.faults):
        flags = "--full --repair" if full else "--repair"
        lines += [f"  flowmatch verify {shlex.quote(str(folder))} {flags}"]
    lines += [f"  {command(folder, found)}"]
    complain(*lines)
    return USER_ERROR


def complain(*lines: str) -> None:
    """Print faults, a line each, whatever the names in them hold."""
    for line in lines:
        print(f"verify_pairs: {one_line(line)}", file=sys.stderr)


def set_aside(folder: Store, name: str) -> str:
    """Rename a file so that no reader and no stage takes it for what it was; return its new name."""
    target, number = f"{name}{BAD}", 1
    while folder.sizes([target]) != [None]:
        target, number = f"{name}{BAD}.{number}", number + 1
    folder.move(name, target)
    return target.rpartition("/")[2]


def command(folder: Store, found: Findings) -> str:
    """Write the command that makes again what is missing or set aside."""
    if found.imported is not None:
        return shlex.join(["flowmatch", "import", "SOURCE", "--from", found.imported, str(folder)])
    words = ["flowmatch", "pairs"]
    config = audit.read_config(folder)
    if config is None or any("config.yaml" in fault.aside for fault in found.faults):
        words += ["THE_CONFIG_IT_WAS_MADE_WITH.yaml", f"run_dir={folder}"]
        return " ".join([*words[:3], *map(shlex.quote, words[3:])])
    words += [str(folder / "config.yaml")]
    said = str(config.get("run_dir"))
    same = said.rstrip("/") == str(folder)
    if not same and (
        storage.is_url(folder) or Path(said).absolute() != Path(str(folder)).absolute()
    ):
        words += [f"run_dir={folder}"]
    if config.get("shards") != found.shards and found.shards:
        words += [f"shards={found.shards}"]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
