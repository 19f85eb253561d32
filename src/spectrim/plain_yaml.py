"""YAML that may come from a stranger: a bounded file, plain data, no aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from spectrim.errors import RecipeError

LARGEST_FILE = 2**20

# What yaml's constructors raise on scalars such as `2001-99-99` or `!!int ""`, and on deep nesting.
_BAD_SCALARS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can stand for more data than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.YAMLError(f"recipes have no aliases, found one at {event.start_mark}")
        return super().compose_node(parent, index)


def parse_plain(text: str, *, source: str) -> dict[str, Any]:
    """The mapping that a text says.

    Raises:
        RecipeError: it is not valid YAML, or no mapping.
    """
    try:
        data = yaml.load(text, _PlainLoader)  # noqa: S506 (a safe loader, and less)
    except (yaml.YAMLError, *_BAD_SCALARS) as error:
        raise RecipeError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{source} must be a mapping of recipe fields, found {type(data)}")
    return data


def read_bounded(path: str | Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: it cannot be read, or is too large to be a recipe.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(LARGEST_FILE + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as a recipe: {error}") from error
    if len(text) > LARGEST_FILE:
        raise RecipeError(f"{path} is larger than {LARGEST_FILE} bytes and no recipe")
    return text
