"""Results of measuring and compressing as tables for people; `--json` gives programs the rest."""

from __future__ import annotations

from typing import Any

from spectrim.cli.progress import format_seconds
from spectrim.cli.render import format_count, print_facts, print_note, print_table
from spectrim.cli.target_tables import TargetRow, print_projections, print_targets
from spectrim.report.predicted import loss_words
from spectrim.sizes import format_bytes

REPORT_FILE = "spectrim_report.json"


def print_compression(report: dict[str, Any]) -> None:
    """Print what was asked for and reached, what it cost, and where the result lies.

    Args:
        report: as in `spectrim_report.json`, with the folder written as `output`.
    """
    keep = report["keep"]
    targets = report["targets"]
    dense = sum(1 for target in targets if target["rank"] is None)
    measured = report["measured"] or {"texts": [], "why_not": None}
    print_before_and_after(report, measured["texts"])
    print_facts(
        {
            "recipe": report["recipe"]["name"],
            "keep": f"{keep['achieved']:.4f} of the target bytes (asked for {keep['asked']:.4g})",
            "with protected layers": None
            if keep["with_protected"] == keep["achieved"]
            else f"{keep['with_protected']:.4f} of the bytes of targets and protected layers",
            "targets": f"{of(keep['target_bytes'])}; {len(targets)}, {dense} left dense",
            "whole model": f"{of(keep['model_bytes'])}, {keep['whole_model']:.1%}",
            "predicted loss": loss_words(
                report["predicted_loss"], report["predicted_loss_unit"], measured["texts"]
            ),
            "not measured": measured["why_not"],
            "time": format_seconds(sum(report["seconds"].values())),
            "peak memory": None
            if report["peak_memory_bytes"] is None
            else format_bytes(report["peak_memory_bytes"]),
            "outside the budget": (report["outside_budget"] or {}).get("words"),
            "notes": report["notes"],
            "output": report["output"],
        }
    )


def print_before_and_after(report: dict[str, Any], texts: list[dict[str, Any]]) -> None:
    """Print bytes and perplexities of the dense and of the compressed model."""
    size = report["keep"]["model_bytes"]
    rows: list[tuple[str, ...]] = [
        ("bytes", format_bytes(size["dense"]), format_bytes(size["stored"]))
    ]
    for measured in texts:
        pair = (measured["dense"], measured["compressed"])
        cells = (plus_minus(m["perplexity"], m["standard_error"]) for m in pair)
        rows.append((f"perplexity, {measured['text']}", *cells))
        if measured.get("difference"):
            rows.append(("  nats per token more", "", more_words(measured["difference"])))
    print_table(("", "dense", "compressed"), rows, title=f"{report['model']}")
    for measured in texts:
        print_note(
            f"{measured['text']}: {measured['windows']} windows of {measured['window_length']} "
            f"tokens, {measured['what']}"
        )
        if measured.get("routing") is not None:
            print_note(routing_words(measured["text"], measured["routing"]))


def print_estimate(record: dict[str, Any]) -> None:
    """Print what a run is predicted to take, and which parts make up its memory."""
    if not record["host_parts"]:
        print_training(record)
        return
    seconds = record["seconds"]
    where = "host" if not record["device_bytes"] else record["device"]
    parts = record["device_parts"] or record["host_parts"]
    windows, length = record["windows"]
    print_facts(
        {
            "checkpoint": format_bytes(record["checkpoint_bytes"]),
            "blocks": "read one at a time" if record["out_of_core"] else "all in memory",
            "windows": f"{windows} of {length} tokens"
            + (f", {record['windows_because']}" if record["windows_because"] else ""),
            "passes": record["passes"],
            "time": f"{format_seconds(sum(seconds.values()))} without training",
            "with all of 256 x 2048": None
            if record["more"] is None
            else f"{format_seconds(record['more']['seconds'])}, "
            f"{format_bytes(record['more']['host_bytes'])}",
            "peak host memory": format_bytes(record["host_bytes"]),
            "peak device memory": format_bytes(record["device_bytes"])
            if record["device_bytes"]
            else None,
            f"of it on the {where}": ", ".join(
                f"{name} {format_bytes(size)}" for name, size in parts.items() if size
            ),
        }
    )


def print_training(record: dict[str, Any]) -> None:
    """Print what a training is predicted to take; its memory is not predicted."""
    windows, length = record["windows"]
    print_facts(
        {
            "checkpoint": format_bytes(record["checkpoint_bytes"]),
            "windows": f"{windows} of {length} tokens",
            "time": f"at most about {format_seconds(sum(record['seconds'].values()))}",
            **{f"  {phase}": format_seconds(s) for phase, s in record["seconds"].items() if s},
            "memory": "not predicted for training",
            "shorter": "fewer steps in a recipe of your own: `spectrim recipes show NAME`",
        }
    )


