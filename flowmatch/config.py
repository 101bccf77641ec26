"""Configs: pydantic models beside the code they configure; YAML files and `key=value` on top.

Every field is *content* (it changes what comes out) or *run* (paths, intervals, workers, trackers).
Only content enters fingerprints and manifests: changing a run field resumes, changing content is an
error that lists the keys.
"""

import difflib
import importlib.util
import os
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


class UserError(ValueError):
    """A mistake that its maker can mend: one line a fault; a stage prints them and exits 2."""

    def __init__(self, faults: str | list[str]):
        self.faults = [one_line(f) for f in ([faults] if isinstance(faults, str) else faults)]
        super().__init__("\n".join(self.faults))


def one_line(text: str) -> str:
    """Escape what cannot be printed in a line: newlines, control characters, bytes of no encoding."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class NotReady(UserError):
    """An input is not made yet: an error for a stage that runs, a remark for one that only plans.

    places: the folders that are missing, where they are known.
    """

    def __init__(self, faults: str | list[str], places: Iterable[object] = ()):
        super().__init__(faults)
        self.places = [str(place) for place in places]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Make several calls and return their results; raise the faults of all of them as one error.

    Raises NotReady where nothing is wrong but inputs that are not made yet.
    """
    errors: list[UserError] = []
    results = []
    for call in calls:
        try:
            results.append(call())
        except UserError as error:
            errors.append(error)
    lines = list(dict.fromkeys(line for error in errors for line in error.faults))
    missing = [error for error in errors if isinstance(error, NotReady)]
    if missing and len(missing) == len(errors):
        raise NotReady(lines, [place for error in missing for place in error.places])
    if errors:
        raise UserError(lines)
    return results


class Config(pydantic.BaseModel):
    """Base of all configs: unknown keys are faults, values are never changed after loading."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    @pydantic.field_validator("*")
    @classmethod
    def _counts(cls, value: Any) -> Any:
        """Refuse whole numbers that no array counts."""
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) >= 2**63:
                raise ValueError("expected a whole number below 2^63")
        return value

    called: typing.ClassVar[str] = "name"  # the field that a bare string stands for

    @pydantic.field_validator("*")
    @classmethod
    def _text(cls, value: Any) -> Any:
        """Refuse what no path and no config.yaml can hold."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "\0" in text:
                raise ValueError("holds a NUL character; leave it out")
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ValueError("is not UTF-8; use another name") from None
        return value


def expanded(path: str) -> str:
    """Replace `~` in a path by the home folder; a URL stays as it is.

    Raises UserError for a home that is not known, and for a character that no path holds.
    """
    if "\0" in path:
        raise UserError(f"{path!r}: a path cannot hold the character 0")
    found = path if "://" in path else os.path.expanduser(path)
    if found.startswith("~"):
        raise UserError(
            f"{path}: there is no such home folder; write the path in full, or as ./~..."
        )
    return found


def _local(path: str) -> str:
    if "://" in path:
        raise UserError("only pairs go by URL; copy the folder here, and name the copy")
    return expanded(path)


Place = Annotated[str, pydantic.AfterValidator(expanded)]  # a path, or a URL
LocalPath = Annotated[str, pydantic.AfterValidator(_local)]


def require(module: str, extra: str, what: str) -> None:
    """Check that a library of an extra is installed. Raises UserError naming the extra."""
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"{what} needs {module}, which is not installed: pip install 'flowmatch[{extra}]'"
        )


def option(
    default: Any, meaning: str, *, run: bool = False, shared: bool = True, **bounds: Any
) -> Any:
    """Declare a field.

    Args:
        default: its default value.
        meaning: what it means, with its unit.
        run: whether it is a run field; content otherwise.
        shared: whether a key of this name at the top of an experiment's file reaches it.
        bounds: pydantic's ge, gt, le, lt, max_length, validate_default.
    """
    extra: Any = {"run": run, "shared": shared}
    if isinstance(
        default, Config
    ):  # a nested model: a fresh default, so that subclasses may differ
        bounds = {}
    return pydantic.Field(default=default, description=meaning, json_schema_extra=extra, **bounds)


def required(meaning: str, *, run: bool = False, **bounds: Any) -> Any:
    """Declare a field that has no default."""
    return option(PydanticUndefined, meaning, run=run, **bounds)


