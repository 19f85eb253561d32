"""`spectrim bench`: tokens per second of a compressed model beside the dense one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.errors import InputError

__all__ = ["bench"]


def bench(
    model: Annotated[str, typer.Argument(metavar="OUT", help="The compressed model's folder.")],
    against: Annotated[
        str, typer.Option("--against", metavar="MODEL", help="The dense model to compare with.")
    ],
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="N,...", help="Sequences side by side; default 1,8,32."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option("--lengths", metavar="N,...", help="Tokens per prompt; default 32,128."),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option("--new-tokens", metavar="N", help="Tokens to write per sequence; default 16."),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option("--repeats", metavar="N", help="Runs behind each median; default 3."),
    ] = None,
    fused: Annotated[
        bool, typer.Option("--fuse", help="Join factors of OUT that read the same input.")
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Time OUT and the dense MODEL on this machine: prefill, decode, first token, memory.

    The ideal is what the saved bytes (decode) and multiplications (prefill) would give alone.
    """
    from spectrim.cli.session import session

    sizes = {"batches": as_numbers("--batch", batch), "lengths": as_numbers("--lengths", lengths)}
    with session(verbose=verbose, quiet=quiet or as_json) as progress:
        from spectrim.measure.benching import bench as measure

        found = measure(
            model,
            against,
            fused=fused,
            trust_remote_code=trust_remote_code,
            progress=progress,
            **options.given(
                **sizes, new_tokens=new_tokens, repeats=repeats, device=device, dtype=dtype
            ),
        )
    from spectrim.cli.render import print_json

    if as_json:
        print_json(found)
    else:
        print_bench(found)


def as_numbers(option: str, words: str | None) -> list[int] | None:
    """`1,8,32` as numbers."""
    if words is None:
        return None
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"{option} is {words!r}; expected positive numbers, for example 1,8,32")
    return [int(part) for part in parts]


def print_bench(found: dict[str, Any]) -> None:
    """Print one row per batch and length, both models and the ideal."""
    from spectrim.cli.render import print_facts, print_table

    rows = [
        row(before, after, gain)
        for before, after, gain in zip(
            found["dense"]["cells"], found["compressed"]["cells"], found["speedup"], strict=True
        )
    ]
    headers = ("batch x prompt", "prefill, tokens/s", "speed-up", "decode, tokens/s", "speed-up")
    print_table((*headers, "first token, s", "peak memory"), rows, title="dense -> compressed")
    ideal, protocol, environment = found["ideal"], found["protocol"], found["environment"]
    print_facts(
        {
            "ideal": f"prefill {ideal['prefill']:.2f}x by multiplications, "
            f"decode {ideal['decode']:.2f}x by bytes",
            "measured": f"median of {protocol['repeats']}, {protocol['new_tokens']} new tokens, "
            f"{protocol['dtype']} on {protocol['device']}, {environment['threads']} threads, "
            f"torch {environment['torch']}",
        }
    )


def row(before: dict[str, Any], after: dict[str, Any], gain: dict[str, Any]) -> list[str]:
    """The cells of one batch and length as text."""
    from spectrim.cli.render import format_bytes

    def pair(key: str, words: str) -> str:
        return f"{before[key]:{words}} -> {after[key]:{words}}"

    memory = [cell["peak_memory_bytes"] for cell in (before, after)]
    return [
        f"{before['batch']} x {before['prompt_length']}",
        pair("prefill_tokens_per_second", ".0f"),
        f"{gain['prefill']:.2f}x",
        pair("decode_tokens_per_second", ".1f"),
        f"{gain['decode']:.2f}x",
        pair("first_token_seconds", ".3f"),
        "-" if None in memory else " -> ".join(format_bytes(size) for size in memory),
    ]
