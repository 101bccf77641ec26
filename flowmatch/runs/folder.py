"""An open stage folder: the lock, the metrics, and at last the seal."""

import fcntl
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO, TypeVar

from flowmatch import config as configs
from flowmatch.config import UserError
from flowmatch.runs import checkpoints, lines, manifest, storage, trusted
from flowmatch.runs.checkpoints import Checkpoints
from flowmatch.runs.config import StageConfig
from flowmatch.runs.files import Scratch, sync, worker, write_atomic
from flowmatch.runs.process import leads, say
from flowmatch.runs.storage import Store

S = TypeVar("S", bound=StageConfig)


class RunFolder:
    """An open stage folder: locked against a second process, with checkpoints and metrics.

    Used as a context manager. With several processes rank 0 holds the lock and writes; the others
    read. `scratch` is where files are built.
    """

    def __init__(
        self,
        name: str,
        config: StageConfig,
        inputs: Mapping[str, str],
        facts: Mapping[str, Any] | None = None,
    ):
        self.name, self.config, self.inputs = name, config, dict(inputs)
        self.folder, self.facts = Path(config.run_dir), dict(facts or {})
        self.scratch = Scratch(self.folder)
        words = (name, self.folder, config, inputs, self.facts, self.scratch)
        self.checkpoints = Checkpoints(*words)
        self._lock: Any = None

    def __enter__(self) -> "RunFolder":
        if leads():
            storage.at(self.folder).make()
            self._lock = hold(self.folder)
            self.scratch.sweep()
            traces = ("config.yaml", "metrics.jsonl", "checkpoints")
            self.checkpoints.begun = any((self.folder / name).exists() for name in traces)
            write_config(self.config, self.inputs)
            stopped = self.checkpoints.begun and not manifest.sealed(self.folder)
            if stopped and not hasattr(self.config, "fit"):  # training says where it resumes
                say(f"{self.name}: {self.folder} was not finished: begins again from its start")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._lock is not None:
            self.scratch.close()
            self._lock.close()

    # Metrics: one JSON object a line, in the order of the steps.

    def cut_metrics(self, step: int, file: str = "metrics.jsonl") -> None:
        """Drop damaged lines, and those after a step, which a resumed run writes again (rank 0)."""
        cut_metrics(self.name, self.folder / file, step)

    def log(self, step: int, **values: float) -> None:
        """Append one line to metrics.jsonl (rank 0)."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    def seal(self, outputs: list[str], **facts: Any) -> None:
        """Write the manifest: the stage is done, and durable (rank 0)."""
        if self.checkpoints.earlier:
            facts["earlier_steps"] = self.checkpoints.earlier
        content, facts = configs.content(self.config), self.facts | facts
        seal(self.folder, self.name, content, self.inputs, outputs, facts)


def hold(folder: Path) -> TextIO:
    """Take the lock of a folder, which the system gives back when its holder dies, however it dies."""
    path = folder / ".lock"
    lock = open(path, "a+")  # noqa: SIM115 (held until the run ends)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not isinstance(error, BlockingIOError | PermissionError):
            lock.close()
            raise UserError(
                f"run_dir={folder}: its file system takes no locks ({error.strerror}), "
                "which keep two processes apart; mount it so (Lustre: -o flock), or use another"
            ) from None
        holder = path.read_text().strip() or "another process"
        lock.close()
        raise UserError(
            f"run_dir={folder} is held by {holder}; wait for it or use another run_dir"
        ) from None
    lock.truncate(0)
    host, _, number = worker().rpartition(".")
    lock.write(f"process {number} on {host}\n")
    lock.flush()
    return lock


def cut_metrics(name: str, path: Path, step: int) -> None:
    """Drop the lines of a file of metrics that are damaged or after a step."""
    sound, damaged = lines.read_metrics(path)
    if damaged:
        say(f"{name}: {lines.told(path, damaged)}")
    if sound or damaged:
        write_atomic(path, b"".join(line for values, line in sound if values["step"] <= step))


def seal(
    folder: Path,
    name: str,
    content: Mapping[str, Any],
    inputs: Mapping[str, str],
    outputs: list[str],
    facts: Mapping[str, Any],
) -> None:
    """Make a folder durable, and write its manifest."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_file() or path.is_dir():
            with suppress(PermissionError):  # a file of another user
                sync(path)
    manifest.seal(folder, stage=name, config=content, inputs=inputs, outputs=outputs, **facts)
    say(f"{name}: sealed {folder}")


