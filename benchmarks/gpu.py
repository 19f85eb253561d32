"""Everything about an accelerator, one part after the other; `benchmarks/gpu.sh` runs all of them.

    python benchmarks/gpu.py PART OUT [--model FOLDER] [--small]

`OUT/PART.json` is written row by row and never measured twice, so that a part that ran out of time
goes on where it ended. `--small` measures toys in seconds, on a CPU too: it shows that a part runs.

- `layers`: the seven linear layers of one Llama-7B block, 1, 512 and 4,096 tokens, in CUDA graphs
  and without, beside dense bf16 with and without joined inputs;
- `blocks`: compressing two blocks of Llama-7B shape with 32 windows of 2,048, time by stage, peak;
- `decode`: reading and writing with those two blocks, by `spectrim bench`;
- `recipes`: every preset on the bundled model: that it ends, its time, its peak;
- `model`: `--model` by svd-llm and the three efforts of the default recipe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inference import BLOCKS, Linears, randomize, shapes
from torch import nn

import spectrim
from spectrim.allocate.budget import rank_for
from spectrim.demo.run import CALIBRATION, MODEL
from spectrim.devices import (
    HOST,
    accelerator,
    forget_peak_memory,
    name_of,
    on_host,
    peak_memory,
    wait_for,
)
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import QuantizedLinear, quantize_layer
from spectrim.recipes import PRESETS
from spectrim.run.options import RunOptions
from spectrim.serve.prepare import prepare
from spectrim.studies.benching import Timing, bench

DEVICE = accelerator() or HOST
SMALL = {"hidden": 128, "key_value": 64, "intermediate": 192}
ROUNDS = 7
JOINED = [("q", "k", "v"), ("gate", "up")]
VARIANTS = (
    "dense", "dense_joined", "factored", "packed",
    "dense_int8", "dense_int4", "factored_int8", "factored_int4", "packed_any",
)  # fmt: skip


class DenseJoined(nn.Module):
    """What serving engines make of a dense block: q, k, v and gate, up as one product each."""

    def __init__(self, plain: Linears):
        super().__init__()
        self.qkv, self.gate_up = (self._stack(plain, names) for names in JOINED)
        self.o, self.down = plain.o, plain.down
        self.sizes = [getattr(plain, name).out_features for name in "qkv"]

    @staticmethod
    def _stack(plain: Linears, names: tuple[str, ...]) -> nn.Linear:
        weight = torch.cat([getattr(plain, name).weight for name in names])
        joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        joined.weight = nn.Parameter(weight)
        return joined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, tokens, hidden) -> (1, tokens, hidden)."""
        q, k, v = self.qkv(x).split(self.sizes, -1)
        h = self.o(q)
        h[..., : k.shape[-1]] += k + v
        gate, up = self.gate_up(h).chunk(2, -1)
        return self.down(nn.functional.silu(gate) * up)


