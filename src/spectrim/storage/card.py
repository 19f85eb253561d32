"""The model card: a README.md that the Hub understands and that a reader can act on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from spectrim.storage.origin import Origin
from spectrim.storage.paths import last_part, without_folders

TAGS = ["spectrim", "low-rank", "svd", "compressed"]


@dataclass(frozen=True)
class Card:
    """A card's contents.

    Attributes:
        title: its heading.
        base_model: name of the original; linked in the front matter if it is a Hub id.
        recipe_name: name of the recipe.
        recipe_yaml: the complete resolved recipe.
        numbers: quantity -> (original, compressed), as text.
        protocol: how the numbers were measured.
        notes: what a reader should know, one sentence each.
        origin: what is carried over from the original.
        measured: perplexities before and after, as in a report's `measured`.
        outside: which shares no budget counts, in words; empty if unknown.
    """

    title: str
    base_model: str | None
    recipe_name: str
    recipe_yaml: str
    numbers: Mapping[str, tuple[str, str]]
    protocol: str = ""
    notes: Sequence[str] = ()
    origin: Origin = field(default_factory=Origin)
    measured: Sequence[Mapping[str, Any]] = ()
    outside: str = ""

    def text(self) -> str:
        """Markdown with the front matter of the Hub; no path of this machine is in it."""
        name = last_part(self.base_model) if self.base_model else "a model"
        made_from = f"[{self.origin.hub_id}](https://huggingface.co/{self.origin.hub_id})"
        recipe_yaml = without_folders(self.recipe_yaml)
        fence = _fence(recipe_yaml)
        parts = [
            f"---\n{yaml.safe_dump(_matter(self), sort_keys=False)}---",
            f"# {_line(self.title)}",
            f"Made from {made_from if self.origin.hub_id else f'`{name}`'} by "
            "[spectrim](https://github.com/spectrim/spectrim) with the recipe "
            f"`{self.recipe_name}`: linear layers of the decoder are stored as low-rank factors.",
            "## How to load it",
            "```sh\npip install spectrim\n```",
            "```python\n"
            "import spectrim  # lets transformers load the factors\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("this-folder", dtype="auto")\n'
            'tokenizer = AutoTokenizer.from_pretrained("this-folder")\n'
            "```",
            "Without `import spectrim` loading stops at a shape mismatch. For tools that need "
            "ordinary weights: `spectrim export this-folder --dense -o dense-folder`.",
            "## What is lost",
            "\n".join(_table(self.numbers, self.measured)),
            f"Outside the budget: {_line(self.outside)}." if self.outside else "",
            _loss(self.measured),
            self.protocol,
            "\n".join(f"- {_line(without_folders(note))}" for note in self.notes),
            "## License",
            _license(self.origin),
            "## Recipe",
            f"{fence}yaml\n{recipe_yaml.rstrip()}\n{fence}",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _matter(card: Card) -> dict[str, Any]:
    matter: dict[str, Any] = {
        **card.origin.matter,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": TAGS,
    }
    if card.origin.hub_id:
        matter |= {"base_model": card.origin.hub_id, "base_model_relation": "quantized"}
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": _line(last_part(m["text"])), "type": "text"},
            "metrics": [
                {
                    "type": "perplexity",
                    "name": f"perplexity ({which})",
                    "value": round(float(m[key]["perplexity"]), 4),
                }
                for key, which in (("compressed", "this model"), ("dense", "the original"))
            ],
        }
        for m in card.measured
    ]
    if results:
        matter["model-index"] = [{"name": _line(card.title), "results": results}]
    return matter


def _table(
    numbers: Mapping[str, tuple[str, str]], measured: Sequence[Mapping[str, Any]]
) -> list[str]:
    rows = [(quantity, *pair) for quantity, pair in numbers.items()]
    rows += [
        (
            f"perplexity, {last_part(m['text'])}",
            f"{m['dense']['perplexity']:.2f}",
            f"{m['compressed']['perplexity']:.2f}",
        )
        for m in measured
    ]
    body = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return ["| | original | compressed |", "|---|---|---|", *body] if body else []


def _loss(measured: Sequence[Mapping[str, Any]]) -> str:
    if not measured:
        return "Quality was not measured; measure it on your own text before you rely on it."
    words = [
        f"{last_part(m['text'])}: {m['windows']} windows of {m['window_length']} tokens, "
        f"{m['what']}"
        for m in measured
    ]
    return (
        f"Perplexity was measured on {'; '.join(words)}. Other abilities (long answers, rare "
        "facts, other languages, refusals) may suffer more than perplexity shows and were not "
        "measured."
    )


def _license(origin: Origin) -> str:
    name = origin.matter.get("license_name") or origin.matter.get("license")
    files = ", ".join(f"`{path.name}`" for path in origin.files)
    if name is None and not files:
        return (
            "The original's folder names no license. Its terms hold for this model too; look them "
            "up before you share it."
        )
    named = f" ({name})" if name is not None else ""
    return f"That of the original{named}{f'; see {files}' if files else ''}."


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _cell(text: str) -> str:
    return _line(text).replace("|", r"\|")


def _fence(text: str) -> str:
    """A code fence longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)
