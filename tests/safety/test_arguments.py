"""What cannot be done as asked is refused in words before any work; what is obvious is accepted."""

from types import SimpleNamespace

import numpy as np
import pytest

import spectrim
from architectures import POSITIONS, tiny, windows
from spectrim import api
from spectrim.data.text import read_text
from spectrim.data.windows import calibration_windows, given_windows
from spectrim.demo.run import CALIBRATION, MODEL
from spectrim.errors import InputError, MemoryShortError, SpectrimError, TextError
from spectrim.recipe import Calibration
from spectrim.run.loading import LoadedModel
from spectrim.run.texts import gather_windows, own_text
from spectrim.studies import Measure

NUMBERS = [0, -3, 2.5, "8", True, [8], 10**30]
WRONG = {
    "keep": ["0.6", 0, -0.1, 1.1, float("nan"), True, [0.6]],
    "size": [0, -3, 3.5, "much", "0GB", [1]],
    "recipe": [None, {"name": "svd"}, 3, ["svd"], "no-such-recipe"],
    "seed": [-1, 2**63, 2**70, 1.5, "a", True],
    "windows": NUMBERS,
    "window_length": [1, *NUMBERS],
    "text": [3, {"text": "x"}, object(), b"x", np.zeros((4, 8)), [str(CALIBRATION)], "no-such"],
    "plan": [3, [], ""],
    "survey": [3, [], ""],
    "effort": [3, [], "extreme"],
    "device": [None, [], "abacus"],
    "dtype": [None, 3, [], "float7"],
    "storage": [3, [], "zip"],
    "weights": [3, "int3"],
    "on_failure": [None, 3, "hope"],
    "output": [3, [], b"x", "", "a\0b", "x" * 5000],
    "work": [3, "a\0b", "x" * 5000],
    "offload_streams": [3, ""],
    "self_contained": [True],
}


def never(*_, **__):
    raise AssertionError("work was done before the refusal")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_before_any_work(name, monkeypatch):
    monkeypatch.setattr("spectrim.run.compress.choose", never)
    model = tiny("llama")[0]
    for value in WRONG[name]:
        given = {"recipe": "svd-llm", name: value}
        if name not in ("windows", "window_length"):
            given.setdefault("text", windows(4, 8))
        with pytest.raises(SpectrimError) as refusal:
            api.compress(model, **given)
        assert str(refusal.value)


@pytest.mark.parametrize("model", [None, 3, "", [], b"folder"])
def test_a_model_is_a_name_a_folder_or_a_model(model):
    with pytest.raises(InputError, match="model is"):
        api.compress(model)


@pytest.mark.parametrize(
    "given",
    [
        {"max_tokens": -5},
        {"max_tokens": 1},
        {"batch": 0},
        {"window_length": 1},
        {"window_length": "long"},
        {"limit": 3},
        {"limit": 0},
        {"task_folders": ["/tmp"]},
        {"tasks": 3},
        {"text": 3},
        {"text": windows(4, 8), "max_tokens": 8},
        {"text": None, "tasks": "offline", "max_tokens": 8},
    ],
    ids=str,
)
def test_a_wrong_measurement_is_refused(given):
    with pytest.raises(SpectrimError):
        api.evaluate(tiny("llama")[0], **{"text": str(CALIBRATION), **given})


@pytest.mark.parametrize("given", [{"batch": 0}, {"max_tokens": -1}, {"window_length": 0}])
def test_a_study_is_measured_on_something(given):
    with pytest.raises(InputError, match=next(iter(given))):
        Measure(**given)


def test_tasks_of_which_none_can_be_measured_are_an_error(monkeypatch):
    from spectrim.api import evaluating
    from spectrim.evaluate.zero_shot import ZeroShot

    skipped = ZeroShot(skipped={"piqa": "the data of 'piqa' cannot be fetched"})
    monkeypatch.setattr(evaluating, "zero_shot", lambda *_, **__: skipped)
    with pytest.raises(InputError, match="piqa"):
        api.evaluate(tiny("llama")[0], tasks="piqa")


