r"""Train a small reference model from a text file and a tokenizer: llama, gpt2, gpt_neox, mixtral.

    python benchmarks/train_reference.py --text books/books_train.txt \
        --held-out books/books_heldout.txt --tokenizer books/tokenizer.json --out llama-books
    python benchmarks/train_reference.py ... --family gpt2 --steps 400 --hidden 128 --layers 4
    python benchmarks/train_reference.py ... --family mixtral --experts 8 --dtype float32 \
        --hidden 128 --layers 4 --inner 128 --steps 3000 --batch 8 --window 128

The first line is the recipe of the bundled model: 3,789 AdamW steps of 16 windows of 256 tokens,
peak learning rate 2e-3, cosine to a tenth after 200 steps of warm-up, weight decay 0.1 on
matrices, gradient norm clipped to 1, bf16 autocast around fp32 weights. The bundled model's cosine
followed the wall clock (as `--minutes` does) and not a count of steps, so a repetition agrees with
it in quality and not in bits; with `--steps` alone the same seed on the same machine gives the same
model. The second line trains another architecture in a few minutes on two cores, for trying a
method where weights are `Conv1D` (gpt2) or query, key and value share one matrix (gpt2, gpt_neox).
The third trains a mixture whose tokens take two experts each, with the usual loss that keeps the
experts in equal use.

The result is an ordinary Hugging Face folder in bf16 with `training.json`, which records the
options and the held-out loss. Text is tokenized without special tokens, in parts of a million
characters.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

__all__ = ["build", "held_out_loss", "learning_rate", "main", "token_ids", "train"]

PART = 1_000_000  # characters tokenized at a time; parts are joined
END = "<|endoftext|>"
HEAD = 32  # width of an attention head
POSITIONS = 1024
FAMILIES = ("llama", "gpt2", "gpt_neox", "mixtral")


def token_ids(tokenizer: Tokenizer, path: Path) -> Tensor:
    """Token ids of a text file, shape (N,), int32; no special tokens."""
    text = path.read_text(encoding="utf-8")
    parts = [text[i : i + PART] for i in range(0, len(text), PART)]
    encoded = tokenizer.encode_batch(parts, add_special_tokens=False)
    return torch.cat([torch.tensor(part.ids, dtype=torch.int32) for part in encoded])


def build(
    family: str, *, vocab: int, hidden: int, layers: int, inner: int, experts: int = 8
) -> PreTrainedModel:
    """A freshly initialized fp32 model of the family, output head tied to the embedding."""
    if hidden % (2 * HEAD):
        raise ValueError(f"--hidden must be a multiple of {2 * HEAD}, found {hidden}")
    tokens = {"vocab_size": vocab, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if family == "gpt2":
        config = GPT2Config(
            **tokens,
            n_embd=hidden,
            n_layer=layers,
            n_head=hidden // HEAD,
            n_inner=inner,
            n_positions=POSITIONS,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        return GPT2LMHeadModel(config)
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD,
        "intermediate_size": inner,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
    }
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**tokens, **shape))
    # two query heads share a key/value head, so that grouped attention is exercised too
    shape["num_key_value_heads"] = hidden // (2 * HEAD)
    if family == "mixtral":
        # Where the logits of the routers come along, the loss holds what balances the experts.
        balance = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
        mixture = {"num_local_experts": experts, "num_experts_per_tok": 2}
        return MixtralForCausalLM(MixtralConfig(**tokens, **shape, **mixture, **balance))
    return LlamaForCausalLM(LlamaConfig(**tokens, **shape))


def learning_rate(fraction: float, step: int, *, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps times a cosine from the peak to a tenth of it.

    Args:
        fraction: share of the run that is done, in [0, 1].
        step: number of finished steps.
        peak: largest learning rate.
        warmup: steps of linear growth.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * fraction))
    return peak * min(1.0, (step + 1) / warmup) * (0.1 + 0.9 * cosine)


def optimizer_for(model: PreTrainedModel, peak: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves gains and biases alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def held_out_loss(model: PreTrainedModel, ids_N: Tensor, *, window: int, windows: int) -> float:
    """Mean loss in nats per predicted token over the first windows of a text, in fp32."""
    count = min(windows, ids_N.numel() // window)
    if count < 1:
        raise ValueError(f"the held-out text has {ids_N.numel()} tokens, one window needs {window}")
    batch_BT = ids_N[: count * window].long().view(count, window)
    model.eval()
    total = 0.0
    with torch.no_grad():
        for part in batch_BT.split(16):
            total += model(input_ids=part, labels=part).loss.item() * len(part)
    model.train()
    return total / count


def train(
    model: PreTrainedModel, ids_N: Tensor, held_N: Tensor, options: argparse.Namespace
) -> tuple[int, float]:
    """Train in place; returns the number of steps and the seconds they took."""
    optimizer = optimizer_for(model, options.learning_rate)
    generator = torch.Generator().manual_seed(options.seed + 1)
    offsets = torch.arange(options.window)
    limit = None if options.minutes is None else options.minutes * 60
    start, step = time.monotonic(), 0
    model.train()
    while True:
        seconds = time.monotonic() - start
        # with a time limit the schedule follows the clock, as the bundled model's did
        fraction = step / options.steps if limit is None else seconds / limit
        if fraction >= 1:
            return step, seconds
        rate = learning_rate(fraction, step, peak=options.learning_rate, warmup=options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        begins = torch.randint(
            0, ids_N.numel() - options.window - 1, (options.batch,), generator=generator
        )
        batch_BT = ids_N[begins[:, None] + offsets].long()
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = model(input_ids=batch_BT, labels=batch_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % options.report_every == 0:
            held = held_out_loss(model, held_N, window=options.window, windows=40)
            print(
                f"step {step}  {time.monotonic() - start:.0f} s  loss {loss.item():.3f}  "
                f"held-out {held:.4f}",
                flush=True,
            )


def save(
    model: PreTrainedModel, tokenizer: Tokenizer, out: Path, record: dict[str, object]
) -> None:
    """Write the bf16 model, the tokenizer and the record of the run."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
    fast.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small reference model.")
    parser.add_argument("--text", type=Path, required=True, help="training text, UTF-8")
    parser.add_argument("--held-out", type=Path, required=True, help="text to watch, UTF-8")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--steps", type=int, default=3789)
    parser.add_argument("--minutes", type=float, help="stop by the clock instead of by --steps")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--inner", type=int, help="width of the MLP; 688, or 4 x hidden")
    parser.add_argument("--experts", type=int, default=8, help="of a mixture, per layer")
    parser.add_argument("--window", type=int, default=256, help="tokens per window")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the products; where a CPU has no bfloat16 ones, float32 is several times as fast",
    )
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report-every", type=int, default=100, help="steps")
    options = parser.parse_args(arguments)
    if options.inner is None:
        # a gated MLP has three matrices: 8/3 of the width costs what 4 costs with two
        gated = options.family in ("llama", "mixtral")
        options.inner = 16 * math.ceil(options.hidden * 8 / 48) if gated else 4 * options.hidden
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.manual_seed(options.seed)  # transformers initializes weights from the global generator
    torch.set_num_threads(options.threads)
    tokenizer = Tokenizer.from_file(str(options.tokenizer))
    ids_N, held_N = token_ids(tokenizer, options.text), token_ids(tokenizer, options.held_out)
    model = build(
        options.family,
        vocab=tokenizer.get_vocab_size(),
        hidden=options.hidden,
        layers=options.layers,
        inner=options.inner,
        experts=options.experts,
    )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {ids_N.numel()} tokens, {held_N.numel()} held out", flush=True)
    step, seconds = train(model, ids_N, held_N, options)
    loss = held_out_loss(model, held_N, window=options.window, windows=400)
    record = {
        **{key: str(v) if isinstance(v, Path) else v for key, v in vars(options).items()},
        "text_sha256": hashlib.sha256(options.text.read_bytes()).hexdigest(),
        "parameters": parameters,
        "steps_done": step,
        "seconds": round(seconds),
        "held_out_nats_per_token": round(loss, 4),
        "torch": torch.__version__,
    }
    save(model, tokenizer, options.out, record)
    print(f"{step} steps, {seconds:.0f} s, held-out {loss:.4f} nats per token: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
