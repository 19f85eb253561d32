import pytest
import torch

from architectures import tiny
from spectrim.errors import InputError
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.quantized import QuantizedLinear, quantize_layer
from spectrim.layers.swap import swap_in
from spectrim.serve.bench import measure_cells, work_of
from storage_cases import linear_names


def test_work_counts_what_a_token_reads_and_multiplies():
    model = tiny("llama")[0]
    before = work_of(model)
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    read = parameters - (0 if tied else embedding.numel())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert before.bytes == 4 * read + buffers
    names = linear_names(model)
    first, second, third = (model.get_submodule(n) for n in names[:3])
    old = [m.weight.numel() for m in (first, second, third)]

    def low(m, rank):
        n, k = m.weight.shape, rank
        return LowRankLinear(n[1], n[0], k, m.bias is not None)

    swap_in(model, names[0], low(first, 3))
    swap_in(model, names[1], quantize_layer(low(second, 2), "int8", dtype=torch.float32))
    whole = QuantizedLinear.from_weight(third.weight, None, "int8", dtype=torch.float32)
    swap_in(model, names[2], QuantizedDense(whole))
    after = work_of(model)
    new = [3 * sum(first.weight.shape), 2 * sum(second.weight.shape), old[2]]
    assert before.products - after.products == sum(old) - sum(new)
    scales = 4 * (2 + second.weight.shape[0] + third.weight.shape[0])
    stored = 4 * new[0] + new[1] + new[2] + scales
    assert before.bytes - after.bytes == 4 * sum(old) - stored


def test_every_batch_and_length_is_measured():
    model = tiny("llama")[0]
    cells = list(measure_cells(model, batches=[1, 2], lengths=[3, 5], new_tokens=2, repeats=1))
    sizes = [(c.speed.batch, c.speed.prompt_length) for c in cells]
    assert sizes == [(1, 3), (1, 5), (2, 3), (2, 5)]
    for cell in cells:
        record = cell.record()
        seconds = record["first_token_seconds"]
        tokens = cell.speed.batch * cell.speed.prompt_length
        assert seconds * record["prefill_tokens_per_second"] == pytest.approx(tokens)
        assert cell.peak_memory_bytes is None or cell.peak_memory_bytes > 10**7


def test_nothing_to_measure_is_refused():
    with pytest.raises(InputError, match="nothing to measure"):
        list(measure_cells(tiny("llama")[0], batches=[], lengths=[4], new_tokens=1, repeats=1))
