"""Conv1D models: layers remember how the original stored its weight, also in memory."""

import pytest
import torch

from architectures import tiny, windows
from spectrim import api


@pytest.mark.parametrize("recipe", ["svd-llm", "svd-llm-update"])
def test_dense_layers_come_back_as_the_original_stored_them(recipe):
    model, _ = tiny("gpt2")
    ids = windows(2)
    result = api.compress(model, recipe=recipe, keep=0.7, text=windows(6, 12))
    with torch.no_grad():
        before = result.model(ids).logits
    from spectrim.storage.attach import attach

    attach(result.model)
    dense = result.model.dequantize()
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, before, rtol=1e-4, atol=1e-5)
