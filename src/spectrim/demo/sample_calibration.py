"""Make the demo's calibration text: samples of the bundled model, temperature 1, seed 0.

    python -m spectrim.demo.sample_calibration

wrote `calibration.txt` beside this file (512 windows of 256 tokens, the length that the model was
trained on; about 0.5 MB) and takes a few minutes on one core. Another path may be given as the only
argument. Samples are drawn in fp32 on one thread; a different build of torch may round a logit
differently and then continues a window with other words, which is why the text is committed too.
"""

from __future__ import annotations

import sys
from pathlib import Path

WINDOWS = 512
WINDOW_LENGTH = 256
SEED = 0
BATCH = 128
SEPARATOR = "\n"
"""The model's training text has one paragraph a line and no blank lines."""
SHA256 = "3402b1a809a13500ac83eb6eaf59acb433c58eecda007f7c198e641a6960adf3"
"""Of the committed text; drawn with torch 2.13.0 on an x86-64 CPU."""


def sample_calibration(path: Path) -> str:
    """Sample the text and write it to `path`; returns it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spectrim.data.self_text import write_self_text

    # The order of a sum, and with it the last bit of a logit, depends on the number of threads.
    torch.set_num_threads(1)
    folder = Path(__file__).parent / "llama-books"
    return write_self_text(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
        path,
        windows=WINDOWS,
        window_length=WINDOW_LENGTH,
        seed=SEED,
        batch=BATCH,
        separator=SEPARATOR,
    )


if __name__ == "__main__":
    given = sys.argv[1:]
    sample_calibration(Path(given[0]) if given else Path(__file__).parent / "calibration.txt")
