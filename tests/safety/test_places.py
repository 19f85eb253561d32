"""No command writes where something lies that it reads; all of them say so before any work."""

import json

import pytest

from architectures import tiny, windows
from spectrim import api, studies
from spectrim.cli.plan import plan as plan_command
from spectrim.errors import OutputError, SpectrimError
from spectrim.report.page import PAGE_MARK
from spectrim.run.sources import sources_of
from spectrim.storage.work import MANIFEST, open_work


def save(folder):
    tiny("llama")[0].save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with its survey, elastic artifact, plan and text, all in one place."""
    folder = tmp_path_factory.mktemp("made")
    save(folder / "model")
    (folder / "text.txt").write_text("Some text.")
    api.survey(
        folder / "model", output=folder / "survey", recipe="svd", text=windows(2, 8), scores=[]
    )
    api.elastic(folder / "survey", folder / "elastic", score="energy")
    plan_command(folder / "survey", keep=0.6, output=folder / "plan.json")
    api.resize(folder / "survey", keep=0.6, output=folder / "out")
    return folder


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


COMMANDS = {
    "compress": lambda f, out: api.compress(
        f / "model",
        recipe="svd",
        text=f / "text.txt",
        plan=f / "plan.json",
        output=out,
        overwrite=True,
    ),
    "compress from a survey": lambda f, out: api.compress(
        f / "model", recipe="svd", survey=f / "survey", output=out, overwrite=True
    ),
    "survey": lambda f, out: api.survey(
        f / "model", text=f / "text.txt", output=out, overwrite=True
    ),
    "elastic": lambda f, out: api.elastic(f / "survey", out, overwrite=True),
    "resize a survey": lambda f, out: api.resize(
        f / "survey", keep=0.6, output=out, overwrite=True
    ),
    "resize an artifact": lambda f, out: api.resize(
        f / "elastic", keep=0.6, output=out, overwrite=True
    ),
    "export": lambda f, out: api.export(f / "out", output=out, overwrite=True),
    "curve": lambda f, out: studies.curve(
        f / "model", recipes=["svd"], text=f / "text.txt", output=out
    ),
    "curve of an artifact": lambda f, out: studies.curve(f / "elastic", output=out),
    "compare": lambda f, out: studies.compare(
        f / "model", recipes=["svd"], text=f / "text.txt", output=out
    ),
    "distortion": lambda f, out: studies.distortion(f / "model", [f / "out"], output=out),
    "layer errors": lambda f, out: studies.layer_errors(f / "model", [f / "out"], output=out),
    "calibration study": lambda f, out: studies.calibration_study(
        f / "model", text=f / "text.txt", output=out
    ),
    "report": lambda f, out: studies.report(
        f / "out", output=out, against=f / "model", survey=f / "survey", overwrite=True
    ),
    "plan": lambda f, out: plan_command(f / "survey", keep=0.6, output=out, overwrite=True),
}
READ = {
    "compress": ("model", "survey", "plan.json", "text.txt"),
    "compress from a survey": ("model", "survey"),
    "survey": ("model", "text.txt"),
    "elastic": ("survey", "model"),
    "resize a survey": ("survey", "model"),
    "resize an artifact": ("elastic", "model"),
    "export": ("out",),
    "curve": ("model", "text.txt"),
    "curve of an artifact": ("elastic", "model"),
    "compare": ("model", "text.txt"),
    "distortion": ("model", "out"),
    "layer errors": ("model", "out"),
    "calibration study": ("model", "text.txt"),
    "report": ("out", "model", "survey"),
    "plan": ("survey", "model"),
}


@pytest.mark.parametrize(
    ("command", "source"), [(c, s) for c, sources in READ.items() for s in sources]
)
def test_every_command_leaves_everything_that_it_reads(made, monkeypatch, command, source):
    """As it is, under another name, from inside and from above: nothing is loaded, all is kept."""

    def never(*_, **__):
        raise AssertionError("work was done before the refusal")

    for place in (
        "spectrim.api.load_model",
        "spectrim.api.load_survey",
        "spectrim.api.load_elastic",
        "spectrim.studies.measure.load_model",
        "spectrim.studies.depth.load_model",
        "spectrim.studies.page.gather_page",
        "spectrim.storage.dense.load_folder",
        "spectrim.run.survey.replanning.load_survey",
        "spectrim.run.store.saving_elastic.load_survey",
    ):
        monkeypatch.setattr(place, never)
    before = contents(made)
    place = made / source
    outputs = [place, made / "survey" / ".." / source, made, *([place / "in"] * place.is_dir())]
    for output in outputs:
        with pytest.raises(OutputError, match=r"which is read|is (not )?a folder"):
            COMMANDS[command](made, output)
    assert contents(made) == before


def test_work_and_streams_stay_out_of_the_sources_too(made, tmp_path):
    save(tmp_path / "m.work")
    before = contents(tmp_path / "m.work")
    small = {"recipe": "svd", "keep": 0.6}
    for options in (
        {"output": tmp_path / "m"},
        {"output": tmp_path / "out", "work": tmp_path / "m.work"},
        {"output": tmp_path / "out", "work": tmp_path / "m.work" / "inside"},
        {"output": tmp_path / "out", "offload_streams": tmp_path / "m.work"},
        {"output": tmp_path / "out", "work": tmp_path / "out" / "work"},
        {"output": tmp_path / "out", "work": tmp_path / "out"},
    ):
        with pytest.raises(OutputError):
            api.compress(tmp_path / "m.work", **options, **small)
    assert contents(tmp_path / "m.work") == before
    assert {p.name for p in tmp_path.iterdir()} == {"m.work"}


def test_a_model_object_remembers_its_folder(made):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made / "model")
    assert ("the model", made / "model") in sources_of(model=model)
    with pytest.raises(OutputError, match="is the model"):
        api.compress(model, recipe="svd", output=made / "model", overwrite=True)


def test_a_folder_of_downloads_is_no_work_folder(tmp_path):
    for name in ("film.mkv", "film.safetensors.partial"):
        (tmp_path / name).write_text("x")
    with pytest.raises(OutputError, match=r"film\.mkv"), open_work(tmp_path):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"film.mkv", "film.safetensors.partial"}


def test_a_study_writes_over_nothing_but_a_study(made, tmp_path):
    (tmp_path / "compare.md").write_text("my notes")
    with pytest.raises(OutputError, match=r"compare\.md"):
        studies.compare(made / "model", recipes=["svd"], output=tmp_path)
    assert (tmp_path / "compare.md").read_text() == "my notes"


@pytest.mark.parametrize("name", ["page.html", "plan.json"])
def test_a_file_that_spectrim_did_not_write_is_kept(made, tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"mine": 1}))
    with pytest.raises(OutputError, match="is not replaced"):
        if name == "page.html":
            studies.report(made / "out", output=tmp_path / name, overwrite=True)
        else:
            plan_command(made / "survey", keep=0.6, output=tmp_path / name, overwrite=True)
    assert json.loads((tmp_path / name).read_text()) == {"mine": 1}


@pytest.mark.parametrize("name", ["no/such/folder/page.html", "file/page.html", "x" * 5000])
def test_a_page_that_cannot_be_written_is_refused_before_it_is_made(made, tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        studies.report(made / "out", output=tmp_path / name)


def test_pages_and_plans_of_ours_may_be_replaced(made, tmp_path):
    studies.report(made / "out", output=tmp_path / "page.html")
    assert PAGE_MARK in (tmp_path / "page.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(f"An older page. {PAGE_MARK}")
    studies.report(made / "out", output=tmp_path / "page.html", overwrite=True)
    for keep in (0.6, 0.5):
        plan_command(made / "survey", keep=keep, output=tmp_path / "plan.json", overwrite=True)
    assert {p.name for p in tmp_path.iterdir()} == {"page.html", "plan.json"}


def test_without_resuming_the_work_of_a_killed_run_goes_when_the_result_is_there(made, tmp_path):
    work = tmp_path / "out.work"
    with open_work(work) as folder:
        folder.begin({"run": "another"})
        folder.write("cut-000", {}, {})
    with pytest.raises(SpectrimError):
        api.compress(made / "model", recipe="svd", keep=2.0, output=tmp_path / "out", resume=False)
    assert (work / MANIFEST).exists()  # nothing is finished that could take its place
    api.compress(made / "model", recipe="svd", keep=0.6, output=tmp_path / "out", resume=False)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
