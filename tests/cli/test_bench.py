import json

import pytest
from typer.testing import CliRunner

from architectures import BLOCKS, tiny
from spectrim import api
from spectrim.cli.bench import print_bench
from spectrim.cli.main import app
from spectrim.cli.study import numbers
from spectrim.errors import InputError


def test_dense_and_compressed_are_timed_side_by_side(tmp_path, capsys):
    tiny("llama")[0].save_pretrained(tmp_path / "dense")
    api.compress(tmp_path / "dense", keep=0.5, recipe="svd", output=tmp_path / "small")
    sizes = ["--batch", "1,2", "--lengths", "4", "--new-tokens", "2", "--repeats", "1"]
    arguments = ["bench", str(tmp_path / "small"), "--against", str(tmp_path / "dense"), *sizes]
    ran = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert ran.exit_code == 0
    found = json.loads(ran.stdout)
    assert [c["batch"] for c in found["compressed"]["cells"]] == [1, 2]
    assert found["ideal"]["decode"] == found["dense"]["bytes"] / found["compressed"]["bytes"]
    assert found["ideal"]["prefill"] > 1
    assert found["environment"]["torch"]
    prepared = found["compressed"]["prepared"]
    assert sum(prepared["layers"].values()) == BLOCKS * 7
    assert prepared["bytes_after"] <= prepared["bytes_before"]
    for dense, small, gain in zip(
        found["dense"]["cells"], found["compressed"]["cells"], found["speedup"], strict=True
    ):
        key = "decode_tokens_per_second"
        assert gain["decode"] == pytest.approx(small[key] / dense[key])
    ran = CliRunner().invoke(
        app, [*arguments, "--as-loaded", "--latent-cache", "--json"], catch_exceptions=False
    )
    found = json.loads(ran.stdout)
    assert found["compressed"]["prepared"] is None
    whole = found["compressed"]["cells"][0]["cache_bytes_per_token"]
    assert whole == found["dense"]["cells"][0]["cache_bytes_per_token"] == BLOCKS * 2 * 20 * 4
    assert found["latent_cache"]["cells"][0]["cache_bytes_per_token"] < whole
    print_bench(found)
    shown = capsys.readouterr().out
    assert "latent cache" in shown
    assert "1 x 4" in shown
    wrong = ["bench", str(tmp_path / "dense"), "--against", str(tmp_path / "small"), *sizes]
    refused = CliRunner().invoke(app, wrong)
    assert refused.exit_code != 0


@pytest.mark.parametrize("words", ["", "1,x", "0", "-3", "1,,2"])
def test_numbers_that_are_none_are_refused(words):
    with pytest.raises(InputError, match="--batch"):
        numbers("--batch", words, least=1)
    assert numbers("--batch", "1, 8,32", least=1) == [1, 8, 32]
