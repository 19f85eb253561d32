import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spectrim.allocate import Curve, Limits, Shape
from spectrim.allocate.elastic import elastic_order
from spectrim.errors import ArtifactError, OutputError
from spectrim.storage.elastic import Base, Elastic, is_elastic, load_elastic, save_elastic
from spectrim.storage.folder import Papers

SHAPES = {"a.q": (24, 16), "a.k": (8, 16), "b.up": (40, 16)}


def artifact():
    rng = np.random.default_rng(0)
    curves = [Curve(n, 0, n, Shape(*s, n == "a.k")) for n, s in SHAPES.items()]
    importance = [(rng.random(c.rank),) for c in curves]
    order, _ = elastic_order(curves, importance, limits=Limits(dtype_bytes=2), adapters=1)
    generator = torch.Generator().manual_seed(0)
    factors = {
        c.name: (
            torch.randn(c.shape.out_features, h, generator=generator).bfloat16(),
            torch.randn(h, c.shape.in_features, generator=generator).bfloat16(),
        )
        for c, h in zip(order.curves, order.held, strict=True)
    }
    base = Base(name="someone/base", identity="0" * 64, dtype="bfloat16", other_bytes=1000)
    return Elastic(order, factors, base, "test")


def saved(folder):
    save_elastic(artifact(), folder, Papers("name: t\n", {"quality": 1.0}, "# card\n"))
    return folder


def test_an_artifact_survives_the_disk(tmp_path):
    one, other = artifact(), load_elastic(saved(tmp_path / "e"))
    assert is_elastic(tmp_path / "e") and not is_elastic(tmp_path)
    for keep in (1.0, 0.8, 0.5, one.order.smallest_keep):
        assert one.order.plan(keep) == other.order.plan(keep)
    assert one.base == other.base and one.source == other.source
    for name, (up, down) in one.factors.items():
        assert torch.equal(other.factors[name][0], up)
        assert torch.equal(other.factors[name][1], down)


def test_factors_never_take_more_than_the_dense_targets(tmp_path):
    tensors = load_file(saved(tmp_path / "e") / "elastic.safetensors")
    factors = sum(t.nbytes for n, t in tensors.items() if not n.startswith("order."))
    assert factors <= sum(2 * m * n for m, n in SHAPES.values())


def test_a_destination_in_use_is_kept(tmp_path):
    saved(tmp_path / "e")
    with pytest.raises(OutputError, match="overwrite"):
        saved(tmp_path / "e")
    save_elastic(artifact(), tmp_path / "e", Papers("", {}, ""), overwrite=True)
    assert load_elastic(tmp_path / "e").source == "test"


def edit_json(folder, change):
    path = folder / "elastic.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(folder, change):
    path = folder / "elastic.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


JSON_DAMAGE = {
    "a newer format": (lambda d: d.update(format_version=99), "reads up to 1"),
    "an unknown key": (lambda d: d.update(surprise=1), "surprise"),
    "a missing part": (lambda d: d.pop("base"), "base"),
    "a path as a name": (lambda d: d["targets"][0].update(name="../../etc"), "name"),
    "a wrong size": (lambda d: d["targets"][0].update(held=3), "expected"),
    "too large a floor": (lambda d: d["targets"][0].update(least=2**20), "do not agree"),
    "two of a name": (lambda d: d["targets"][1].update(name="a.q"), "a.q"),
    "no targets": (lambda d: d.update(targets=[]), "targets"),
}


@pytest.mark.parametrize("damage", JSON_DAMAGE)
def test_a_damaged_description_is_refused(damage, tmp_path):
    change, message = JSON_DAMAGE[damage]
    edit_json(saved(tmp_path / "e"), change)
    with pytest.raises(ArtifactError, match=message):
        load_elastic(tmp_path / "e")


TENSOR_DAMAGE = {
    "a lost factor": (lambda t: t.pop("a.q.up"), "a.q.up is absent"),
    "another dtype": (lambda t: t.update({"a.q.up": t["a.q.up"].float()}), "a.q.up"),
    "a factor that is no number": (lambda t: t["a.q.up"][0, 0].fill_(float("nan")), "not finite"),
    "an endless factor": (lambda t: t["b.up.down"][0, 0].fill_(float("inf")), "b.up hold numbers"),
    "an order of others": (lambda t: t["order.target"].fill_(0), "do not agree"),
    "a target that is not there": (lambda t: t["order.target"][:1].fill_(77), "do not agree"),
    "scores without value": (lambda t: t["order.score"].fill_(float("nan")), "NaN"),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_damaged_tensors_are_refused(damage, tmp_path):
    change, message = TENSOR_DAMAGE[damage]
    edit_tensors(saved(tmp_path / "e"), change)
    with pytest.raises(ArtifactError, match=message):
        load_elastic(tmp_path / "e")


def test_a_cut_off_file_is_refused(tmp_path):
    path = saved(tmp_path / "e") / "elastic.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"\.safetensors is truncated: tensor 'order\.target'"):
        load_elastic(tmp_path / "e")
