"""The recipes by name: every published method as a few lines over the same parts."""

from __future__ import annotations

from pathlib import Path

from spectrim.errors import RecipeError
from spectrim.recipe import (
    AcipLearning,
    Allocation,
    BlockRefinement,
    Calibration,
    ClosedFormRefinement,
    Decompose,
    LoraRefinement,
    ProjectedGradientRefinement,
    Recipe,
    SocoLearning,
)
from spectrim.recipes.default import OURS

_PUBLISHED = Allocation(rule="uniform")
_LITERATURE = Calibration(text="wikitext2")
_FLOORS = (
    " Ranks are floor(keep m n / (m + n)) as published, and what rounding down leaves over is "
    "spent on further components; allocate.fill: false leaves it unspent."
)


PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *OURS,
        Recipe(
            name="svd",
            title="Plain truncated SVD",
            paper="Eckart and Young, 1936",
            equation="min ‖W − W'‖_F  subject to rank W' ≤ k",
            differences="None: a baseline without data." + _FLOORS,
            calibration=_LITERATURE,
            decompose=Decompose(objective="plain"),
            allocate=_PUBLISHED,
        ),
        Recipe(
            name="fwsvd",
            title="Fisher-weighted SVD",
            paper="Hsu et al., ICLR 2022, arXiv 2207.00112",
            equation="min Σ_ij F_j (W − W')²_ij,  F_j = Σ_i E[(∂L/∂W_ij)²]",
            differences=(
                "Gradients of the next-token loss of all calibration windows, squared per window "
                "and summed in fp64; the widely used code lets fp16 gradients underflow, raises "
                "the root to a further power and puts an absolute floor under it. The paper "
                "weighs a fine-tuning loss, here it is the language-model loss." + _FLOORS
            ),
            calibration=_LITERATURE,
            decompose=Decompose(objective="fisher"),
            allocate=_PUBLISHED,
        ),
        Recipe(
            name="asvd",
            title="Activation-aware SVD with truncation-rank search",
            paper="Yuan et al., 2023, arXiv 2312.05821",
            equation="min ‖(W − W') S‖_F,  S = diag(mean |x|)^α, α = 0.5",
            differences=(
                "Exact SVD instead of randomised SVD without oversampling; a numerical failure is "
                "an error, never a random layer; no absolute floor under the scale. The search "
                "tries the published candidates 0.4 to 0.9 on every target of the blocks (the "
                "output head stays dense) and applies the largest feasible cut, theirs the last "
                "one it looked at; bytes that the coarse candidates leave over go to the most "
                "sensitive targets (allocate.fill: false is the published rule). Without "
                "evaluations: allocate.score: energy."
            ),
            decompose=Decompose(objective="activation", alpha=0.5),
            allocate=Allocation(rule="sensitivity", score="measured"),
            calibration=Calibration(text="wikitext2", windows=32),
        ),
        Recipe(
            name="svd-llm",
            title="Truncation-aware data whitening",
            paper="Wang et al., ICLR 2025, arXiv 2403.07378",
            equation="min ‖(W − W') X‖_F;  B = U_k, A = U_kᵀ W, U_k = eigvec(W C Wᵀ)",
            differences=(
                "Inverse-free form of the same optimum, fp64 moments, relative instead of absolute "
                "jitter, grouped-query models, ordinary Hugging Face folders." + _FLOORS
            ),
            calibration=_LITERATURE,
            decompose=Decompose(objective="whitened"),
            allocate=_PUBLISHED,
        ),
        Recipe(
            name="svd-llm-update",
            title="SVD-LLM with the layer-wise closed-form update",
            paper="Wang et al., arXiv 2403.07378 v1-v4",
            equation="B = W C' Aᵀ (A C' Aᵀ)⁻¹ on the inputs of the compressed network",
            differences=(
                "All windows instead of sixteen; every group sees the inputs that the compressed "
                "groups before it give, theirs sees those of the dense block; moments and one "
                "Cholesky solve instead of lstsq on stored activations, ridge relative to the mean "
                "diagonal." + _FLOORS
            ),
            flow="sequential",
            calibration=_LITERATURE,
            decompose=Decompose(objective="whitened"),
            allocate=_PUBLISHED,
            refine=(ClosedFormRefinement(),),
        ),
        Recipe(
            name="svd-llm-lora",
            title="SVD-LLM with sequential low-rank recovery",
            paper="Wang et al., ICLR 2025, arXiv 2403.07378",
            equation="min CE(F + (α/r) P Q) over small P, Q: F all A, merged, then F all B",
            differences=(
                "Trains on the calibration text, whatever it is, instead of 50,000 instructions; "
                "an epoch that does not help held-out windows is not merged; seeded order, cosine "
                "decay instead of linear, warm-up capped at a tenth of the steps. Needs the extra "
                "`lora`." + _FLOORS
            ),
            calibration=_LITERATURE,
            decompose=Decompose(objective="whitened"),
            allocate=_PUBLISHED,
            refine=(LoraRefinement(),),
        ),
        Recipe(
            name="svd-llm-v2",
            title="SVD-LLM V2: heterogeneous ranks from truncation losses",
            paper="Wang et al., NAACL 2025, arXiv 2503.12340",
            equation="removed share of a target ∝ 1 / log(truncation loss), per projection type",
            differences=(
                "No code was published. Losses are over unnormalised sums, as the paper's sizes "
                "imply; the logarithm is of e + loss, a share never exceeds 0.98 and is weighted "
                "by bytes where shapes differ, and a target above break-even stays dense. Its "
                "truncation shares the optimum of svd-llm, so only the ranks differ."
            ),
            calibration=_LITERATURE,
            decompose=Decompose(objective="whitened"),
            allocate=Allocation(rule="loss_ratio"),
        ),
        Recipe(
            name="aa-svd",
            title="AA-SVD: anchored adaptive objective and block refinement",
            paper="Sinha and Fleuret, 2026, arXiv 2604.02119",
            equation="min ‖W X − W' X'‖_F;  then min_θ ‖block(X) − block'(X'; θ)‖²",
            differences=(
                "Inverse-free factors, a ridge toward W instead of toward zero, fp32 master "
                "weights and balanced factors in training, the epoch is chosen on held-out "
                "windows, the untouched block included; the authors train bf16 weights in place "
                "and keep the last epoch. Forwards are resumed at every group, not restarted."
                + _FLOORS
            ),
            flow="sequential",
            calibration=_LITERATURE,
            decompose=Decompose(objective="anchored"),
            allocate=_PUBLISHED,
            refine=(BlockRefinement(),),
        ),
        Recipe(
            name="zs-svd",
            title="ZS-SVD: zero-sum component selection with corrections",
            paper="Abbasi et al., ICML 2026, arXiv 2602.02848",
            equation="ΔL_i = −σ_i u_iᵀ (∂L/∂W) S⁻ᵀ v_i, dropped so that Σ ΔL stays near zero",
            differences=(
                "Scores from 32 windows instead of one, one shared backward per stage, fp32 "
                "merges, relative ridge; targets that would revert to dense hand their share back; "
                "where signs do not agree between halves of the windows the smallest |ΔL| goes "
                "first whatever its sign (faithful: true selects as published)."
            ),
            calibration=_LITERATURE,
            decompose=Decompose(objective="whitened"),
            allocate=Allocation(rule="zero_sum", score="first_order"),
            refine=(ProjectedGradientRefinement(),),
        ),
        Recipe(
            name="acip",
            title="ACIP: every size from one training",
            paper="Genzel et al., TMLR 2025, arXiv 2502.01717",
            equation="min CE(Σ_i 1[μ_i > 0] σ_i u_i v_iᵀ + LoRA) + λ_t Σ_i w_i relu(μ_i)",
            differences=(
                "fp32 gates instead of bf16, components of inputs and output gradients instead of "
                "the weight alone, penalties by cost, exact bytes with LoRA counted, dense targets "
                "from the base, healing at sampled sizes by KL, of the factors too where memory "
                "allows."
            ),
            flow="learned",
            keep=0.4,
            decompose=Decompose(objective="kfac"),
            calibration=Calibration(text="c4", windows=4096, window_length=1024, batch=4),
            learn=AcipLearning(),
        ),
        Recipe(
            name="soco",
            title="SoCo: importance scores learned on the spectrum",
            paper="Li et al., 2025, arXiv 2502.15092",
            equation="W' = U (Σ ⊙ S) Vᵀ,  min_{S, d} KL(original ‖ W'),  S > 1/2 kept",
            differences=(
                "No code was published: what the paper leaves open is ours, see the documentation. "
                "Components of inputs and output gradients, phases that end by criterion, exact "
                "budgets."
            ),
            flow="learned",
            calibration=_LITERATURE,
            decompose=Decompose(objective="kfac"),
            learn=SocoLearning(),
        ),
    )
}


def get_recipe(recipe: str | Path | Recipe) -> Recipe:
    """A recipe by preset name, from a YAML file, or as given.

    Raises:
        RecipeError: neither a preset nor an existing file; the message lists the presets.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str | Path):
        raise RecipeError(
            f"recipe is a {type(recipe).__name__}; expected a name, a YAML file, or a Recipe, "
            "which Recipe(name=..., ...) makes"
        )
    if recipe in PRESETS:
        return PRESETS[str(recipe)]
    path = Path(recipe)
    if path.is_file():
        return Recipe.from_file(path)
    raise RecipeError(
        f"unknown recipe {str(recipe)!r}: neither a file nor one of {', '.join(PRESETS)}"
    )
