"""Show that calibration windows follow the comparison protocol of the books texts.

    python benchmarks/check_windows.py books_train.txt.gz

`benchmarks/prepare_books.py` makes the text. The protocol draws 128 windows of 256 tokens at
`torch.randint(0, N - 257, (128,), generator=torch.Generator().manual_seed(0))` from the text's
N = 16,818,475 tokens of the bundled model. Tokenising takes a minute or two, which is why this is
no test; `tests/data/test_windows.py` checks the same law on small texts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

import spectrim.demo
from spectrim.data import calibration_windows, read_text

MODEL = Path(spectrim.demo.__file__).parent / "llama-books"
TOKENS = 16_818_475


def main(path: str) -> int:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    begin = time.perf_counter()
    windows = calibration_windows(
        read_text(path), tokenizer, windows=128, window_length=256, seed=0
    )
    seconds = time.perf_counter() - begin
    generator = torch.Generator().manual_seed(0)
    expected = torch.randint(0, TOKENS - 257, (128,), generator=generator)
    same = torch.equal(windows.starts, expected)
    print(f"tokens      {windows.text_tokens[0]:,} (protocol: {TOKENS:,})")
    print(f"starts      {'as in the protocol' if same else 'DIFFER from the protocol'}")
    print(f"fingerprint {windows.fingerprint()}")
    print(f"seconds     {seconds:.0f}")
    return 0 if same else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/check_windows.py TEXT")
    sys.exit(main(sys.argv[1]))
