r"""Peak memory of compressing a checkpoint that is not in memory, beside its prediction.

Writes a randomly initialised Llama of at least 1.2 billion parameters in bf16 shards (many thin
blocks, so that the decompositions take minutes), compresses it out of core in a process of its
own, and compares the peak resident memory of that process with the size of the checkpoint.

    python benchmarks/out_of_core.py --folder /tmp/big --recipes svd-llm svd
    python benchmarks/out_of_core.py --folder /tmp/big --experts 64 --blocks 12 --width 2048 \
        --inner 768 --recipes svd-llm --only 'model.layers.6.*' \
        --result benchmarks/results/out_of_core_experts.json

The second is a mixture; a block takes minutes, so only one is compressed, and the others are read,
run and written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "out_of_core.json"
WINDOWS, LENGTH, KEEP = 2, 64, 0.6

RUN = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
from spectrim import api
from spectrim.recipes import get_recipe
folder, output, recipe, windows, length, keep, *only = sys.argv[1:]
windows, length = int(windows), int(length)
changed = get_recipe(recipe).with_changes(
    calibration={"batch": 1, "windows": windows, "window_length": length}, seed=0,
    targets={"only": only},
)
ids = torch.randint(0, 1000, (windows, length), generator=torch.Generator().manual_seed(0))
options = {"recipe": changed, "keep": float(keep), "text": ids}
predicted = api.estimate(folder, out_of_core=True, recipe=changed, text=ids)
started = time.perf_counter()
result = api.compress(folder, output=output, out_of_core=True, **options)
print(json.dumps({
    "predicted": predicted.summary(),
    "seconds": time.perf_counter() - started,
    "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "stored_bytes": result.report["stored"]["bytes"],
}))
"""


def write_checkpoint(folder: Path, blocks: int, width: int, inner: int, experts: int) -> dict:
    """A Llama or, with experts, a Qwen3-MoE with random weights.

    Every block of a mixture has the same ones, drawn once, and one file each.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, Qwen3MoeConfig

    vocabulary = 1000
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "dtype": "bfloat16",
    }
    if experts:
        mixture = {"num_experts": experts, "num_experts_per_tok": 8, "head_dim": 64}
        config = Qwen3MoeConfig(**sizes, **mixture, moe_intermediate_size=inner)
        config.architectures = ["Qwen3MoeForCausalLM"]
    else:
        config = LlamaConfig(**sizes, intermediate_size=inner)
        config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    draws = torch.Generator().manual_seed(0)
    home: dict[str, str] = {}
    numbers = 0

    def matrix(out: int, into: int) -> torch.Tensor:
        return (torch.randn(out, into, generator=draws) * into**-0.5).bfloat16()

    def put(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal numbers
        save_file(tensors, folder / name, metadata={"format": "pt"})
        home.update(dict.fromkeys(tensors, name))
        numbers += sum(t.numel() for t in tensors.values())

    def mlp(path: str) -> dict[str, torch.Tensor]:
        found = {f"{path}.{name}_proj.weight": matrix(inner, width) for name in ("gate", "up")}
        return found | {f"{path}.down_proj.weight": matrix(width, inner)}

    def block() -> dict[str, torch.Tensor]:
        found = {f"self_attn.{name}_proj.weight": matrix(width, width) for name in "qkvo"}
        for name in ("input_layernorm", "post_attention_layernorm"):
            # Residuals of hundreds of random blocks would grow without end at unit gains.
            found[f"{name}.weight"] = 0.1 * ones
        if not experts:
            return found | mlp("mlp")
        for expert in range(experts):
            found |= mlp(f"mlp.experts.{expert}")
        found |= {f"self_attn.{name}_norm.weight": ones[:64].clone() for name in "qk"}
        return found | {"mlp.gate.weight": matrix(experts, width)}

    ones = torch.ones(width, dtype=torch.bfloat16)
    put(
        "model-rest.safetensors",
        {
            "model.embed_tokens.weight": matrix(vocabulary, width),
            "lm_head.weight": matrix(vocabulary, width),
            "model.norm.weight": ones.clone(),
        },
    )
    drawn = block() if experts else None
    step = 1 if experts else 4
    for start in range(0, blocks, step):
        tensors = {
            f"model.layers.{number}.{name}": value
            for number in range(start, min(start + step, blocks))
            for name, value in (drawn or block()).items()
        }
        put(f"model-{start:05d}.safetensors", tensors)
    index = {"metadata": {"total_parameters": numbers}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    files = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return {
        "parameters": numbers,
        "bytes": files,
        "blocks": blocks,
        "width": width,
        "inner": inner,
        "experts": experts,
        "dtype": "bfloat16",
        "shards": len(set(home.values())),
    }


def measure(folder: Path, output: Path, recipe: str, checkpoint: dict, only: list[str]) -> dict:
    """One compression in a fresh process."""
    shutil.rmtree(output, ignore_errors=True)
    arguments = [str(folder), str(output), recipe, str(WINDOWS), str(LENGTH), str(KEEP), *only]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    streams = WINDOWS * LENGTH * checkpoint["width"] * 4
    found |= {"recipe": recipe, "only": only}
    found["peak_share_of_checkpoint"] = (found["peak_bytes"] - streams) / checkpoint["bytes"]
    found["predicted_over_measured"] = found["predicted"]["host_bytes"] / found["peak_bytes"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoint and results")
    parser.add_argument("--recipes", nargs="+", default=["svd-llm", "svd"])
    parser.add_argument("--blocks", type=int, default=376)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--experts", type=int, default=0, help="of a mixture, in every block")
    parser.add_argument(
        "--only", nargs="*", default=[], help="patterns of targets; the others stay"
    )
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    model = options.folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir(parents=True)
    checkpoint = write_checkpoint(
        model, options.blocks, options.width, options.inner, options.experts
    )
    record = {
        "protocol": f"spectrim compress --out-of-core at keep {KEEP} on {WINDOWS} random windows "
        f"of {LENGTH} tokens in fp32, one thread, one process per run; peak is ru_maxrss of that "
        "process, imports included; the share is of the checkpoint's bytes, streams subtracted",
        "hardware": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "date": time.strftime("%Y-%m-%d"),
        "checkpoint": checkpoint,
        "runs": [],
    }
    for recipe in options.recipes:
        found = measure(model, options.folder / "out", recipe, checkpoint, options.only)
        record["runs"].append(found)
        print(
            f"{recipe:8s} peak {found['peak_bytes'] / 2**20:6.0f} MiB, "
            f"{found['peak_share_of_checkpoint']:.1%} of the checkpoint, "
            f"predicted {found['predicted_over_measured']:.2f} of it, {found['seconds']:.0f} s",
            flush=True,
        )
        options.result.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
