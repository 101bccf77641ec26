"""Configs: pydantic models beside the code they configure; YAML files and `key=value` on top.

Every field is *content* (it changes what comes out) or *run* (paths, intervals, workers, trackers).
Only content enters fingerprints and manifests: changing a run field resumes, changing content is an
error that lists the keys.
"""

import io
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined


class UserError(ValueError):
    """A mistake that its maker can mend: one line a fault; a stage prints them and exits 2."""

    def __init__(self, faults: str | list[str]):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class NotReady(UserError):
    """An input is not made yet: an error for a stage that runs, a remark for one that only plans."""


class Faults:
    """Collect the UserErrors of several `with faults:` blocks, to report all of them at once."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if isinstance(error, UserError):
            self.errors.append(error)
            return True
        return False

    def check(self) -> None:
        """Raise what was collected: NotReady where nothing is wrong but inputs that are not made."""
        lines = [line for error in self.errors for line in error.faults]
        if self.errors and all(isinstance(error, NotReady) for error in self.errors):
            raise NotReady(lines)
        if self.errors:
            raise UserError(lines)


class Config(pydantic.BaseModel):
    """Base of all configs: unknown keys are faults, values are never changed after loading."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


def option(default: Any, meaning: str, *, run: bool = False, **bounds: Any) -> Any:
    """Declare a field: its default, its meaning with unit, and bounds (ge, gt, le, lt)."""
    if isinstance(
        default, Config
    ):  # a nested model: a fresh default, so that subclasses may differ
        return pydantic.Field(default=default, description=meaning, json_schema_extra={"run": run})
    return pydantic.Field(
        default=default, description=meaning, json_schema_extra={"run": run}, **bounds
    )


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


@dataclass(frozen=True)
class Call:
    """What the command line asks for beside the config."""

    dry_run: bool = False
    help: bool = False


C = TypeVar("C", bound=Config)


def load(model: type[C], argv: list[str]) -> tuple[C | None, Call]:
    """Read `CONFIG.yaml key=value ... [--dry-run] [--help]` into a config; CONFIG may be a URL.

    Later values win; values are YAML, keys are dotted. Raises UserError with every fault at once.
    With --help the config is None.
    """
    flags = [word for word in argv if word.startswith("-")]
    unknown = [word for word in flags if word not in ("--dry-run", "--help", "-h")]
    if unknown:
        raise UserError([f"{word}: unknown flag; known: --dry-run, --help" for word in unknown])
    call = Call("--dry-run" in flags, "--help" in flags or "-h" in flags)
    if call.help:
        return None, call
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    files = [word for word in argv if "=" not in word and word not in flags]
    merged: Any = OmegaConf.create()
    faults: list[str] = []
    for file in files:
        try:
            read: Any = OmegaConf.load(_fetched(file) if "://" in file else file)
            if not OmegaConf.is_dict(read):
                raise UserError(f"{file}: expected a mapping of keys to values")
            if Path(file).name == "config.yaml":  # a run folder's own: `inputs` are its digests,
                read.pop("inputs", None)  # which `runs.folder.begin` holds against what is there
            merged = OmegaConf.merge(merged, read)
        except FileNotFoundError:
            faults.append(f"{file}: no such config file")
        except UserError as error:
            faults += error.faults
        except (YAMLError, OmegaConfBaseException, OSError, ValueError, ImportError) as error:
            faults.append(f"{file}: not readable as YAML: {' '.join(str(error).split())}")
    for word in argv:
        if "=" in word and word not in flags:
            try:
                merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([word]))
            except (YAMLError, OmegaConfBaseException, ValueError) as error:
                faults.append(f"{word}: not readable as key=value: {' '.join(str(error).split())}")
    try:
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        faults.append(f"{' '.join(files)}: {' '.join(str(error).split())}")
        values = {}
    if faults:
        raise UserError(faults)
    return validate(model, values), call


def _fetched(url: str) -> Any:
    import fsspec  # the config.yaml of pairs in an object store

    try:
        with fsspec.open(url) as file:
            return io.BytesIO(file.read())
    except FileNotFoundError:
        raise
    except Exception as error:  # each client has its own kinds, which share no base
        told = " ".join(str(error).split()) or repr(error)
        raise UserError(
            f"{url}: the store refuses ({type(error).__name__}: {told}); see that its client is "
            "installed, reaches it and has credentials"
        ) from error


def validate(model: type[C], values: dict[str, Any]) -> C:
    """Build a config from plain values; raise UserError with one line for each fault.

    Where a field is a config and has a default, keys that are left out are the default's.
    """
    for name, field in model.model_fields.items():
        if isinstance(field.default, Config) and isinstance(values.get(name), dict):
            values = values | {name: field.default.model_dump(mode="json") | values[name]}
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError([_fault(model, fault) for fault in error.errors()]) from None


def _fault(model: type[Config], fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"]) or "config"
    if fault["type"] == "missing":
        return f"{key}: missing; set it in the config file or as {key}=value"
    given = f"{key}={fault['input']!r}"
    if fault["type"] == "extra_forbidden":
        known = ", ".join(_siblings(model, fault["loc"]))
        return f"{key}: unknown key (given {fault['input']!r}); known keys there: {known}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{given}: {message[0].lower()}{message[1:]}"


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
    lines = [f"{summary}\n", f"usage: python -m pipelines.{stage} CONFIG.yaml [key=value ...]"]
    lines += ["       [--dry-run: print the resolved config and the plan]  [--help]\n"]
    lines += ["Keys marked (run) may change between repeats of a command; the others are content:"]
    lines += ["they decide what comes out, and a folder made with others is refused.\n"]
    for key, default, meaning in describe(model):
        lines.append(f"  {key} = {default}\n      {meaning}")
    return "\n".join(lines)


def dump(config: Config) -> str:
    """Write a config, run fields included, as YAML that `load` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
