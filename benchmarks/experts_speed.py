"""Experts of one block: dense ones of transformers beside compressed ones, in one run.

    python benchmarks/experts_speed.py --threads 1

A Qwen3-MoE block (32 experts of width 2048, inner 768, 8 per token) with random weights in fp32;
factors are random too, of the ranks that keep 0.6 of the bytes. CPU seconds of the block's
experts with their router for one token (decoding at batch 1) and for 256 (a prompt), the least of
some repeats; ways take turns, so that a noisy machine is noisy for all.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from protocol import environment
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from spectrim.allocate.budget import Shape, rank_for
from spectrim.layers.quantized import skeleton
from spectrim.layers.swap import swap_in
from spectrim.model.experts.layout import ExpertLayout
from spectrim.model.experts.unfold import unfold
from spectrim.serve.grouped import group_experts

RESULTS = Path(__file__).parent / "results" / "experts_speed.json"
WIDTH, INNER, EXPERTS, CHOSEN, KEEP = 2048, 768, 32, 8, 0.6
TOKENS = (1, 256)


def dense() -> nn.Module:
    """A model of one block."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=WIDTH,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        num_hidden_layers=1,
        vocab_size=100,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


def compressed(model: nn.Module, storage: str) -> nn.Module:
    """The same with experts of equal rank."""
    small = copy.deepcopy(model)
    path = "model.layers.0.mlp.experts"
    layouts = {
        f"{path}.gate_up_proj": ExpertLayout(EXPERTS, 2 * INNER, WIDTH, False, "stacked"),
        f"{path}.down_proj": ExpertLayout(EXPERTS, WIDTH, INNER, False, "whole"),
    }
    unfold(small, layouts)
    linears = {n: m for n, m in small.named_modules() if n.startswith(path)}
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            continue
        m, n = linear.weight.shape
        rank = rank_for(Shape(m, n), KEEP, storage=storage) // 8 * 8  # aligned
        layer = skeleton(storage, "native", (m, n), rank, bias=False, dtype=torch.float32)
        layer.to_empty(device="cpu")
        for value in layer.parameters():
            value.data.normal_(0.0, value.shape[1] ** -0.5)
        if storage == "packed":
            layer.order.copy_(torch.randperm(len(layer.order)))
        swap_in(small, name, layer)
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = dense()
    ways = {"dense, one by one": model, "dense, grouped_mm": copy.deepcopy(model)}
    for storage in ("packed", "factored"):
        ways[f"{storage}, one by one"] = compressed(model, storage)
    ways["factored, grouped"] = compressed(model, "factored")
    group_experts(ways["factored, grouped"])
    for name, way in ways.items():
        way.set_experts_implementation("eager" if name == "dense, one by one" else "grouped_mm")
    seconds = {name: dict.fromkeys(map(str, TOKENS), float("inf")) for name in ways}
    with torch.inference_mode():
        for tokens in TOKENS:
            x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(1))
            for _ in range(options.repeats):
                for name, way in ways.items():
                    started = time.process_time()
                    way.model.layers[0].mlp(x)
                    spent = time.process_time() - started
                    seconds[name][str(tokens)] = min(spent, seconds[name][str(tokens)])
    protocol = " ".join((__doc__ or "").split("\n\n")[2].split())
    record = {"protocol": protocol, "environment": environment(), "cpu_seconds": seconds}
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    main()
