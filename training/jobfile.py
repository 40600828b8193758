"""Reading a job file: YAML with overrides to a checked job, and every mistake in one sentence that names the field.

Imports nothing heavy. No data is touched here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cluster.errors import UsageError
from training import yaml12

if TYPE_CHECKING:
    from training.config import Job

J = TypeVar("J", bound="Job")
MARK = "?"  # what `purser init` leaves for a person to fill in


def override(raw: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`raw` with each dotted key of `values` set; sections that are missing are made."""
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        at = raw
        for part in path:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise UsageError(f"{dotted}: {part} is no section of a job; see DESIGN or infra/jobs for the shape.")
        at[last] = value
    return raw


def load(kind: type[J], path: Path, assignments: Sequence[str] = (), *, elsewhere: bool = False) -> J:
    """Read the job file at `path` with `section.key=value` overrides.

    Args:
        elsewhere: it is to run on another machine, where nothing lies beside the job file.

    Raises:
        UsageError: one sentence that names the file or field, what was given, and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"JOB: {path} does not exist; name a job file such as infra/jobs/digits.yaml.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"JOB: {path} cannot be read ({type(error).__name__}); name a YAML text file.") from None
    raw = _read_yaml(text, f"JOB: {path}")
    values = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"override: {assignment!r} was given; write section.key=value.")
        values[key] = _read_yaml(value, f"{key}: {value!r}")
    if not isinstance(raw, dict):
        raise UsageError(f"JOB: {path} holds no sections; it needs account, privacy, data and model.")
    job = parse(kind, _with_deepspeed(override(raw, values), path.parent))
    if elsewhere:
        _check_elsewhere(job, path.parent)
        return job
    sections: dict[str, Any] = {
        name: section.model_copy(update={"source": _absolute(section.source, path.parent, f"{name}.source")})
        for name, section in (("data", job.data), ("evaluation", job.evaluation), ("audit", job.audit))
        if section.source is not None
    }
    if (model := job.model.path) is not None and _names_a_folder(model, path.parent):
        sections["model"] = job.model.model_copy(update={"path": _absolute(model, path.parent, "model.path")})
    return job.model_copy(update=sections)


def _with_deepspeed(raw: dict[str, Any], beside: Path) -> dict[str, Any]:
    """`raw` with the content of the file that `training.deepspeed` names: it is part of the job, wherever that runs."""
    training = raw.get("training")
    if not isinstance(training, dict) or not isinstance(named := training.get("deepspeed"), str):
        return raw
    path = Path(_absolute(named, beside, "training.deepspeed"))
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"training.deepspeed: {path} cannot be read ({type(error).__name__}); name a DeepSpeed configuration in "
            "JSON, or write its keys here."
        ) from None
    return {**raw, "training": {**training, "deepspeed": said}}


def _check_elsewhere(job: Job, beside: Path) -> None:
    """Refuse what names a place beside the job file."""
    named = {
        "data.source": job.data.source,
        "evaluation.source": job.evaluation.source,
        "audit.source": job.audit.source,
    }
    if (model := job.model.path) is not None and _names_a_folder(model, beside):
        named["model.path"] = model
    for field, place in named.items():
        if place is not None and ":" not in place and not place.startswith("/"):
            raise UsageError(
                f"{field}: {place!r} was given, which is a place of this machine's; for a cluster write the absolute "
                "path that all of its nodes see, or a URL."
            )


def _names_a_folder(path: str, beside: Path) -> bool:
    """Whether a model's path is meant, rather than a hub's id: it looks like one, or is there."""
    return path.startswith((".", "/", "~")) or (":" not in path and "\0" not in path and (beside / path).is_dir())


def _absolute(source: str, folder: Path, field: str) -> str:
    """A source that is a file, relative to `folder`, made absolute once; what comes bundled stays as it is."""
    if ":" in source:
        return source
    try:
        return str((folder / Path(source).expanduser()).resolve())
    except (RuntimeError, ValueError):  # ~somebody who is not there, or a null byte
        raise UsageError(f"{field}: {source!r} is no path; write the path of a file.") from None


def _read_yaml(text: str, what: str) -> Any:
    try:
        return yaml12.read(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}: {getattr(error, 'problem', None)}" if mark else ""
        raise UsageError(f"{what} is not YAML{where}; check its indentation, colons and keys.") from None


def parse(kind: type[J], raw: dict[str, Any]) -> J:
    """Check a job's values.

    Raises:
        UsageError: the first thing that is wrong, as one sentence.
    """
    if (field := _unfilled(raw)) is not None:
        raise UsageError(
            f'{field}: it is still to be filled in, "{MARK}" stands there; write the value that the comment beside it '
            "asks for."
        )
    try:
        job = kind.model_validate(raw)
    except ValidationError as error:
        raise UsageError(_sentence(kind, error)) from None
    job.charges()
    return job


def _unfilled(value: Any, path: str = "") -> str | None:
    """The first field that still holds the mark; as one category of several it is a category, as in the census."""
    if isinstance(value, dict):
        found = (_unfilled(one, f"{path}.{key}" if path else str(key)) for key, one in value.items())
        return next(filter(None, found), None)
    if isinstance(value, list) and MARK in value:
        a_word = path.endswith(".categories") and len(value) > value.count(MARK) == 1
        return None if a_word else path
    return path if value == MARK else None


def _sentence(kind: type[BaseModel], error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    field = ".".join(path)
    given = first.get("input")
    if first["type"] == "extra_forbidden":
        allowed = list(_section_at(kind, path[:-1]).model_fields)
        close = difflib.get_close_matches(path[-1], allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"allowed here are {', '.join(allowed)}."
        return f"{field}: this key is unknown; {hint}"
    if first["type"] == "missing":
        return f"{field}: it is missing and has no default; add it to the job file."
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        inner, colon, rest = message.partition(": ")
        known = bool(colon) and inner.replace(".", "_").isidentifier()
        return f"{'.'.join([*path, inner])}: {rest}." if known else f"{field}: {message}."
    return f"{field}: {given!r} was given; {message}."


def _section_at(kind: Any, path: Sequence[str]) -> Any:
    """The model class at `path` below `kind`, through optional fields and dictionaries of sections."""
    names = iter(path)
    for part in names:
        annotation = kind.model_fields[part].annotation
        if get_origin(annotation) is dict:
            next(names, None)  # the key, whatever it is called
        kind = next((one for one in (*get_args(annotation), annotation) if hasattr(one, "model_fields")), kind)
    return kind