def finished(
    name: str, config: StageConfig, intact: Callable[[Any, dict[str, Any]], bool] | None = None
) -> bool:
    """Check whether a folder holds the finished work of a config, without opening its inputs.

    True where the manifest is there, the whole config is the one in config.yaml but for the device,
    the inputs' own manifests have the digests of then, the files are intact (`intact(config,
    manifest)`, or their hashes), and none is to be made again (`config.lost()`). Data are not hashed
    again. False means: plan the stage, which tells.
    """
    if storage.is_url(config.run_dir) and intact is None:
        return False  # refused by the plan
    try:
        folder = storage.at(config.run_dir)
        sealed = manifest.find(folder, "run_dir", (name,))
        early = folder.read_all(["config.yaml"])[0] if sealed is not None else None
        if sealed is None or early is None:
            return False
        written, _, _ = read_config(folder, early, type(config))
        config = config.as_written(written)
        whole = [c.model_dump(exclude={"device"}) for c in (written, config)]
        content = configs.complete(sealed["config"], type(config))
        if whole[0] != whole[1] or configs.differences(content, configs.content(config)):
            return False
        for key, digest in sealed["inputs"].items():
            if key not in ("data", "reference", "held_out") and digest not in _digests(config, key):
                return False
        if intact is not None:
            return intact(config, sealed)
        manifest.verify(folder, "run_dir", sealed)
        return not config.lost()
    except UserError:
        return False


def _digests(config: StageConfig, key: str) -> set[Any]:
    """The digests by which a sealed input may be known: of its manifest, its network, its classifier."""
    value: Any = config
    names = ["loss", "features"] if key == "features" else key.split(".")
    for part in names:
        value = value[int(part)] if part.isdecimal() else getattr(value, part, None)
    path = getattr(value, "path", value)
    if not isinstance(path, str):
        return set()
    place = Path(path).parent if Path(path).name.startswith("net") else path
    sealed = manifest.find(place, key)
    if sealed is None:
        return set()
    facts = sealed["facts"]
    return {manifest.digest(place), facts.get("net"), facts.get("sha256")}


@dataclass
class Plan:
    """What a stage is going to do: all refusals are behind it, its inputs are open.

    config: the config of the stage. inputs: the digest of each input by its name. lines: the plan in
    words. in_store: whether the folder may be in an object store.
    """

    in_store: ClassVar[bool] = False
    config: Any
    inputs: dict[str, str]
    lines: list[str]

    def reopen(self) -> bool | None:
        """Check whether a sealed folder lacks something to be made; None where it is never reopened."""
        return None

    def measure(self) -> list[str]:
        """Measure what takes running a network, for an explicit dry run; return lines of the plan."""
        return []


def compare(name: str, plan: Plan) -> tuple[bool, bool]:
    """Compare a folder with a plan: whether it is sealed, and whether there is work to do.

    Raises UserError where the folder was made with other content, listing the keys, or where a sealed
    file has changed.
    """
    config = plan.config
    storage.check_folder(config.run_dir, "run_dir")
    if storage.is_url(config.run_dir) and not plan.in_store:
        raise UserError(f"run_dir={config.run_dir}: only pairs go into a store; use a local folder")
    folder = storage.at(config.run_dir)
    sealed = manifest.find(folder, "run_dir", (name,))
    local = Path(str(folder))
    going = checkpoints.continued(local, config, plan.inputs)
    if sealed is not None:
        before = configs.complete(sealed["config"], type(config))
        changed = _differences(before, sealed["inputs"], config, plan.inputs)
        if going is None or not checkpoints.grows(going, config):
            _refuse(folder, changed)
            reopened = plan.reopen()
            if reopened is None:
                manifest.verify(folder, "run_dir", sealed)
            if not reopened:
                return True, bool(config.lost())
    else:
        _refuse(folder, checkpoints.check(local, config, plan.inputs))
    if going is not None and checkpoints.grows(going, config):
        steps = f"from {going['config']['fit']['steps']:,} updates to {config.fit.steps:,}"  # type: ignore[attr-defined]
        plan.lines.append(f"{folder} grows {steps}, and goes on at {going['step']:,}")
    early = folder.read_all(["config.yaml"])[0]
    if early is not None:
        text, damaged = lines.read_text(early)
        if damaged:
            say(f"{name}: {lines.told(folder / 'config.yaml', damaged)}")
        written, before_inputs, code = read_config(folder, text, type(config))
        old = configs.content(written)
        changed = _differences(old, before_inputs, config, plan.inputs)
        now = trusted.digests()
        changed += [
            f"(code) {module}: its files have changed since"
            for module, digest in code.items()
            if now.get(module, digest) != digest
        ]
        if going is not None:  # the checkpoint decides
            changed = [line for line in changed if not line.startswith("fit.steps:")]
        if changed and sealed is None and _holds_nothing(folder):
            told = ", ".join(changed)
            plan.lines.append(
                f"{folder} was begun with other settings, and holds nothing yet: {told}"
            )
        else:
            _refuse(folder, changed)
    return sealed is not None, True


