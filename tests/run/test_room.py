"""How a run is made to fit: thrift on small machines, refusal on tiny ones, the same results."""

from functools import cache

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

from architectures import tiny
from jobs import logits, make_job
from spectrim import api
from spectrim.errors import InputError, MemoryShortError
from spectrim.run.cost import settled
from spectrim.run.cutting_all import choose, cut_targets
from spectrim.run.footprint import Room, Setting, read_sizes
from spectrim.run.log import RunLog
from spectrim.run.room import choose_room, fitting_room, limit_of, peak_parts
from spectrim.storage.work import open_work

CPU = torch.device("cpu")
MACHINE = 24 * 10**9

SMALL_LLM = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LARGE_VOCABULARY = Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    tie_word_embeddings=True,
)
TRAINING_FREE = ["spectrim", "svd-llm", "svd-llm-v2", "zs-svd", "fwsvd", "asvd", "svd"]


def setting(windows, length):
    return Setting(CPU, torch.float32, torch.bfloat16, False, False, windows, length)


def peak(recipe, where, sizes, total=MACHINE):
    room = choose_room(recipe, where, sizes, planned=False, limit=limit_of(total, CPU))
    return sum(peak_parts(recipe, where, sizes, room, planned=False)[0].values())


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_no_training_free_recipe_needs_much(name):
    sizes, recipe = read_sizes(SMALL_LLM, False), api.resolve_recipe(name)
    assert peak(recipe, setting(64, 512), sizes) < 3.0e9
    assert peak(recipe, setting(256, 2048), sizes) < 6.0e9


def test_a_large_vocabulary_is_no_burden():
    sizes, recipe = read_sizes(LARGE_VOCABULARY, False), api.resolve_recipe("spectrim")
    found = settled(recipe, sizes, CPU, 32768)
    assert peak(recipe, setting(found.windows, found.window_length), sizes) < 8.0e9
    assert peak(recipe, setting(256, 2048), sizes) < 8.0e9


def test_less_memory_means_a_thriftier_room_and_in_the_end_a_refusal():
    sizes, recipe = read_sizes(SMALL_LLM, False), api.resolve_recipe("spectrim")
    where, peaks = setting(64, 512), []
    for total in (100, 24, 8, 5, 4):
        peaks.append(peak(recipe, where, sizes, total * 10**9))
        assert peaks[-1] <= total * 0.5e9 or total < 5
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peaks[0]
    with pytest.raises(InputError, match=r"needs about \d\.\d GB of memory .* there are 1\.0"):
        fitting_room(recipe, where, sizes, planned=False, total=10**9)
    asked = choose_room(recipe, where, sizes, planned=False, limit=limit_of(MACHINE, CPU), batch=3)
    assert (asked.batch, asked.graph) == (3, 3)


def test_windows_follow_the_model_and_the_machine():
    recipe = api.resolve_recipe("spectrim")
    small, large = (read_sizes(config, False) for config in (SMALL_LLM, LARGE_VOCABULARY))
    for sizes in (small, large):
        found = settled(recipe, sizes, CPU, 8192)
        widest = max(n for _, n in sizes.linears)
        assert 4 * widest <= found.windows * found.window_length <= 64 * widest
        assert found.reason
    asked = settled(api.resolve_recipe("spectrim", windows=7, window_length=99), small, CPU, 8192)
    assert (asked.windows, asked.window_length, asked.reason) == (7, 99, "")
    assert settled(recipe, small, CPU, 128).window_length == 128


@cache
def cut_in(room):
    job = make_job(
        count=6,
        model=tiny("llama")[0],
        decompose={"objective": "anchored_kfac"},
        allocate={"rule": "knapsack", "score": "kfac"},
    )
    job.room = room
    plan = cut_targets(job, choose(job))
    return [e.rank for e in plan.entries], logits(job.model, job.ids)


@pytest.mark.parametrize("backward", ["whole", "recomputed", "by block"])
@pytest.mark.parametrize("batch", [1, 5])
def test_no_room_changes_a_result(backward, batch):
    expected = cut_in(Room(6, 6))
    found = cut_in(Room(batch, batch, backward, restarts=batch == 1))
    assert found[0] == expected[0]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


def test_what_was_chosen_when_work_began_stays(tmp_path):
    with open_work(tmp_path / "work") as work:
        assert work.begin({"recipe": "a"}, {"room": {"batch": 4}}) == {"room": {"batch": 4}}
        work.write("piece", {"x": torch.zeros(1)}, {})
    with open_work(tmp_path / "work") as work:
        assert work.begin({"recipe": "a"}, {"room": {"batch": 1}}) == {"room": {"batch": 4}}
    with open_work(tmp_path / "work") as work, pytest.raises(InputError, match="recipe"):
        work.begin({"recipe": "b"}, {"room": {"batch": 1}})


def test_a_failed_allocation_names_the_stage_and_what_to_lower():
    log = RunLog(predicted=3 * 10**9)
    with (
        pytest.raises(MemoryShortError, match=r"stage 'gradients'.* 3\.0 GB were predicted"),
        log.timed("survey"),
        log.timed("gradients"),
    ):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    with pytest.raises(RuntimeError, match="other"), log.timed("gradients"):
        raise RuntimeError("other")
