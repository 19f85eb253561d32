"""What an adapter of rank 16 is worth: to a rounded or a cut base, and for a fine-tuned model.

Bases are the bundled model, cut by `svd-llm` to keep 0.5 and rounded to 3 and 2 bits by the default
recipe. For each, `spectrim adapter` in every metric, calibrated on the bundled calibration text;
for the cut one `spectrim heal` on the same text as well. Then the bundled model is tuned (all
parameters) on Python's standard library, and the tuning extracted as a LoRA; norms and embeddings
stay those of the base. Perplexity is measured on text that nothing was made from, base and adapter
together as `spectrim evaluate BASE --adapter DIR` does.

    python benchmarks/adapters.py --output benchmarks/results/adapters.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sysconfig
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from spectrim import api
from spectrim.demo.run import CALIBRATION, HELD_OUT, MODEL

RANK, LENGTH, WINDOWS = 16, 256, 64
CALIBRATED = {"text": CALIBRATION, "windows": WINDOWS, "window_length": LENGTH}
BASES: dict[str, dict[str, Any]] = {
    "svd-llm, keep 0.5": {"recipe": "svd-llm", "keep": 0.5},
    "int3-g64, nothing cut": {"storage": "dense", "weights": "int3-g64", "keep": 0.21},
    "int2-g64, nothing cut": {"storage": "dense", "weights": "int2-g64", "keep": 0.145},
}
STEPS, BATCH, RATE = 80, 8, 5e-4
"""Of the tuning on Python."""


def measured(model: Path, text: Path, adapter: Path | None = None) -> dict[str, float]:
    """Perplexity and stored bytes."""
    record = api.evaluate(model, text=str(text), window_length=LENGTH, adapter=adapter)
    (found,) = record["perplexity"].values()
    return {"perplexity": found["perplexity"], "bytes": record["stored_bytes"]}


def repaired(place: Path) -> list[dict[str, Any]]:
    """A row per base and metric."""
    rows: list[dict[str, Any]] = []
    for number, (name, words) in enumerate(BASES.items()):
        base = place / f"base-{number}"
        api.compress(MODEL, output=base, **CALIBRATED, **words)
        rows.append({"base": name, "with": None, **measured(base, HELD_OUT)})
        for metric in ("plain", "whitened", "kfac"):
            said = {} if metric == "plain" else CALIBRATED
            made = place / f"{metric}-{number}"
            found = api.adapter(base, MODEL, rank=RANK, metric=metric, output=made, **said)
            rows.append(
                {
                    "base": name,
                    "with": metric,
                    **measured(base, HELD_OUT, made),
                    "left": found.facts["left"] / found.facts["difference"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    healed = place / "healed"
    healing = {"steps": 60, "window_length": LENGTH}
    api.heal(place / "base-0", text=CALIBRATION, output=healed, **healing)
    rows.append({"base": next(iter(BASES)), "with": "heal", **measured(healed, HELD_OUT)})
    return rows


def sources(place: Path) -> tuple[Path, Path]:
    """Python's standard library: every fourth module is held out."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files = place / "tune.txt", place / "held.txt"
    for file, own in zip(files, (False, True), strict=True):
        chosen = [one for i, one in enumerate(modules) if (i % 4 == 3) == own]
        text = "\n".join(one.read_text(encoding="utf-8") for one in chosen)
        file.write_text(text[: 100_000 if own else 1_000_000], encoding="utf-8")
    return files


def tune(text: Path, output: Path) -> None:
    """All parameters of the bundled model, as anyone would tune it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8")).input_ids)
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, 10 * (1 - step / STEPS), (step + 1) / 8)
        batch = windows[torch.randint(len(windows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def extracted(place: Path) -> list[dict[str, Any]]:
    """The base, the tuned model, and the base with what an adapter holds of the tuning."""
    own, held = sources(place)
    tune(own, place / "tuned")
    rows: list[dict[str, Any]] = [
        {"with": None, **measured(Path(MODEL), held)},
        {"with": "the tuned model itself", **measured(place / "tuned", held)},
    ]
    for metric in ("plain", "kfac"):
        said = {} if metric == "plain" else {**CALIBRATED, "text": own}
        for rank in (RANK, 2 * RANK):
            made = place / f"tuning-{metric}-{rank}"
            words = {"metric": metric, "rank": rank, "allow_differences": True, **said}
            api.adapter(MODEL, place / "tuned", output=made, **words)
            found = measured(Path(MODEL), held, made)
            rows.append({"with": f"{metric}, rank {rank}", **found})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Both halves, and what they depend on."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as temporary:
        found = {"repaired": repaired(Path(temporary)), "extracted": extracted(Path(temporary))}
    packages = ("torch", "transformers", "peft")
    record = {
        "what": "the bundled model with adapters of rank 16, perplexity in windows of 256 tokens",
        "versions": {one: version(one) for one in packages} | {"python": platform.python_version()},
        "calibration": {"windows": WINDOWS, "window_length": LENGTH},
        "tuning": {"steps": STEPS, "batch": BATCH, "learning_rate": RATE},
        **found,
    }
    asked.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
