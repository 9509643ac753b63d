"""The strict, frozen base of all sections, and plain data -> section with errors a person can act on."""

import difflib
import os
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from moe.errors import ConfigError


class Section(BaseModel):
    """A block of settings: unknown keys, wrong types and later changes are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


S = TypeVar("S", bound=Section)

LARGEST = 2**31 - 1
LINES, WIDTH, COMPONENT, PATH = 20, 60, 255, 4095

Size = Annotated[int, Field(gt=0, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]


def _writable(path: str) -> str:
    if not path.strip():
        raise ValueError("it must not be empty: write a path")
    if "\0" in path:
        raise ValueError("it must be a path without zero bytes")
    if path.startswith("~"):
        raise ValueError("write the full path: the shell expands ~ only at the start of a word")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError("it must be made of characters that a file name can hold") from None
    if len(encoded) > PATH or max(map(len, encoded.split(b"/"))) > COMPONENT:
        raise ValueError(f"it must have at most {COMPONENT} bytes between slashes, and {PATH} in all")
    return path


PathText = Annotated[str, AfterValidator(_writable)]
"""The path of a file or folder, such as the system takes it."""


def build(cls: type[S], data: Mapping[str, Any], source: str) -> S:
    """Build `cls` from plain data.

    Raises `ConfigError` with a line for each fault: the full path, the value, the rule, the way out.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as invalid:
        refuse(_lines(cls, invalid), source)
        raise AssertionError("an error without a fault") from None
    except ConfigError as contradiction:  # from the rules between sections, which do not know the source
        raise ConfigError(f"{source}: {contradiction}") from None


def faults(cls: type[Section], data: Mapping[str, Any]) -> list[str]:
    """What `build` would refuse, a line each."""
    try:
        cls.model_validate(data)
    except ValidationError as invalid:
        return _lines(cls, invalid)
    return []


def refuse(lines: list[str], source: str = "") -> None:
    """Raise `ConfigError` if there are faults; of very many, the first."""
    if len(lines) > LINES:
        lines = [*lines[:LINES], f"... and {len(lines) - LINES} more like these."]
    if lines:
        raise ConfigError((f"{source}: " if source else "") + "\n       ".join(lines)) from None


def brief(value: object) -> str:
    """`repr` in about 60 characters, at once for a value of any size or depth."""
    text = _brief.repr(value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 6, 12, 12
        self.maxstring = self.maxother = self.maxlong = WIDTH

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out a number of more than 4300 digits.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"a number of {x.bit_length()} bits"


_brief = _Brief()


def _lines(cls: type[Section], invalid: ValidationError) -> list[str]:
    return [_explain(cls, dict(fault)) for fault in invalid.errors(include_url=False)]


def _explain(cls: type[Section], fault: dict[str, Any]) -> str:
    steps = [str(step) for step in fault["loc"]]
    kind = fault["type"]
    if kind == "extra_forbidden":
        return _unknown(_known(_sections_at(cls, steps[:-1])), _shown(cls, steps))
    path = ".".join(_shown(cls, steps))
    field = _known(_sections_at(cls, steps[:-1])).get(steps[-1]) if steps else None
    meaning = f" ({steps[-1]}: {_one_line(field.description)})" if field and field.description else ""
    if kind == "missing":
        return f"{path} is required, but it is not set{meaning}. Add it to the recipe{_or_set(path)}."
    value = fault["input"]
    if kind in ("model_type", "model_attributes_type"):
        keys = ", ".join(_known(_sections_at(cls, steps)))
        return f"{path or 'the recipe'} is {brief(value)}: it must be a block of settings: {keys}."
    rule = fault["msg"].replace("Input should be", "it must be").replace("Value error, ", "")
    rule = rule[0].lower() + rule[1:]
    return f"{path} is {brief(value)}: {rule}{meaning}. Change it in the recipe{_or_set(path)}."


def _or_set(path: str) -> str:
    """The override that would do; inside a list there is none."""
    return "" if any(step.isdigit() for step in path.split(".")) else f", or set {path}=VALUE"


def _shown(cls: type[BaseModel], steps: list[str]) -> list[str]:
    """The path as a person writes it: pydantic puts the tag of a union in between."""
    return [
        step if len(step) <= WIDTH else f"{step[: WIDTH - 3]}..."
        for depth, step in enumerate(steps)
        if step.isdigit()
        or depth == len(steps) - 1
        or any(step in section.model_fields for section in _sections_at(cls, steps[:depth]))
    ]


def _unknown(known: dict[str, FieldInfo], steps: list[str]) -> str:
    close = difflib.get_close_matches(steps[-1], known, n=1, cutoff=0.6)
    if close:
        parent = "".join(f"{step}." for step in steps[:-1])
        return f"{'.'.join(steps)}: there is no such setting; did you mean {parent}{close[0]}?"
    return f"{'.'.join(steps)}: there is no such setting; here are {', '.join(known)}."


def _sections_at(cls: type[BaseModel], steps: list[str]) -> list[type[BaseModel]]:
    """The sections that a path may lead to; more than one where a list holds a tagged union."""
    here = [cls]
    for step in steps:
        fields = [section.model_fields[step] for section in here if step in section.model_fields]
        if fields:
            here = [model for field in fields for model in _models_in(field.annotation)]
        else:  # an index into a list, or the tag of a union
            here = [section for section in here if _has_tag(section, step)] or here
    return here


def _known(sections: list[type[BaseModel]]) -> dict[str, FieldInfo]:
    return {name: field for section in sections for name, field in section.model_fields.items()}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _has_tag(section: type[BaseModel], tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in section.model_fields.values())


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
