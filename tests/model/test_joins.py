"""Which outputs are added to the residual stream, against what is known of architectures."""

import pytest

from architectures import tiny, windows
from spectrim.model.tracing import trace

JOINS = {
    "llama": {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"},
    "qwen3": {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"},
    "phi3": {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"},
    "gpt2": {"attn.c_proj": "", "mlp.c_proj": "ln_2"},
    "opt": {"self_attn.out_proj": "", "fc2": "final_layer_norm"},
    # Only what every token passes: down projections belong to experts.
    "mixtral": {"self_attn.o_proj": ""},
    # A norm of outputs stands between the layer and the sum.
    "gemma2": {},
    "gemma3": {},
    # Both branches are added at once.
    "gpt_neox": {},
}


@pytest.mark.parametrize("name", JOINS)
def test_outputs_that_are_added_to_the_stream_are_found(name):
    model, _ = tiny(name)
    for block in trace(model, windows(1, 8)).blocks:
        found = {t.projection: t.joins for t in block.targets if t.joins is not None}
        assert found == JOINS[name]


def test_a_factor_before_the_sum_is_not_passed_over():
    model, _ = tiny("llama")
    plain = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 0.5 * plain(x)
    first, second = trace(model, windows(1, 8)).blocks
    assert [t.joins for t in first.targets if t.projection == "mlp.down_proj"] == [None]
    assert [t.joins for t in second.targets if t.projection == "mlp.down_proj"] != [None]
