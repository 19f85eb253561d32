"""Tables keep every value whatever the width, and a pipe gets neither color nor cut names."""

from __future__ import annotations

import json

import pytest

from spectrim.allocate.plan import Plan, PlanEntry
from spectrim.cli import render, summary, target_tables
from spectrim.sizes import format_bytes

NAME = "model.layers.{}.self_attn.q_proj"


@pytest.fixture
def plan() -> Plan:
    entries = tuple(
        PlanEntry(NAME.format(i), rank, storage, stored, 1000, loss=loss)
        for i, (rank, storage, stored, loss) in enumerate(
            [(3, "factored", 400, 0.25), (None, "dense", 1000, 0.0)]
        )
    )
    return Plan(entries, keep=0.7, rule="knapsack")


@pytest.mark.parametrize("width", [40, 60, 200])
def test_tables_survive_any_width(width, plan, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = target_tables.rows_of_plan(plan)
    target_tables.print_targets(rows)
    target_tables.print_heat_map(rows)
    summary.print_plan_summary(plan)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert all(len(line) <= width for line in out.splitlines())
    words = " ".join(out.split())
    for value in ("self_attn.q_proj", "factored", "40%", "400 B", "knapsack", "0.7000"):
        assert value in words


def test_a_pipe_does_not_cut_names(plan, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    target_tables.print_targets(target_tables.rows_of_plan(plan))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "targets of model.layers"
    assert [line for line in lines if line.startswith("0.self_attn.q_proj") and "40.0%" in line]


PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
)


def test_a_deep_model_of_experts_is_a_few_lines_of_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    entries = tuple(
        PlanEntry(
            f"model.layers.{block}.{projection.format(expert)}",
            4096 - expert if block else None,
            "packed" if block else "dense",
            60_000_000,
            100_000_000,
            loss=1e-3,
        )
        for block in range(61)
        for projection in PROJECTIONS
        for expert in (range(8) if "experts" in projection else [0])
    )
    rows = target_tables.rows_of_plan(Plan(entries, keep=0.6, rule="knapsack"))
    target_tables.print_projections(rows)
    target_tables.print_heat_map(rows)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 35
    down = next(line for line in lines if line.startswith("mlp.experts.*.down_proj"))
    assert down.split()[1:3] == ["488", "8"]  # 61 blocks of 8, of which the first stays dense
    assert "4089-4096 (4092)" in down
    assert "29.3 GB" in down and "60.0%" in down


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("model.layers.31.mlp.up_proj", ("31", "mlp.up_proj")),
        ("transformer.h.0.attn.c_attn", ("0", "attn.c_attn")),
        ("model.layers.3.mlp.experts.1.w2", ("3", "mlp.experts.1.w2")),
        ("lm_head", ("-", "lm_head")),
    ],
)
def test_block_and_projection_are_read_from_the_name(name, split):
    assert target_tables.split_name(name) == split


def test_bytes_have_decimal_units_and_three_digits():
    spoken = [format_bytes(n) for n in (0, 999, 1000, 999_960, 13_765_120, 3.5e9, 7e15)]
    assert spoken == ["0 B", "999 B", "1.00 kB", "1000 kB", "13.8 MB", "3.50 GB", "7000 TB"]


def test_of_several_values_each_has_its_line_and_none_is_left_out(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    notes = ["one", "two words " * 6]
    render.print_facts({"keep": 0.6, "notes": notes, "none": [], "absent": None})
    assert capsys.readouterr().out.splitlines() == [
        *("keep   0.6", "notes", "  - one"),
        *("  - two words two words two words two", "    words two words two words"),
    ]


def test_json_is_for_programs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    data = {"text": "é " * 50, "value": 0.1, "none": None}
    render.print_json(data)
    assert json.loads(capsys.readouterr().out) == data
    with pytest.raises(ValueError, match="not JSON compliant"):
        render.print_json({"perplexity": float("nan")})
