"""`spectrim demo`: the whole job on the bundled model and texts, without a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from spectrim import api
from spectrim.data.text import read_text
from spectrim.data.windows import evaluation_windows
from spectrim.evaluate.perplexity import perplexity
from spectrim.evaluate.samples import continuations
from spectrim.run.loading import LoadedModel, load_model
from spectrim.run.progress import Progress, Silent
from spectrim.serve.speed import speed

_HERE = Path(__file__).parent
MODEL = _HERE / "llama-books"
CALIBRATION = _HERE / "calibration.txt"
HELD_OUT = _HERE / "heldout.txt"
PROMPT = "The old house stood at the end of the lane, and"
WINDOWS, WINDOW_LENGTH = 64, 256


def _measure(loaded: LoadedModel, folder: Path) -> dict[str, Any]:
    windows = evaluation_windows(read_text(HELD_OUT), loaded.tokenizer, window_length=WINDOW_LENGTH)
    timing = speed(loaded.model, prompt_length=128, new_tokens=48, repeats=3)
    return {
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        **perplexity(loaded.model, windows).record(),
        "prefill_tokens_per_second": timing.prefill,
        "decode_tokens_per_second": timing.decode,
    }


def run_demo(
    output: str | Path,
    *,
    keep: float = 0.6,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress the bundled model, load the result as any user would, and measure both.

    Args:
        output: folder to write.
        keep: kept fraction of the target bytes.
        overwrite: replace an existing folder.
        progress: told of the stages.

    Returns:
        JSON-ready: `dense` and `compressed` measurements, `report`, `samples`, `seconds`, `output`.
    """
    progress = progress or Silent()
    started = time.perf_counter()
    result = api.compress(
        str(MODEL),
        keep=keep,
        text=CALIBRATION,
        windows=WINDOWS,
        window_length=WINDOW_LENGTH,
        output=output,
        overwrite=overwrite,
        progress=progress,
    )
    compressing = time.perf_counter() - started
    progress.start("evaluate", 2)
    # Loaded afresh from the folder, with the call that a user would write.
    models = {"dense": load_model(MODEL), "compressed": load_model(output)}
    folders = {"dense": MODEL, "compressed": Path(output)}
    measured = {}
    for name, loaded in models.items():
        measured[name] = _measure(loaded, folders[name])
        progress.advance("evaluate", name)
    progress.finish("evaluate")
    samples = continuations(
        {name: loaded.model for name, loaded in models.items()},
        models["dense"].tokenizer,
        [PROMPT],
        new_tokens=48,
    )
    return {
        **measured,
        "recipe": result.recipe.name,
        "keep": result.plan.achieved_keep,
        "seconds": {"compress": compressing, "total": time.perf_counter() - started},
        "prompt": PROMPT,
        "samples": {s.model: s.continuation for s in samples},
        "output": str(output),
    }