def used(
    model: type[Config], value: Any, info: pydantic.ValidationInfo, by: str, *names: str
) -> Any:
    """Refuse a value other than the default where the choice `by` leaves it without effect.

    names: the choices that look at it. For a field_validator of a field that comes after `by`.
    """
    chosen, field = info.data.get(by), str(info.field_name)
    default = model.model_fields[field].get_default()
    if chosen is not None and chosen not in names and value != default:
        belongs = f"{field} belongs to {by}={' and '.join(names)}"
        raise ValueError(f"{belongs}; with {by}={chosen} leave it out, or at {default}")
    return value


def is_run(field: FieldInfo) -> bool:
    """Tell whether a field is a run field."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("run"))


def shared_fields(model: type[Config]) -> set[str]:
    """Name the fields that a key at the top of an experiment's file reaches."""
    extras = {name: field.json_schema_extra for name, field in model.model_fields.items()}
    return {n for n, extra in extras.items() if isinstance(extra, dict) and extra.get("shared")}


def content(config: Config) -> dict[str, Any]:
    """Give the content fields alone, nested, as plain JSON values."""
    values = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if not is_run(field):
            values[name] = content(value) if isinstance(value, Config) else _plain(value)
    return values | {name: _plain(value) for name, value in (config.model_extra or {}).items()}


