"""What users do with a loaded model: compile, export, pipelines, beams, assistants, checkpointing.

The independent answer is the dense model with the factors multiplied out.
"""

import copy
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from architectures import tiny, windows
from jobs import logits
from spectrim.demo.run import MODEL as BUNDLED
from storage_cases import compressed, save

TOKENS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("everyday") / "out"
    save(compressed(model=tiny("llama", vocab_size=4096)[0]), path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, path)
    return path


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def dense(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded.dequantize()
    return loaded


def test_a_loaded_model_compiles_without_a_graph_break(model):
    ids = windows(1, 8)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(found, logits(model, ids))


def test_a_block_is_exported_with_its_factors_as_products_of_their_own(model):
    block, seen = model.model.layers[1], {}

    def note(module, args, kwargs):
        seen.update(args=args, kwargs={**kwargs, "past_key_values": None, "use_cache": False})

    with block.register_forward_pre_hook(note, with_kwargs=True):
        logits(model, windows(2, 8))
    exported = torch.export.export(block, seen["args"], seen["kwargs"])
    found = exported.module()(*seen["args"], **seen["kwargs"])
    torch.testing.assert_close(found, block(*seen["args"], **seen["kwargs"]))
    products = [node for node in exported.graph.nodes if "linear" in str(node.target)]
    parts = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert len(products) == len(parts) > 7


def test_a_pipeline_writes_what_the_dense_model_writes(folder, dense):
    write = pipeline("text-generation", model=str(folder), device="cpu")
    text = "It was the best of times"
    found = write(text, return_full_text=False, **TOKENS)[0]["generated_text"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert found == tokenizer.decode(dense.generate(ids, **TOKENS)[0, ids.shape[1] :])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_beams_and_a_static_cache_find_what_they_find_densely(model, dense, options):
    ids = windows(2, 6)
    assert torch.equal(
        model.generate(ids, **options, **TOKENS), dense.generate(ids, **options, **TOKENS)
    )


def test_the_compressed_model_assists_its_original_without_changing_a_token(model):
    original = tiny("llama", vocab_size=4096)[0].eval()
    ids = windows(1, 6)
    expected = original.generate(ids, **TOKENS)
    assert torch.equal(original.generate(ids, assistant_model=model, **TOKENS), expected)


def test_gradient_checkpointing_gives_the_same_gradients(model):
    ids = windows(2, 8)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": False})
    for one in (model, other):
        one.train()
        one(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, msg=name)
