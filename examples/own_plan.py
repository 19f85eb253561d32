"""Decide ranks yourself: protect layers, take the rule's plan, and change it where you know better.

python examples/own_plan.py [MODEL [TEXT.txt [OUT]]]
"""

import sys
from dataclasses import replace

import spectrim
from spectrim.demo.run import CALIBRATION, MODEL

PROTECTED = "*.layers.0.*"


def main(model=MODEL, text=CALIBRATION, output="planned", **options):
    """The first block stays, and down projections get a quarter less than the rule gives them."""
    survey = spectrim.survey(model, text=text, skip=PROTECTED, **options)
    plan = spectrim.plan(survey, keep=0.6)

    entries = [
        replace(entry, rank=max(1, 3 * entry.rank // 4))
        if entry.rank is not None and entry.name.endswith("down_proj")
        else entry
        for entry in plan.entries
    ]
    mine = replace(plan, entries=tuple(entries), rule="mine")

    result = spectrim.compress(
        model, plan=mine, text=text, skip=PROTECTED, output=output, **options
    )
    for entry in result.plan.entries:
        print(f"{entry.name}: {'dense' if entry.rank is None else f'rank {entry.rank}'}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
