"""Would a plan want bf16 and int8 side by side? Which ways of storing a target nothing else beats.

    python benchmarks/global_allocation.py --train-text ... --eval-text ... --only 'select zero_sum'
    python benchmarks/number_formats.py

For every target of the shared survey of `global_allocation.py`: bytes and predicted loss (K-FAC, in
nats) of the dense layer and of every packed rank in bf16 and int8, the loss of rounding included,
and the lower convex hull of all of them. A plan that is best for its bytes takes points of the
hulls only.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
from global_allocation import SURVEY

from spectrim.allocate.budget import bytes_by_rank, layer_bytes
from spectrim.allocate.curve import Curve
from spectrim.evaluate.points import lower_hull
from spectrim.formats import format_of
from spectrim.storage.survey_file import load_survey

RESULTS = Path(__file__).parent / "results" / "number_formats.json"
FORMATS = ("native", "int8")


def ways(curve: Curve, losses: np.ndarray) -> dict[tuple[float, float], str]:
    """(bytes, predicted loss) -> what gives it."""
    found = {}
    for weights in FORMATS:
        rounding = format_of(weights).rounding_share * float(losses[0])
        options = {"weights": weights, "dtype_bytes": 2}
        stored = np.asarray(bytes_by_rank(curve.shape, storage="packed", **options))
        for rank in range(1, len(stored)):
            found[int(stored[rank]), float(losses[rank]) + rounding] = f"low rank {weights}"
        dense = layer_bytes(curve.shape, rank=None, storage="dense", **options)
        found[dense, rounding] = f"dense {weights}"
    return found


def main() -> None:
    """Count the points of all hulls by what gives them."""
    survey = load_survey(SURVEY)
    counts: Counter[str] = Counter()
    shares: dict[str, list[float]] = {}
    for curve in survey.curves:
        found = ways(curve, survey.losses["kfac"][curve.name])
        whole = layer_bytes(curve.shape, rank=None, storage="dense", dtype_bytes=2)
        for point in lower_hull(found):
            counts[found[point]] += 1
            shares.setdefault(found[point], []).append(point[0] / whole)
    result = {
        "protocol": " ".join(__doc__.split("\n\n")[2].split()),
        "targets": len(survey.curves),
        "points_on_hulls": dict(counts),
        "kept_fraction": {kind: [min(s), max(s)] for kind, s in shares.items()},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
