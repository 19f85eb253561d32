"""The commands of studies: pages written once, options read as they are meant."""

from __future__ import annotations

import csv
import json
import sys
import types

import pytest
import torch
import typer
from typer.testing import CliRunner

from architectures import BLOCKS, tiny, windows
from spectrim import api, studies
from spectrim.api import evaluating
from spectrim.cli.main import app
from spectrim.cli.session import session
from spectrim.errors import InputError, OutputError, SpectrimError, TextError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    model = tiny("llama")[0]
    model.save_pretrained(root / "dense")
    api.compress(root / "dense", recipe="svd", keep=0.5, output=root / "small")
    api.compress(root / "dense", recipe="svd", keep=0.8, output=root / "large")
    return root


def test_a_report_beside_the_dense_model_has_all_figures(folders, tmp_path):
    page = tmp_path / "page.html"
    studies.report(
        folders / "small",
        studies.Measure(text=windows(4)),
        output=page,
        against=folders / "dense",
        others=[folders / "large"],
    )
    html = page.read_text(encoding="utf-8")
    assert html.count("<figure") == 4  # kept, errors, two along depth
    assert "small" in html and "large" in html
    with pytest.raises(OutputError, match="exists"):
        studies.report(folders / "small", output=page)
    with pytest.raises(InputError, match="dense model"):
        studies.report(folders / "small", output=tmp_path / "x", others=[folders / "large"])
    assert not (tmp_path / "x").exists()


def test_distortion_of_several_results_is_a_table_and_pictures(folders, tmp_path):
    measure = studies.Measure(text=windows(4))
    results = [folders / "small", folders / "large"]
    found = studies.distortion(folders / "dense", results, measure=measure, output=tmp_path)
    rows = list(csv.DictReader((tmp_path / "distortion.csv").open()))
    assert len(rows) == len(found) / 2 == BLOCKS * 8
    values = {(one.model, str(one.block), one.projection): one.mse for one in found}
    for row in rows:
        for model in ("small", "large"):
            assert float(row[f"{model} mse"]) == values[model, row["block"], row["projection"]] > 0
    record = json.loads((tmp_path / "distortion.json").read_text())
    assert record["distortion"] == [one.record() for one in found]
    for name in ("mse", "cosine"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    with pytest.raises(InputError, match="different names"):
        studies.distortion(folders / "dense", [folders / "small"] * 2, measure=measure)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_report_command_writes_a_page(folders, tmp_path):
    done = run("report", folders / "small", "-o", tmp_path / "a.html", "-q")
    assert done.exit_code == 0, done.output
    assert "a.html" in done.output
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("curve", "m", "-o", "{}", "--recipes", "svd", "--keep", "2"), "no fraction"),
        (("curve", "m", "-o", "{}"), "needs recipes"),
        (("compare", "m", "--recipes", "nothing-like-it"), "nothing-like-it|no model"),
        (("layer-errors", "m", "-o", "{}", "--objectives", "nearest"), "'nearest'"),
        (("distortion", "m", "-o", "{}"), "found none"),
        (("calibration-study", "m", "-o", "{}", "--windows", "8,x"), "numbers from 1"),
        (("curve", "m", "-o", "{}", "--recipes", "svd,svd"), "two recipes are called"),
        (("slider", "{}"), "neither an elastic artifact nor a survey"),
        (("report", "{}"), "is no result of"),
    ],
)
def test_refusals_are_errors_with_words(arguments, words, tmp_path):
    done = run(*(a.format(tmp_path) for a in arguments))
    assert isinstance(done.exception, SpectrimError)
    assert any(part in str(done.exception) for part in words.split("|"))


