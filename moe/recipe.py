"""A YAML page and key=value overrides -> a section of settings; and back to YAML."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from moe.config.base import PathText, Section, brief, build
from moe.errors import ConfigError

__all__ = ["PathText", "Section", "dump", "load", "parse"]

S = TypeVar("S", bound=Section)


def load(cls: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read `path` (YAML), apply `overrides` such as `train.steps=10`, build `cls`.

    Raises `ConfigError`: no such file, not YAML, a key twice, and whatever the section refuses.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{path}: the recipe cannot be read ({reason}). Give the path of a YAML file."
        ) from None
    return parse(cls, text, overrides, source=str(path))


def parse(cls: type[S], text: str, overrides: Sequence[str] = (), *, source: str) -> S:
    """As `load`, from text; `source` names it in errors."""
    page = _yaml(text, source)
    if page is None:
        page = {}
    if not isinstance(page, dict):
        raise ConfigError(f"{source}: a recipe is a page of `key: value` lines, but this is {brief(page)}.")
    for override in overrides:
        _set(page, override)
    return build(cls, page, source)


def dump(section: Section) -> str:
    """The resolved section as YAML, defaults included, that `parse` reads back to an equal section."""
    page = section.model_dump(mode="json")
    text: str = yaml.dump(page, Dumper=_RecipeDumper, sort_keys=False, width=110)
    return text


def _set(page: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"override {brief(override)}: write key=value with the full path, for example train.steps=100."
        )
    here = page
    for depth, key in enumerate(keys[:-1]):
        here = here.setdefault(key, {}) if here.get(key) is not None else _fresh(here, key)
        if not isinstance(here, dict):
            block = ".".join(keys[: depth + 1])[:100]
            raise ConfigError(
                f"override {brief(override)}: {block} is {brief(here)} in the recipe, not a block. Write all of it: "
                f"{block}=VALUE."
            )
    here[keys[-1]] = _yaml(text, f"override {brief(override)}")


def _fresh(parent: dict[str, Any], key: str) -> dict[str, Any]:
    parent[key] = {}
    block: dict[str, Any] = parent[key]
    return block


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeLoader)  # noqa: S506  a subclass of the safe loader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{line}: this is not YAML ({error.problem}). Mend it there.") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: this is not YAML ({reason}). Mend it there.") from None
    except _PageError as error:
        raise ConfigError(f"{source}, line {error.line}: {error}") from None
    except RecursionError:
        raise ConfigError(
            f"{source}: blocks or lists are nested too deep to be a recipe. Flatten it."
        ) from None


class _PageError(Exception):
    """Good YAML, but no recipe."""

    def __init__(self, message: str, mark: yaml.Mark) -> None:
        super().__init__(message)
        self.line = mark.line + 1


class _RecipeLoader(yaml.SafeLoader):
    """The safe loader, with YAML 1.2's floats (1e-3 is a number), no dates, no merges and no key twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As the base, but a scalar that is not what its tag says is refused with its place."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            kind = _KINDS.get(node.tag.rpartition(":")[2], f"a {node.tag}")
            raise _PageError(
                f"{brief(node.value)} cannot be read as {kind}. Correct it, or quote it if it is a word.",
                node.start_mark,
            ) from None


_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "timestamp": "a date"}


class _RecipeDumper(yaml.SafeDumper):
    """Its counterpart: quotes the words that the loader would take for numbers."""


def _mapping(loader: _RecipeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:
            raise _PageError(
                "merge keys (<<) are not supported: every setting stands in its own block. Write them out.",
                key_node.start_mark,
            )
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise _PageError(f"{brief(key)}: a setting's name must be a word. Quote it.", key_node.start_mark)
        if key in seen:
            raise _PageError(
                f"{brief(key)} stands twice in one block. Keep one of them.", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_MERGE, _DATE = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:timestamp"
_RecipeLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
for _side in (_RecipeLoader, _RecipeDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
_RecipeLoader.yaml_implicit_resolvers = {  # a setting is never a date, but a name may look like one
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
    for first, resolvers in _RecipeLoader.yaml_implicit_resolvers.items()
}