def begin(name: str, plan: Plan, dry_run: bool) -> bool:
    """Compare the folder with the plan, print the plan, and return whether there is work to do.

    A sealed folder that the plan reopens is unsealed. Raises what `compare` raises.
    """
    try:
        sealed, work = compare(name, plan)
    except storage.Unread:
        assert dry_run
        sealed, work = False, True
    if not work:
        say(f"{name}: {plan.config.run_dir} is sealed: nothing to do")
        return False
    for line in plan.lines:
        say(f"{name}: {configs.one_line(line)}")
    if sealed and (lost := plan.config.lost()):
        say(f"{name}: {plan.config.run_dir} is sealed, and made again are {', '.join(lost)}")
    elif sealed and not dry_run:
        storage.at(plan.config.run_dir).remove(manifest.NAME)
    return not dry_run


def _holds_nothing(folder: Store) -> bool:
    """Check that nothing was made in a folder: no checkpoint, shard, lease or result."""
    begun = {"config.yaml", ".lock", ".scratch", "metrics.jsonl", "checkpoints", ".meta"}
    begun |= {"skipped.txt", "samples", "held_out.jsonl", "monitor.html", "hardware.json"}
    names = [*folder.names("checkpoints"), *folder.names(".meta"), *folder.names()]
    return all(name in begun or ".tmp" in name for name in names)


def _differences(
    old: Any, old_inputs: Any, config: StageConfig, inputs: Mapping[str, str]
) -> list[str]:
    changed = configs.differences(old, configs.content(config))
    return changed + [f"(input) {line}" for line in configs.differences(old_inputs, dict(inputs))]


def _refuse(folder: Store, changed: list[str]) -> None:
    if changed:
        way_out = "set them back, or use another run_dir"
        if [line.partition(":")[0] for line in changed] == ["fit.steps"]:
            way_out = (
                "fit.steps may grow at any time with fit.decay=constant, and else from the last "
                "checkpoint of a run that has reached its end; set it back, or use another run_dir"
            )
        what = "with other settings"
        if all(line.startswith("(input)") for line in changed):
            what = "from other inputs, which were made again or have changed since"
            way_out = "to make it again, delete this folder; to keep it, use another run_dir"
        raise UserError(
            [f"run_dir={folder} was made {what}; {way_out}:"] + [f"  {line}" for line in changed]
        )


def read_config(
    folder: Store, text: str | bytes, model: type[S]
) -> tuple[S, dict[str, str], dict[str, str]]:
    """Read the text of a run folder's config.yaml, the digests of its inputs and of trusted code."""
    import yaml

    try:
        values = yaml.safe_load(text)
        inputs, code = values.pop("inputs"), dict(values.pop("code", {}))
        return configs.validate(model, values), inputs, code
    except (
        yaml.YAMLError,
        KeyError,
        AttributeError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"run_dir={folder}: config.yaml is damaged, or of another stage ({told}); use another "
            "run_dir, or if the folder is this stage's own delete config.yaml"
        ) from None


def write_config(config: StageConfig, inputs: Mapping[str, str]) -> None:
    """Write config.yaml: the resolved config, and the digests of `inputs` and of trusted `code`."""
    digests = ["inputs:"] if inputs else ["inputs: {}"]
    digests += [f"  {name}: {digest}" for name, digest in sorted(inputs.items())]
    if code := trusted.digests():
        digests += ["code:", *(f"  {name}: {digest}" for name, digest in sorted(code.items()))]
    text = configs.dump(config) + "\n".join(digests) + "\n"
    storage.at(config.run_dir).write("config.yaml", text)