def variant(block: dict[str, int], name: str, keep: float) -> nn.Module:
    """One prepared block at half the bytes; integer factors have the rank of native ones at `keep`.

    `any` is prepared with all the memory that it can use.
    """
    kind, _, weights = name.partition("_")
    layers: dict[str, nn.Module] = {}
    for place, shape in shapes(block).items():
        m, n = shape.out_features, shape.in_features
        if kind == "dense":
            layer: nn.Module = nn.Linear(n, m, bias=False, dtype=torch.bfloat16)
        else:
            rank = rank_for(shape, keep, storage=kind, dtype_bytes=2)
            assert rank is not None
            made = LowRankLinear if kind == "factored" else PackedLinear
            layer = made(n, m, rank // 16 * 16, False, dtype=torch.bfloat16)
        if isinstance(layer, PackedLinear):
            layer.order = torch.randperm(min(m, n)).to(torch.int32)
        layers[place] = layer
    model: Any = Linears(layers)
    randomize(model)
    model.to(DEVICE)
    for place, layer in layers.items():
        if not weights.startswith("int"):
            continue
        if kind == "dense":
            options = {"dtype": torch.bfloat16}
            inner = QuantizedLinear.from_weight(layer.weight.detach(), None, weights, **options)
            setattr(model, place, QuantizedDense(inner))
        else:
            quantize_layer(layer, weights, dtype=torch.bfloat16)
    if name == "dense_joined":
        return DenseJoined(model)
    found = prepare(model.eval(), groups=JOINED, memory="any" if weights == "any" else None)
    print(name, found.record(), flush=True)
    return model


def seconds_per_call(call: Callable[[], Any], budget: float) -> float:
    """Median over rounds of the mean of as many calls as the budget holds."""
    call()
    wait_for(DEVICE)
    started = time.perf_counter()
    call()
    wait_for(DEVICE)
    repeats = max(1, int(budget / ROUNDS / max(time.perf_counter() - started, 1e-6)))
    found = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        wait_for(DEVICE)
        found.append((time.perf_counter() - started) / repeats)
    return statistics.median(found)


def in_a_graph(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """Replays a recorded call; None where there are no graphs."""
    if on_host(DEVICE):
        return None
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def layers(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    block = SMALL if arguments.small else BLOCKS["llama-7b"]

    def measure(name: str) -> dict[str, Any]:
        row: dict[str, Any] = {}
        with torch.inference_mode():
            model = variant(block, name, 0.5)
            for tokens in (1, 512, 4096):
                x = torch.randn(1, tokens, block["hidden"]).to(DEVICE, torch.bfloat16)
                call = partial(model, x)
                replay = in_a_graph(call)
                row[str(tokens)] = {
                    "eager_us": 1e6 * seconds_per_call(call, arguments.budget),
                    "graph_us": replay and 1e6 * seconds_per_call(replay, arguments.budget),
                }
        return row

    for name in VARIANTS:
        yield name, lambda name=name: measure(name)


def two_blocks(arguments: argparse.Namespace, folder: Path) -> Path:
    """A Llama with two blocks of the 7B's shape and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    block = SMALL if arguments.small else BLOCKS["llama-7b"]
    heads = block["hidden"] // 128 or 1
    config = LlamaConfig(
        vocab_size=256 if arguments.small else 32000,
        hidden_size=block["hidden"],
        intermediate_size=block["intermediate"],
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def compressed(model: Any, recipe: Any, text: Any, **options: Any) -> dict[str, Any]:
    """Seconds by stage, and the peak of the device."""
    forget_peak_memory(DEVICE)
    wait_for(DEVICE)
    started = time.perf_counter()
    result = spectrim.compress(model, recipe=recipe, text=text, device=DEVICE, **options)
    wait_for(DEVICE)
    return {
        "seconds": time.perf_counter() - started,
        "stages": result.report["seconds"],
        "peak_bytes": peak_memory(DEVICE),
        "keep": result.report["keep"]["achieved"],
    }


def blocks(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    shape = (4, 32) if arguments.small else (32, 2048)
    ids = torch.randint(3, 250, shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as place:
        folder = two_blocks(arguments, Path(place) / "model")
        for recipe in ("svd-llm", "spectrim"):
            yield recipe, lambda recipe=recipe: compressed(str(folder), recipe, ids, keep=0.5)
        options = {"keep": 0.5, "out_of_core": True, "output": Path(place) / "out"}
        yield "svd-llm out of core", lambda: compressed(str(folder), "svd-llm", ids, **options)


def decode(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    sizes = {"lengths": (16,), "new_tokens": 4} if arguments.small else {"lengths": (128,)}
    with tempfile.TemporaryDirectory() as place:
        dense = two_blocks(arguments, Path(place) / "dense")
        for storage, weights in (
            ("factored", "native"),
            ("packed", "native"),
            ("factored", "int4"),
        ):
            out = Path(place) / f"{storage}-{weights}"
            forms = {"storage": storage, "weights": weights, "output": out}
            for memory in (None, "any"):

                def measure(out=out, forms=forms, memory=memory) -> Any:
                    if not out.exists():
                        spectrim.compress(
                            str(dense), recipe="svd", keep=0.5, device=DEVICE, **forms
                        )
                    options = RunOptions(device=str(DEVICE), dtype="bfloat16")
                    timing = Timing(batches=(1, 32), memory=memory, **sizes)
                    return bench(out, dense, options, timing)

                yield f"{storage} {weights} memory {memory}", measure


def recipes(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    size = {"windows": 8, "window_length": 32} if arguments.small else {"windows": 64}
    for name in ("svd",) if arguments.small else PRESETS:
        options = {} if name == "acip" else {"keep": 0.6}
        yield (
            name,
            lambda name=name, options=options: compressed(
                str(MODEL), name, str(CALIBRATION), **options, **size
            ),
        )


def model(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Any]]]:
    if arguments.model is None:
        return
    size = {"keep": 0.6, "windows": 128, "window_length": 256}
    for name in ("svd-llm", "spectrim", "spectrim-balanced", "spectrim-thorough"):
        yield name, lambda name=name: compressed(arguments.model, name, str(CALIBRATION), **size)


PARTS = {"layers": layers, "blocks": blocks, "decode": decode, "recipes": recipes, "model": model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="a folder or name, for the part `model`")
    parser.add_argument("--small", action="store_true", help="toys, to see that a part runs")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds behind each timing")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.part}.json"
    facts = {"device": name_of(DEVICE), "torch": torch.__version__, "small": arguments.small}
    found = json.loads(path.read_text()) if path.exists() else {**facts, "rows": {}}
    if any(found[key] != value for key, value in facts.items()):
        sys.exit(f"{path} is of {found['device']}, this is {facts['device']}; give another folder")
    for name, measure in PARTS[arguments.part](arguments):
        if name not in found["rows"]:
            found["rows"][name] = measure()
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(arguments.part, name, json.dumps(found["rows"][name])[:200], flush=True)


if __name__ == "__main__":
    main()
