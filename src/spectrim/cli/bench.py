"""`spectrim bench`: tokens per second of a compressed model beside the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.study import numbers
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes
from spectrim.run.loading_words import LoadWords
from spectrim.run.reading_words import BenchWords
from spectrim.sizes import format_bytes


@takes(
    *("batch", "lengths", "new_tokens", "repeats", "prepared", "memory", "latent_cache"),
    *("device", "dtype", "trust_remote_code"),
    of=BenchWords,
)
def bench(
    terminal: Terminal,
    model: Annotated[str, typer.Argument(metavar="OUT", help="The compressed model's folder.")],
    against: Annotated[
        str, typer.Option("--against", metavar="MODEL", help="The dense model to compare with.")
    ],
    **words: Any,
) -> None:
    """Time OUT and the dense MODEL on this machine: prefill, decode, first token, memory.

    The ideal is what the saved bytes (decode) and multiplications (prefill) would give alone.
    """
    words["batches"] = numbers("--batch", words.pop("batch"), least=1)
    words["lengths"] = numbers("--lengths", words["lengths"], least=1)
    with terminal.working() as progress:
        from spectrim.run.options import RunOptions
        from spectrim.run.word import among
        from spectrim.studies.benching import Timing
        from spectrim.studies.benching import bench as measure

        said = options.given(**words)
        timing = Timing(**{name: said[name] for name in said.keys() - among(said, LoadWords)})
        ways = RunOptions(progress=progress, **among(said, LoadWords))
        found = measure(model, against, ways, timing)
    terminal.show(found, print_bench)


def print_bench(found: dict[str, Any]) -> None:
    """Print tables that fit a terminal of 60 columns, the ideal above what was reached."""
    from spectrim.cli.render import print_facts, print_table

    dense, small, ideal = found["dense"], found["compressed"], found["ideal"]
    places = [f"{cell['batch']} x {cell['prompt_length']}" for cell in dense["cells"]]
    for phase, title in (
        ("prefill", f"Reading a prompt, tokens/s; ideal {ideal['prefill']:.2f}x by products"),
        ("decode", f"Writing, tokens/s; ideal {ideal['decode']:.2f}x by bytes"),
    ):
        key = f"{phase}_tokens_per_second"
        rows = [
            [
                place,
                format_rate(before[key]),
                format_rate(after[key]),
                f"{gain[phase]:.2f}x",
                f"{100 * gain[phase] / ideal[phase]:.0f} %",
            ]
            for place, before, after, gain in zip(
                places, dense["cells"], small["cells"], found["speedup"], strict=True
            )
        ]
        headers = ("batch x prompt", "dense", "compressed", "speed-up", "of ideal")
        print_table(headers, rows, title=title)
    rows = [
        [place, pair(a["first_token_seconds"], b["first_token_seconds"], format_seconds), memory]
        for place, a, b, memory in zip(
            places, dense["cells"], small["cells"], peaks(dense, small), strict=True
        )
    ]
    print_table(("batch x prompt", "first token", "peak memory"), rows, title="dense -> compressed")
    if "latent_cache" in found:
        print_latent_cache(found, places)
    uncut = found["uncut_bytes"]
    protocol, environment = found["protocol"], found["environment"]
    threads = environment["threads"]
    print_facts(
        {
            **_prepared(small["prepared"]),
            "bytes per token": f"{format_bytes(dense['bytes'])} dense, "
            f"{format_bytes(small['bytes'])} compressed; the same layers uncut would need "
            + ", ".join(f"{format_bytes(size)} in {weights}" for weights, size in uncut.items()),
            "measured": f"median of {protocol['repeats']}, {protocol['new_tokens']} new tokens, "
            f"{protocol['dtype']} on {protocol['device']}, {threads} "
            f"thread{'s' if threads != 1 else ''}, torch {environment['torch']}"
            + "".join(f", {n} matrices by {path}" for path, n in small.get("paths", {}).items())
            + ("" if small["prepared"] else ", as loaded"),
        }
    )


def _prepared(found: dict[str, Any] | None) -> dict[str, str]:
    """How the compressed layers multiply, most of them first."""
    if found is None:
        return {}
    ways = sorted(found["layers"].items(), key=lambda pair: (-pair[1], pair[0]))
    grown = found["bytes_after"] - found["bytes_before"]
    layers = "; ".join(f"{count} {way}" for way, count in ways)
    return {"prepared": layers + (f"; {format_bytes(grown)} more memory" if grown > 0 else "")}


def print_latent_cache(found: dict[str, Any], places: list[str]) -> None:
    """What the latent cache saves, and what it costs in time."""
    from spectrim.cli.render import print_table

    latent = found["latent_cache"]
    ordinary = found["compressed"]
    rows = [
        [
            place,
            pair(a["cache_bytes_per_token"], b["cache_bytes_per_token"], format_bytes),
            format_rate(b["decode_tokens_per_second"]),
            f"{gain['decode']:.2f}x",
        ]
        for place, a, b, gain in zip(
            places,
            ordinary["cells"],
            latent["cells"],
            latent["speedup_over_ordinary_cache"],
            strict=True,
        )
    ]
    headers = ("batch x prompt", "cache per token", "writing", "speed-up")
    print_table(headers, rows, title="Compressed, ordinary -> latent cache")


def peaks(dense: dict[str, Any], small: dict[str, Any]) -> list[str]:
    """Peak memory of both models, `-` where the platform does not tell."""
    pairs = [
        (a["peak_memory_bytes"], b["peak_memory_bytes"])
        for a, b in zip(dense["cells"], small["cells"], strict=True)
    ]
    return ["-" if None in one else pair(*one, format_bytes) for one in pairs]


def pair(before: float, after: float, words: Callable[[float], str]) -> str:
    """`before -> after`."""
    return f"{words(before)} -> {words(after)}"


def format_rate(per_second: float) -> str:
    """Three digits at least: `1234`, `23.4`, `0.123`."""
    return f"{per_second:.0f}" if per_second >= 100 else f"{per_second:.3g}"


def format_seconds(seconds: float) -> str:
    """`12.3 s`, `62 ms`."""
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1e3 * seconds:.0f} ms"