def test_arrays_and_data_sets_say_the_same_as_tensors_and_lists():
    ids = windows(4, 8)
    plans = [
        api.compress(tiny("llama")[0], recipe="svd-llm", keep=0.6, text=text).plan
        for text in (ids, ids.numpy(), ids.numpy().astype("uint16"))
    ]
    assert plans[0] == plans[1] == plans[2]

    class Rows(SimpleNamespace):  # what a data set of the package `datasets` offers
        def __getitem__(self, name):
            return self.columns[name]

    rows = Rows(column_names=["text"], columns={"text": ["One.", "Two."]})
    assert own_text(rows) == ["One.", "Two."]


@pytest.fixture(scope="module")
def bundled():
    from transformers import AutoTokenizer

    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=100))
    model.get_input_embeddings = lambda: SimpleNamespace(weight=np.zeros((4096, 1)))
    return LoadedModel(model, AutoTokenizer.from_pretrained(MODEL), "bundled", None)  # type: ignore


def test_the_length_of_a_window_is_kept_where_asked_for_and_shortened_where_not(bundled, tmp_path):
    """The model has 100 positions, the short text some 70 tokens, the shorter one a few."""
    long = Calibration(text=str(CALIBRATION), windows=3, window_length=2048)
    assert gather_windows(bundled, long, None, seed=0).length == 100
    with pytest.raises(TextError, match="longer than the 100 positions"):
        gather_windows(bundled, long, None, seed=0, exactly=True)
    within = long.model_copy(update={"window_length": 50})
    assert gather_windows(bundled, within, None, seed=0, exactly=True).length == 50
    words = CALIBRATION.read_text(encoding="utf-8").split()
    (tmp_path / "short.txt").write_text(" ".join(words[:60]), encoding="utf-8")
    short = long.model_copy(update={"text": str(tmp_path / "short.txt")})
    assert 64 <= gather_windows(bundled, short, None, seed=0).length < 100
    with pytest.raises(TextError, match=r"short\.txt"):
        gather_windows(
            bundled, short.model_copy(update={"window_length": 99}), None, seed=0, exactly=True
        )
    (tmp_path / "short.txt").write_text(" ".join(words[:10]), encoding="utf-8")
    with pytest.raises(TextError, match=r"short\.txt"):
        gather_windows(bundled, short, None, seed=0)


def test_more_windows_than_memory_holds_are_refused(bundled):
    many = Calibration(text=str(CALIBRATION), windows=2**31 - 1, window_length=128)
    with pytest.raises(InputError, match="are free; ask for fewer"):
        gather_windows(bundled, many, None, seed=0)


def test_a_shortened_run_says_so(tmp_path, monkeypatch):
    from spectrim.run import opening

    monkeypatch.setattr(opening, "gather_windows", lambda *_, **__: given_windows(windows(4, 8)))
    report = api.compress(tiny("llama")[0], recipe="svd-llm", keep=0.6).report
    assert any("8 tokens instead of" in note for note in report["notes"])
    assert POSITIONS < 2048


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] can't allocate memory: you tried"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
    ],
    ids=repr,
)
def test_memory_that_runs_out_is_told_with_what_helps(error, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(api, "load_model", fails)
    with pytest.raises(MemoryShortError, match="--out-of-core"):
        spectrim.compress("somewhere")

    def wraps(*_, **__):
        raise InputError("cannot be loaded") from error

    monkeypatch.setattr(api, "load_model", wraps)
    with pytest.raises(MemoryShortError, match="--out-of-core"):
        spectrim.survey("somewhere")


def test_other_errors_stay_what_they_are(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("the shapes do not match")

    monkeypatch.setattr(api, "load_model", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        spectrim.compress("somewhere")


def test_a_seed_at_the_end_of_its_range_draws_windows(bundled):
    text = read_text(CALIBRATION)
    made = calibration_windows(text, bundled.tokenizer, windows=2, window_length=8, seed=2**63 - 1)
    assert made.ids.shape == (2, 8)
