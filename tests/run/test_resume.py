"""Killed anywhere and run again: the same bytes. Every run is a forked child of this process."""

import os
import random
import resource
import signal
import time

import pytest
import torch

from architectures import tiny, windows
from children import child
from spectrim import api
from spectrim.recipes import get_recipe
from spectrim.storage import work as work_module
from spectrim.storage.lock import locked
from spectrim.storage.tensor_file import TensorFile


def recipe_for(name):
    changes = {"calibration": {"batch": 4}}
    if name == "aa-svd":
        step = {"step": "block", "epochs": 2, "batch": 4, "look_ahead": 1}
        changes["refine"] = [{"step": "closed_form"}, step]
        changes["storage"] = {"kind": "packed"}
    if name == "spectrim":
        changes["allocate"] = {"gradient_windows": 4}
    if name == "soco":
        changes["learn"] = {
            "batch": 4,
            "warmup_steps": 2,
            "explore_steps": 6,
            "oscillate_steps": 4,
            "sparsify_steps": 4,
            "recover_steps": 4,
            "sensitivity_steps": 2,
            "checkpoint_every": 3,
        }
    return get_recipe(name).with_changes(**changes)


class Struck:
    """A signal at the n-th event of a run: before a file is written, after it, or at a step."""

    def __init__(self, at=None, sig=signal.SIGKILL, event=None):
        self.left, self.sig, self.event = at, sig, event

    def __call__(self, event):
        if self.left is None or (self.event is not None and event != self.event):
            return
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.sig)

    def start(self, stage, total):
        pass

    def advance(self, stage, note=""):
        self("advance")

    def finish(self, stage):
        pass


def compress_in(folder, name, struck=None, **options):
    """What a child does: compress, with a blow where one is due; reports notes."""
    struck = struck or Struck()
    plain = work_module.write_tensors

    def write(path, slots, metadata=None):
        struck("write")
        digest = plain(path, slots, metadata)
        struck("written")
        return digest

    def act():
        work_module.write_tensors = write
        options.setdefault("text", windows(8))
        result = api.compress(
            str(folder / "model"),
            recipe=recipe_for(name),
            keep=options.pop("keep", 0.6),
            output=folder / "out",
            progress=struck,
            **options,
        )
        return result.report["notes"]

    return child(act)


