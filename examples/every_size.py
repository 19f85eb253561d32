"""Measure a model once, and try every size of it in memory before one is written.

python examples/every_size.py [MODEL [TEXT.txt [OUT]]]
"""

import sys
from pathlib import Path

import spectrim
from spectrim.demo.run import CALIBRATION, MODEL

KEEPS = (0.9, 0.7, 0.5)


def main(model=MODEL, text=CALIBRATION, output="sizes", **options):
    """A survey, three sizes in memory, one on disk; `options` are words of `spectrim.survey`."""
    survey, written = Path(output) / "survey", Path(output) / "at-0.7"
    spectrim.survey(model, text=text, output=survey, **options)

    elastic = spectrim.load_elastic(survey)
    prompt = elastic.tokenizer("The old house stood", return_tensors="pt")
    for keep in KEEPS:
        plan = elastic.resize(keep)  # in place, at once, and reversible
        new = elastic.model.generate(**prompt, max_new_tokens=12, do_sample=False)
        print(f"{plan.achieved_keep:.3f} of the bytes: {elastic.tokenizer.decode(new[0])}")

    spectrim.resize(survey, keep=0.7, output=written)
    print(f"written: {written}")
    return elastic


if __name__ == "__main__":
    main(*sys.argv[1:])