def test_the_commands_of_studies_run_and_print_their_tables(folders, tmp_path):
    # Without a tokenizer only windows can be read, which the command line cannot give.
    measure = studies.Measure(text=windows(4))
    real = studies.layer_errors

    def layer_errors(model, results, **options):
        return real(model, results, **options | {"measure": measure, "text": windows(4)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "layer_errors", layer_errors)
        done = run("layer-errors", folders / "dense", folders / "small", "-o", tmp_path / "a", "-q")
        assert done.exit_code == 0, done.output
    found = done.output
    assert "mlp.down_proj" in found and "small" in found and "predicted -> on held-out" in found
    assert (tmp_path / "a" / "layer_errors.svg").is_file()


def test_an_interrupted_study_says_that_it_goes_on(tmp_path, capsys):
    for resumes, words in ((True, "the same command goes on from there"), (False, "left behind")):
        folder = tmp_path / str(resumes)
        with pytest.raises(typer.Exit) as ended, session(output=folder, resumes=resumes):
            folder.mkdir()
            raise KeyboardInterrupt
        assert ended.value.exit_code == 130
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("interrupted: left behind") and words in last
        assert ("goes on" in last) == resumes


def test_an_interrupted_run_names_the_folder_that_was_chosen_for_its_work(tmp_path, capsys):
    with pytest.raises(typer.Exit), session(output=tmp_path / "out", work=tmp_path / "mine"):
        (tmp_path / "mine").mkdir()
        raise KeyboardInterrupt
    assert f"stays in {tmp_path / 'mine'}" in capsys.readouterr().err


def test_the_wrapper_hands_everything_to_lm_eval(monkeypatch):
    seen = []
    fake = types.ModuleType("lm_eval.__main__")
    fake.cli_evaluate = lambda: seen.append(sys.argv[1:])
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", fake)
    before = list(sys.argv)
    assert run("lm-eval", "run", "--model", "hf", "--tasks", "x").exit_code == 0
    assert run("lm-eval", "ls", "tasks").exit_code == 0
    assert run("lm-eval", "--help").exit_code == 0
    assert seen[0][:5] == ["run", "--model", "hf", "--tasks", "x"]
    assert seen[0][5] == "--include_path"
    assert seen[1:] == [["ls", "tasks"], ["--help"]]
    assert sys.argv == before


def test_an_elastic_curve_needs_no_recipes_and_keeps_the_dense_twin(folders, tmp_path):
    api.survey(folders / "dense", recipe="svd", output=tmp_path / "survey", text=windows(4))
    measure = studies.Measure(text=windows(6, seed=1))
    found = studies.curve(tmp_path / "survey", keep=[1.0, 0.6], measure=measure)
    whole, small = found.points
    assert whole.excess == 0.0 and whole.kl == 0.0
    assert small.kl > 0 and small.achieved <= 0.6
    assert small.bits_per_weight == pytest.approx(32 * small.achieved, rel=1e-6)
    with pytest.raises(InputError, match="no recipes"):
        studies.curve(tmp_path / "survey", recipes=["svd"], measure=measure)
    with pytest.raises(TextError, match="no tokenizer"):
        studies.slider(tmp_path / "survey", port=0)


def test_a_dense_twin_shares_tensors_and_not_modules():
    model = tiny("llama")[0]
    twin = studies.dense_twin(model)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    model.model.layers[0].mlp.up_proj = torch.nn.Identity()
    assert not isinstance(twin.model.layers[0].mlp.up_proj, torch.nn.Identity)


def test_the_evaluate_command_asks_for_tasks_and_says_what_was_skipped(monkeypatch, tmp_path):
    asked = {}
    task = {"accuracy": 0.5, "standard_error": 0.1}
    shot = {"tasks": {"t": task}, "mean": 0.5, "mean_standard_error": 0.1, "skipped": {}}
    result = {"model": "m", "perplexity": {}, "zero_shot": shot, "skipped": {"piqa": "no data"}}
    monkeypatch.setattr(evaluating, "evaluate_models", lambda _, **o: asked.update(o) or [result])
    done = run("evaluate", "m", "--tasks", "offline", "--limit", 3, "--task-folder", tmp_path)
    assert done.exit_code == 0, done.output
    assert (asked["tasks"], asked["limit"], asked["task_folders"]) == ("offline", 3, [tmp_path])
    assert "50.0 ± 10.0" in done.output and "no data" in done.output


def test_a_text_that_is_missing_is_skipped_beside_others(folders, tmp_path):
    # Without a tokenizer no text can be read; alone that is an error, among others a note.
    with pytest.raises(TextError, match="tokenizer"):
        api.evaluate(folders / "dense", text="absent.txt")
    found = api.evaluate(folders / "dense", text="absent.txt,other.txt")
    assert set(found["skipped"]) == {"absent.txt", "other.txt"}
