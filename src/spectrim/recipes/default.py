"""Our own recipe at three efforts: parts that exist, put together where their gains add up.

fast       training-free: output-weighted anchored decomposition along the shifted stream,
           ranks by predicted loss in nats, packed storage
balanced   the same, then every block is trained against the original block's output
thorough   the same, then the whole network is distilled from the original
"""

from __future__ import annotations

from spectrim.recipe import (
    Allocation,
    BlockRefinement,
    Calibration,
    Decompose,
    DistillRefinement,
    Recipe,
    Refinement,
    StorageChoice,
)

DEFAULT_RECIPE = "spectrim"

# Learning rates are shares of each tensor's size: what fits the bundled model's width of 256 then
# also fits one of 8192. Small batches make more of few windows than many epochs do.
_BLOCK = BlockRefinement(epochs=10, batch=4, learning_rate=0.01, relative=True)
# What end-to-end training follows needs no full block training: it starts from a good state soon.
_SHORT = _BLOCK.model_copy(update={"epochs": 6})
_DISTILL = DistillRefinement(
    steps=600, learning_rate=0.005, relative=True, evaluate_every=50, windows=512
)


def _ours(name: str, title: str, refine: tuple[Refinement, ...]) -> Recipe:
    return Recipe(
        name=name,
        title=title,
        paper="docs/recipe_study.md; parts from arXiv 2604.02119, 2403.07378, 2501.19090 and "
        "KFAC-SVD (ICML 2026)",
        equation="min ½ tr(Eᵀ G E),  E = W X − W' X' (+ H − H' where it joins the residual "
        "stream);  ranks: min Σ loss_t(k_t) within the bytes",
        differences=(
            "The anchored target and output-side curvature are solved in one closed form, which "
            "no paper that we know does; what joins the residual stream also makes up for what "
            "that has lost; ranks come from losses in nats, seen token by token on "
            "windows held out, by a Lagrangian with exact repair; packed storage buys rank at "
            "equal bytes."
        ),
        flow="sequential",
        calibration=Calibration(text="self"),
        decompose=Decompose(objective="anchored_kfac", carry=True, shrink_in=0.1, shrink_out=0.1),
        allocate=Allocation(rule="knapsack", score="kfac", floor=0.1, held_out=0.125),
        storage=StorageChoice(kind="packed"),
        refine=refine,
    )


OURS = (
    _ours(DEFAULT_RECIPE, "spectrim: training-free, double-sided and anchored", ()),
    _ours("spectrim-balanced", "spectrim with block refinement", (_BLOCK,)),
    _ours(
        "spectrim-thorough", "spectrim with block refinement and distillation", (_SHORT, _DISTILL)
    ),
)

EFFORTS = {
    "fast": DEFAULT_RECIPE,
    "balanced": "spectrim-balanced",
    "thorough": "spectrim-thorough",
}
"""What `--effort` chooses among the variants of the default recipe."""