def tensors(folder):
    file = TensorFile(folder / "model.safetensors")
    return {name: file.read(name) for name in file.entries}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint, and what every recipe makes of it without any blow."""
    folder = tmp_path_factory.mktemp("home")
    tiny("llama", num_hidden_layers=3)[0].to(torch.bfloat16).save_pretrained(folder / "model")
    # Imports and first-time set-up happen here once, so that children begin at once.
    api.compress(str(folder / "model"), recipe="svd", keep=0.6, output=folder / "warm")
    return folder


@pytest.fixture
def place(home, tmp_path):
    (tmp_path / "model").symlink_to(home / "model")
    return tmp_path


@pytest.fixture(scope="module")
def expected(home, tmp_path_factory):
    found = {}

    def of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            (folder / "model").symlink_to(home / "model")
            counter = Struck(10**6)
            status, _ = compress_in(folder, name, counter)
            assert status == 0
            found[name] = tensors(folder / "out")
        return found[name]

    return of


SINGLE = ("aa-svd", "spectrim")
"""Recipes that are struck once in every run as well; the tests below do so with svd-llm."""

BLOWS = [
    pytest.param(name, seed, marks=() if seed <= (name in SINGLE) else pytest.mark.slow)
    for name in ("svd-llm", "aa-svd", "svd-llm-v2", "spectrim", "soco")
    for seed in range(5)
]
"""Even seeds strike twice; more moments with `-m slow`."""


@pytest.mark.parametrize(("name", "seed"), BLOWS)
def test_killed_and_run_again_gives_the_same_bytes(place, expected, name, seed):
    draws = random.Random(f"{name}{seed}")
    # A learned run keeps itself in its checkpoint; the others write a piece for every block.
    event = "advance" if name == "soco" else draws.choice(("write", "written", "advance"))
    status, said = compress_in(
        place, name, Struck(draws.randint(1, 14 if name == "soco" else 3), event=event)
    )
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, said
    assert not (place / "out").exists()
    # Every second run is killed once more, so that a resumed run is interrupted too.
    if seed % 2 == 0:
        compress_in(place, name, Struck(draws.randint(2, 6), event=event))
    if not (place / "out").exists():
        status, said = compress_in(place, name)
        assert status == 0, said
    assert same(tensors(place / "out"), expected(name))
    left = {p.name for p in place.iterdir()}
    assert left == {"model", "out"}


def killed(place, name="svd-llm", at=2):
    """A work folder in which `at` blocks are finished."""
    status, _ = compress_in(place, name, Struck(at, event="advance"))
    assert os.WIFSIGNALED(status)
    return place / "out.work"


def test_a_run_in_memory_goes_on_out_of_core(place, expected):
    killed(place)
    status, notes = compress_in(place, "svd-llm", out_of_core=True)
    assert status == 0
    assert any("resumed after 2 finished pieces" in note for note in notes)
    assert same(tensors(place / "out"), expected("svd-llm"))


def test_finished_blocks_are_not_computed_again(place):
    killed(place)
    from spectrim.run.cut import one_shot

    plain = one_shot.replace_target

    def act():
        seen = []

        def noted(target, *rest, **options):
            seen.append(target.block)
            return plain(target, *rest, **options)

        one_shot.replace_target = noted
        api.compress(
            str(place / "model"),
            recipe=recipe_for("svd-llm"),
            keep=0.6,
            text=windows(8),
            output=place / "out",
        )
        return sorted(set(seen))

    assert child(act) == (0, [2])


def test_another_recipe_text_or_model_is_refused_by_name(place, home):
    work = killed(place)
    before = {p.name: p.read_bytes() for p in work.iterdir() if p.name != "lock"}
    for changed, field in (
        ({"keep": 0.5}, "keep: 0.6 there, 0.5 now"),
        ({"text": windows(8, seed=9)}, "windows: "),
        ({"dtype": "float64"}, "working dtype: 'float32' there, 'float64' now"),
    ):
        if changed.get("dtype") == "float64":
            changed["dtype"] = torch.float64
        status, said = compress_in(place, "svd-llm", **changed)
        assert os.waitstatus_to_exitcode(status) == 2
        assert said[0] == "InputError" and field in said[1]
    tiny("llama", num_hidden_layers=3)[0].to(torch.float32).save_pretrained(place / "other")
    (place / "model").unlink()
    (place / "other").rename(place / "model")
    status, said = compress_in(place, "svd-llm")
    assert "model: " in said[1] and "stored dtype" in said[1]
    assert {p.name: p.read_bytes() for p in work.iterdir()} == before


def test_a_flipped_bit_in_a_finished_block_is_found_and_the_block_computed_again(place, expected):
    work = killed(place)
    damaged = work / "cut-001.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[-100] ^= 4
    damaged.write_bytes(raw)
    status, said = compress_in(place, "svd-llm")
    assert os.waitstatus_to_exitcode(status) == 2
    assert said[0] == "ArtifactError" and "cut-001.safetensors is damaged" in said[1]
    damaged.unlink()
    status, _ = compress_in(place, "svd-llm")
    assert status == 0
    assert same(tensors(place / "out"), expected("svd-llm"))


def test_a_full_disk_ends_with_a_message_and_can_be_resumed(place, expected):
    def limited(size):
        def act():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            api.compress(
                str(place / "model"),
                recipe=recipe_for("svd-llm"),
                keep=0.6,
                text=windows(8),
                output=place / "out",
            )

        return child(act)

    status, said = limited(5_000)
    assert os.waitstatus_to_exitcode(status) == 2
    assert said[0] == "OutputError" and "cut-000" in said[1] and "File too large" in said[1]
    assert not (place / "out").exists()
    # The blocks' files fit, the whole model with its header does not.
    whole = sum(t.nbytes for t in expected("svd-llm").values())
    status, said = limited(whole)
    assert said is not None and said[0] == "OutputError" and "nothing was left there" in said[1]
    assert {p.name for p in place.iterdir()} == {"model", "out.work"}
    status, _ = compress_in(place, "svd-llm")
    assert status == 0
    assert same(tensors(place / "out"), expected("svd-llm"))


def test_an_interrupt_leaves_a_folder_to_go_on_from(place, expected):
    status, _ = compress_in(place, "svd-llm", Struck(2, signal.SIGINT, "written"))
    assert os.waitstatus_to_exitcode(status) == 130
    assert {p.name for p in place.iterdir()} == {"model", "out.work"}
    status, notes = compress_in(place, "svd-llm")
    assert status == 0 and any("resumed after" in note for note in notes)
    assert same(tensors(place / "out"), expected("svd-llm"))


def test_two_processes_on_one_output(place):
    """The second is refused while the first lives; a dead one's lock is no obstacle."""
    pid = os.fork()
    if pid == 0:
        with locked(place / ".out.lock", place=place / "out"):
            (place / "ready").touch()
            time.sleep(60)
        os._exit(0)
    deadline = time.monotonic() + 20
    while not (place / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    status, said = compress_in(place, "svd-llm", work=place / "elsewhere")
    assert os.waitstatus_to_exitcode(status) == 2
    assert said[0] == "OutputError" and f"pid {pid}" in said[1]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (place / ".out.lock").exists()
    status, _ = compress_in(place, "svd-llm")
    assert status == 0


def test_an_output_that_cannot_be_written(place):
    (place / "closed").mkdir(mode=0o500)

    def act():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        api.compress(
            tiny("llama")[0],
            recipe="svd",
            keep=0.6,
            output=place / "closed" / "out",
        )

    place.chmod(0o755)
    for above in list(place.parents)[:3]:
        above.chmod(0o755)
    status, said = child(act)
    assert os.waitstatus_to_exitcode(status) == 2
    assert said[0] == "OutputError" and "cannot be written" in said[1]
    assert not list((place / "closed").iterdir())


def test_a_poisoned_window_names_the_block_and_keeps_what_was_finished(place, expected):
    """Activations overflow in a later block: earlier ones stay for the next, healthy run."""
    from spectrim.run.cut import one_shot

    plain = one_shot.block_moments

    def act():
        def poisoned(job, replay, block, needs):
            if block.index == 2:
                states = replay.stream.read(slice(0, 1))
                states[0, 3, 5] = float("nan")
                replay.stream.write(slice(0, 1), states)
            return plain(job, replay, block, needs)

        one_shot.block_moments = poisoned
        api.compress(
            str(place / "model"),
            recipe=recipe_for("svd-llm"),
            keep=0.6,
            text=windows(8),
            output=place / "out",
        )

    status, said = child(act)
    assert os.waitstatus_to_exitcode(status) == 2
    assert said[0] == "NonFiniteError" and "model.layers.2" in said[1]
    assert (place / "out.work" / "cut-001.safetensors").exists()
    status, notes = compress_in(place, "svd-llm")
    assert status == 0 and any("resumed after 2" in note for note in notes)
    assert same(tensors(place / "out"), expected("svd-llm"))