def complete(values: dict[str, Any], model: type[Config], like: Any = None) -> dict[str, Any]:
    """Fill in the content fields that are newer than some stored content, with their defaults.

    A new field's default is what was done before there was one. like: an instance whose values are the
    defaults, where a stage has its own.
    """
    filled = dict(values)
    for name, field in model.model_fields.items():
        default = getattr(like, name) if like else field.get_default()
        kind, value = _config_type(field.annotation), values.get(name)
        if name not in values and not is_run(field) and default is not PydanticUndefined:
            filled[name] = _plain(default)
        elif kind and isinstance(value, dict):
            filled[name] = complete(value, kind, default if isinstance(default, Config) else None)
        elif kind and isinstance(value, list):
            filled[name] = [complete(v, kind) if isinstance(v, dict) else v for v in value]
    return filled


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return content(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts into one dict with dotted keys."""
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def differences(before: Any, after: Any) -> list[str]:
    """List the dotted keys in which two nested dicts differ, as `key: before -> after`."""
    old, new = flatten(before), flatten(after)
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)!r} -> {new.get(key, absent)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, absent) != new.get(key, absent)
    ]


def restrict(values: Any, like: Any) -> Any:
    """Keep of nested dicts the keys that another one has: a seal holds no run fields."""
    if not (isinstance(values, dict) and isinstance(like, dict)):
        return values
    return {name: restrict(values.get(name), inner) for name, inner in like.items()}


C = TypeVar("C", bound=Config)


def counted(number: int, noun: str) -> str:
    """Write a number of things: `1 shard`, `4 shards`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def step_words(steps: Iterable[int]) -> str:
    """Write numbers of steps: `one step`, `1, 2 and 4 steps`."""
    *first, last = map(str, steps)
    if first:
        return f"{', '.join(first)} and {last} steps"
    return "one step" if last == "1" else f"{last} steps"


def closest(word: str, known: Iterable[str]) -> str:
    """Suggest the known word that is closest to one: `did you mean WORD?`, or nothing."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {near[0]}? " if near else ""


def validate(model: type[C], values: dict[str, Any]) -> C:
    """Build a config from plain values; raise UserError with one line for each fault.

    A name may stand for a config that has one (`solver: heun`), a value for a list of one
    (`steps: 4`). Where a field is a config and has a default, keys that are left out are the default's.
    """
    values = dict(values)
    for name, field in model.model_fields.items():
        if name in values:
            values[name] = _coerced(field.annotation, values[name])
        if isinstance(field.default, Config) and isinstance(values.get(name), dict):
            values[name] = field.default.model_dump(mode="json") | values[name]
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError([_fault(model, fault) for fault in error.errors()]) from None


def _coerced(annotation: Any, value: Any) -> Any:
    """Take a name for a config that has one, and a value for a list of one; all else as it is."""
    kind = _config_type(annotation)
    is_list = _list_type(annotation)
    whole = typing.get_origin(annotation) is not list and type(value) in typing.get_args(annotation)
    if is_list and value is not None and not whole:  # whole: of a field that takes one, or a list
        items = value if isinstance(value, list) else [value]
        return [_coerced(kind, item) if kind else item for item in items]
    if kind and isinstance(value, str) and kind.called in kind.model_fields:
        return {kind.called: value}
    if kind and isinstance(value, dict):
        inner = {name: field.annotation for name, field in kind.model_fields.items()}
        return {key: _coerced(inner[key], v) if key in inner else v for key, v in value.items()}
    return value


def _list_type(annotation: Any) -> bool:
    """Tell whether a field is a list; a mapping of lists is none."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    return origin is list or (origin is not dict and any(_list_type(kind) for kind in inner))


def _fault(model: type[Config], fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "config"
    if fault["type"] == "missing":
        return f"{key}: missing; set it in the config file or as {key}=value"
    given = f"{key}={fault['input']!r}"
    if fault["type"] == "extra_forbidden":
        known = _siblings(model, fault["loc"])
        mean = _below(model, key) or closest(str(fault["loc"][-1]), known)
        return (
            f"{key}: unknown key (given {fault['input']!r}); {mean}known keys: {', '.join(known)}"
        )
    message = fault["msg"].removeprefix("Value error, ")
    null = "; for no value write null" if str(fault["input"]).lower() == "none" else ""
    return f"{given}: {message[0].lower()}{message[1:]}{null}"


def _below(model: type[Config], key: str) -> str:
    """Suggest a key of a nested config that has the name of an unknown one: fit.steps for steps."""
    prefix, _, name = key.rpartition(".")
    near = [
        known
        for known, _, _ in describe(model)
        if known.startswith(prefix) and known.rpartition(".")[2] == name
    ]
    return f"did you mean {' or '.join(near)}? " if near else ""


def _siblings(model: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = _config_type(field.annotation) if field else _config_type(model)
    return sorted(getattr(model, "model_fields", {}))


def _config_type(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    for inner in typing.get_args(annotation):
        found = _config_type(inner)
        if found is not None:
            return found
    return None


def describe(
    model: type[Config], prefix: str = "", values: Any = None
) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted key, default, meaning) for every key of a config, nested ones included.

    values: an instance whose values are the defaults, where a stage has its own.
    """
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        value = getattr(values, name) if values else field.get_default()
        nested: Any = _config_type(field.annotation)
        if nested is not None and isinstance(field.annotation, type):
            inner = value if isinstance(value, Config) else None
            yield from describe(nested, f"{key}.", inner)
            continue
        default = "required" if value is PydanticUndefined else repr(_plain(value))
        allowed = [repr(value) for value in typing.get_args(field.annotation)]
        literal = typing.get_origin(field.annotation) is typing.Literal
        choices = f" [{' | '.join(allowed)}]" if literal else ""
        yield key, default, f"{field.description}{choices}{' (run)' if is_run(field) else ''}"
        if nested is not None:  # a list of configs, or one that may be left out
            many = typing.get_origin(field.annotation) is list
            yield from describe(nested, f"{key}[]." if many else f"{key}.")


def usage(model: type[Config], stage: str, summary: str) -> str:
    """Write the text of --help: what the stage does, and every key with default and meaning."""
    lines = [
        f"{summary}\n",
        f"usage: flowmatch {stage} CONFIG [key=value ...] [--dry-run] [--help]\n",
    ]
    lines += [
        "CONFIG is an experiment (a YAML file, or the name of a shipped one such as digits), or"
    ]
    lines += [
        "the config of this stage alone, such as the config.yaml of a run folder. --dry-run prints"
    ]
    lines += ["the plan. Values are YAML: net.block_out_channels=[32,64]. Several processes:"]
    lines += [f"accelerate launch -m flowmatch.pipelines.{stage} CONFIG [key=value ...]\n"]
    lines += [
        "Keys marked (run) may change when a command is repeated. The others are content: they"
    ]
    lines += ["decide the result, and a folder made with other values is refused.\n"]
    for key, default, meaning in describe(model):
        lines.append(f"  {key} = {default}\n      {meaning}")
    return "\n".join(lines)


def dump(config: Config) -> str:
    """Write a config, run fields included, as YAML that `load` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
