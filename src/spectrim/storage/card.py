"""The model card: a README.md that the Hub understands and that a reader can act on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

__all__ = ["model_card"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")


def model_card(
    title: str,
    *,
    base_model: str | None,
    recipe_name: str,
    recipe_yaml: str,
    numbers: Mapping[str, tuple[str, str]],
    protocol: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Markdown with the front matter of the Hub.

    Args:
        title: heading of the card.
        base_model: name of the original; linked in the front matter if it is a Hub id.
        recipe_name: name of the recipe.
        recipe_yaml: the complete resolved recipe.
        numbers: quantity -> (original, compressed), as text.
        protocol: how the numbers were measured.
        notes: what a reader should know, one sentence each.
    """
    matter = {"library_name": "transformers", "tags": ["spectrim", "low-rank", "svd", "compressed"]}
    if base_model is not None and HUB_ID.fullmatch(base_model):
        matter["base_model"] = base_model
    origin = f"`{base_model}`" if base_model else "a model"
    rows = [
        f"| {_cell(quantity)} | {_cell(before)} | {_cell(after)} |"
        for quantity, (before, after) in numbers.items()
    ]
    table = ["| | original | compressed |", "|---|---|---|", *rows] if rows else []
    fence = _fence(recipe_yaml)
    parts = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---",
        f"# {' '.join(title.split())}",
        f"Made from {origin} by [spectrim](https://github.com/spectrim/spectrim) with the recipe "
        f"`{recipe_name}`: linear layers of the decoder are stored as low-rank factors.",
        "## Use",
        "```python\n"
        "import spectrim  # lets transformers load the factors\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("this-folder", dtype="auto")\n'
        "```",
        "Without `import spectrim` loading stops at a shape mismatch. Change the dtype with "
        "`model.to(dtype)`. For tools that need ordinary weights: "
        "`spectrim export this-folder --dense -o dense-folder`.",
    ]
    if table:
        parts += ["## What it costs", "\n".join(table)]
    parts += [protocol] if protocol else []
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    parts += ["## Recipe", f"{fence}yaml\n{recipe_yaml.rstrip()}\n{fence}"]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _fence(text: str) -> str:
    """A code fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
