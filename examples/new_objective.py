"""A new objective in one file: what "best rank-k answer" means, and a recipe that asks for it.

This one scales every input channel by a power of its root mean square: `min ‖(W − W') diag(s)‖_F`
with `s_j = (mean x_j²)^(power/2)`. Ranks, storage, report and loading are those of every recipe.

python examples/new_objective.py [MODEL [TEXT.txt [OUT]]]
"""

import sys

import spectrim
from spectrim.decompose import OBJECTIVES, Objective
from spectrim.decompose.directions import projected
from spectrim.decompose.statistics import statistic, tokens_of, weight
from spectrim.demo.run import CALIBRATION, MODEL


def loudness(W, moments=None, output=None, *, name, rank=None, power: float = 1.0):
    """Ordered components of the weight whose columns are scaled by how loud their inputs are."""
    W = weight(W, name=name)
    C = statistic(moments, "C", W.shape[1], name=name) / tokens_of(moments)
    return projected(W, C.diagonal().pow(power), name=name, rank=rank)


# What it gathers is said here; its options are the keywords of the function above.
OBJECTIVES["loudness"] = Objective.that_gathers(
    "C", name="loudness", unit="squared scaled weight", module=__name__
)


def main(model=MODEL, text=CALIBRATION, output="loud", **options):
    """Compress with the new objective; `options` are further words of `spectrim.compress`."""
    recipe = spectrim.Recipe.model_validate(
        {
            "name": "loudness",
            "decompose": {"objective": "loudness", "power": 0.5},
            "allocate": {"rule": "loss_ratio"},
        }
    )
    result = spectrim.compress(model, recipe=recipe, text=text, output=output, **options)
    print(f"{len(result.plan.entries)} layers cut by {recipe.decompose.objective}: {output}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
