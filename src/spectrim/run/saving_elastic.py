"""From a training that gives every size to its elastic artifact."""

from __future__ import annotations

from pathlib import Path

from spectrim.allocate.budget import format_bytes
from spectrim.run.compress import Outcome
from spectrim.run.loading import load_model
from spectrim.storage.elastic import save_elastic

__all__ = ["save_elastic_outcome"]


def save_elastic_outcome(
    outcome: Outcome,
    output: str | Path,
    *,
    overwrite: bool = False,
    original: str | Path | None = None,
) -> None:
    """Write the artifact; with `original` the base checkpoint is read again and included.

    Raises:
        OutputError: the destination is taken or cannot be written; nothing is left there.
        ModelError: the original cannot be loaded.
    """
    assert outcome.elastic is not None
    order, other = outcome.elastic.order, outcome.elastic.base.other_bytes
    outcome.report["elastic"] = {
        "smallest_keep": order.smallest_keep,
        "smallest_bytes": order.smallest_bytes + other,
        "largest_bytes": order.dense_bytes + other,
    }
    outcome.report["notes"].append(
        f"written as an elastic artifact: `spectrim resize` gives every keep from "
        f"{order.smallest_keep:.4f} to 1"
    )
    base = None if original is None else load_model(original, device="cpu", dtype="auto")
    save_elastic(
        outcome.elastic,
        output,
        recipe_yaml=outcome.recipe.to_yaml(),
        report=outcome.report,
        card=_card(outcome),
        base_model=None if base is None else base.model.to(base.stored_dtype),
        tokenizer=outcome.tokenizer,
        overwrite=overwrite,
    )


def _card(outcome: Outcome) -> str:
    elastic = outcome.elastic
    assert elastic is not None
    order, other = elastic.order, elastic.base.other_bytes
    name = Path(elastic.base.name).name
    return (
        "\n\n".join(
            [
                f"# {name} at every size",
                f"Ordered low-rank components of the linear layers of `{elastic.base.name}`, made "
                "by [spectrim](https://github.com/spectrim/spectrim) with the recipe "
                f"`{outcome.recipe.name}`. This folder is no model by itself: it gives one of any "
                f"size from {format_bytes(order.smallest_bytes + other)} (keep "
                f"{order.smallest_keep:.4f}) to {format_bytes(order.dense_bytes + other)} (dense).",
                "```python\nimport spectrim\n\n"
                'elastic = spectrim.load_elastic("this-folder")\n'
                f"elastic.resize({max(order.smallest_keep, 0.5):.2f})  # at once, and reversible\n"
                "elastic.model\n```",
                "```\nspectrim resize this-folder --keep 0.5 -o smaller\n```",
                f"```yaml\n{outcome.recipe.to_yaml().rstrip()}\n```",
            ]
        )
        + "\n"
    )
