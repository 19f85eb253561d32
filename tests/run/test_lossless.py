"""Exactly low-rank and zero weights: nothing is lost where nothing has to be, no byte wasted."""

import copy

import pytest
import torch

from architectures import tiny, windows
from spectrim import api
from spectrim.allocate.budget import Shape, layer_bytes
from spectrim.decompose import decompose
from spectrim.linalg.exact_rank import exact_rank
from spectrim.model.weights import get_module, read_weight
from spectrim.recipes import get_recipe
from spectrim.run.loading import load_model
from spectrim.run.survey.surveying import cut_survey, survey_model
from spectrim.storage.survey_file import load_survey, save_survey

RANK, LOW, ZERO = 4, "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"

RECIPES = {
    "svd": {},
    "svd-llm": {},
    "svd-llm-v2": {},
    "aa-svd": {"refine": []},
    "zs-svd": {"refine": []},
    "spectrim": {},
    "asvd": {"allocate": {"score": "energy"}},
}


@pytest.fixture(scope="module")
def model():
    """A llama with one weight of rank four and one of zeros, in fp32."""
    made = tiny("llama")[0].float()
    weight = get_module(made, LOW).weight.data
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    weight.copy_(make(weight.shape[0], RANK) @ make(RANK, weight.shape[1]) / 20)
    get_module(made, ZERO).weight.data.zero_()
    return made


@pytest.mark.parametrize("name", RECIPES)
def test_a_weight_of_low_rank_takes_what_it_needs_and_stays_as_it_is(name, model):
    recipe = get_recipe(name).with_changes(**RECIPES[name])
    original = read_weight(get_module(model, LOW)).clone()
    options = {"text": windows(16, 24), "measure": False}
    result = api.compress(copy.deepcopy(model), recipe=recipe, keep=0.6, **options)
    entry, zero = result.plan[LOW], result.plan[ZERO]
    shape = Shape(*original.shape, False)
    needed = layer_bytes(shape, rank=RANK, storage=entry.storage, dtype_bytes=4)
    assert (entry.rank, entry.bytes) == (RANK, needed)
    assert (
        torch.dist(get_module(result.model, LOW).dense_weight(), original) < 1e-5 * original.norm()
    )
    least = max(1, int(recipe.allocate.floor * 20) + 1)
    assert zero.rank <= least
    assert not get_module(result.model, ZERO).dense_weight().any()
    assert result.plan.achieved_keep <= 0.6


def test_a_survey_with_a_zero_target_is_cut_at_any_size(model, tmp_path):
    made = survey_model(
        load_model(copy.deepcopy(model)), get_recipe("svd-llm"), text=windows(16, 24)
    )
    save_survey(made, tmp_path / "survey")
    survey = load_survey(tmp_path / "survey")
    assert {c.name: c.lossless for c in survey.curves if c.lossless is not None} == {
        LOW: RANK,
        ZERO: 0,
    }
    outcome = cut_survey(load_model(copy.deepcopy(model)), survey, keep=0.5)
    assert outcome.plan[LOW].rank == RANK
    (facts,) = (t for t in outcome.report["targets"] if t["name"] == ZERO)
    assert facts["measured_weight_error"] == 0.0
    (facts,) = (t for t in outcome.report["targets"] if t["name"] == LOW)
    assert facts["measured_weight_error"] < 1e-10


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (10, 10)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_the_rank_is_found_whatever_the_units_of_channels(shape, rank):
    g = torch.Generator().manual_seed(rank)
    left, right = (
        torch.randn(*s, generator=g).double() for s in ((shape[0], rank), (rank, shape[1]))
    )
    W = (left @ right).float()
    scale = 2.0 ** torch.randint(-20, 20, (shape[1],), generator=g)
    assert exact_rank(W, name="layer") == rank
    assert exact_rank(W * scale, name="layer") == rank
    full = torch.randn(*shape, generator=g)
    assert exact_rank(full, name="layer") is None
    assert exact_rank(full.bfloat16(), name="layer") is None


def test_a_wide_spectrum_is_no_low_rank():
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(12, 12, generator=g).double())[0] for _ in range(2))
    W = U * 10.0 ** -torch.arange(12).div(2) @ V.T
    assert exact_rank(W, name="layer") is None
    assert decompose("plain", W, name="layer").rank == 12