def print_inspection(record: dict[str, Any], every: bool = False) -> None:
    """Print the targets of a folder and its totals, as counted from the files.

    Args:
        record: as `spectrim inspect --json` prints it.
        every: each target on a line of its own instead of one line per projection.
    """
    targets = record["targets"]
    if targets:
        rows = [TargetRow.from_record(target) for target in targets]
        (print_targets if every else print_projections)(rows)
    keep = record["achieved_keep"]
    pair = {"stored": record["bytes"], "dense": record["dense_bytes"]}
    target_pair = {"stored": record["target_bytes"], "dense": record["dense_target_bytes"]}
    print_facts(
        {
            "folder": record["folder"],
            "keep": "an ordinary model, not compressed" if keep is None else f"{keep:.4f}",
            "targets": of(target_pair) if targets else None,
            "whole model": of(pair) if targets else format_bytes(record["bytes"]),
            "parameters": format_count(record["parameters"]),
            "numbers": ", ".join(sorted({t["dtype"] for t in targets})) or None,
            "files": ", ".join(f"{n} {format_bytes(b)}" for n, b in record["files"].items()),
        }
    )


def print_evaluations(results: list[dict[str, Any]]) -> None:
    """Print one table per text, models down, the dense one first where there is one.

    Args:
        results: one record per model, as `evaluate_models` returns them.
    """
    names = short_names([result["model"] for result in results])
    for text in dict.fromkeys(text for result in results for text in result["perplexity"]):
        shown = [i for i, result in enumerate(results) if text in result["perplexity"]]
        compared = any("agreement" in results[i] for i in shown)
        rows = []
        for i in shown:
            result = results[i]
            measured = result["perplexity"][text]
            row = [
                names[i],
                format_bytes(result["stored_bytes"] or result["parameter_bytes"]),
                plus_minus(measured["perplexity"], measured["standard_error"]),
            ]
            if compared:
                row += against_words(result, text)
            rows.append(row)
        headers = ["model", "bytes", "perplexity"]
        headers += ["nats more", "KL, nats", "same top"] if compared else []
        print_table(headers, rows, title=text)
        # More than one line only where tokenizers or longest windows differ.
        for words in dict.fromkeys(protocol_words(results[i]["perplexity"][text]) for i in shown):
            print_note(words)
        for i in shown:
            routing = results[i].get("agreement", {}).get(text, {}).get("routing")
            if routing is not None:
                print_note(routing_words(names[i], routing["mean"]))


def routing_words(text: str, share: float) -> str:
    """How often the routers of a mixture choose as they did."""
    return f"{text}: routers send {share:.1%} of the tokens to the same experts as before"


def against_words(result: dict[str, Any], text: str) -> list[str]:
    """What a model loses against the dense one: paired loss, divergence, equal top tokens."""
    near = result.get("agreement", {}).get(text)
    if near is None:
        return ["-", "-", "-"]
    more = result.get("difference", {}).get(text)
    return [
        "-" if more is None else more_words(more),
        f"{near['kl']:.3g}",
        f"{near['top1']:.1%}",
    ]


def more_words(difference: dict[str, Any]) -> str:
    """A paired difference of losses in nats per token, with its standard error."""
    return f"{difference['nll']:+.3g} ± {difference['nll_standard_error']:.1g}"


def short_names(models: list[str]) -> list[str]:
    """The last part of every path or hub name, the whole where two would be called the same."""
    last = [name.rstrip("/").rpartition("/")[2] or name for name in models]
    return [
        short if last.count(short) == 1 else full for short, full in zip(last, models, strict=True)
    ]


def protocol_words(measured: dict[str, Any]) -> str:
    """How a perplexity was measured, in one line."""
    protocol = measured["protocol"]
    return (
        f"{format_count(measured['tokens'])} tokens scored in {protocol['windows']} windows of "
        f"{protocol['window_length']}, BOS {protocol['bos']}, {protocol['dtype']}"
    )


def print_demo(found: dict[str, Any]) -> None:
    """Print what the bundled model cost before and after, and what both models write."""
    dense, compressed = found["dense"], found["compressed"]
    rows = [
        ("bytes", format_bytes, "bytes"),
        ("parameters", format_count, "parameters"),
        ("perplexity, held-out", "{:.2f}".format, "perplexity"),
        ("prefill, tokens/s", "{:.0f}".format, "prefill_tokens_per_second"),
        ("decode, tokens/s", "{:.0f}".format, "decode_tokens_per_second"),
    ]
    print_table(
        ("", "dense", "compressed"),
        [(name, write(dense[key]), write(compressed[key])) for name, write, key in rows],
        title=f"bundled Llama, recipe {found['recipe']}, keep {found['keep']:.3f}",
    )
    seconds = found["seconds"]
    print_facts(
        {
            "protocol": protocol_words(dense),
            "time": f"{format_seconds(seconds['compress'])} to compress, "
            f"{format_seconds(seconds['total'])} in all",
        }
    )
    for name, continuation in found["samples"].items():
        print_note(f"\n{name}: {found['prompt']}{continuation}")
    print_note(f"\nwritten to {found['output']}; the report is {REPORT_FILE} there")


def plus_minus(value: float, error: float | None) -> str:
    """A value with its standard error, where there is one."""
    shown = f"{value:.3f}" if value < 1000 else f"{value:.4g}"
    return shown if error is None else f"{shown} ± {error:.2g}"


def of(pair: dict[str, int]) -> str:
    """Stored bytes of dense bytes."""
    return f"{format_bytes(pair['stored'])} of {format_bytes(pair['dense'])}"
