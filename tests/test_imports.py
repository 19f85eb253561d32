"""Laws of the source tree: imports point downwards, `--help` is light, no pickle, short files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "spectrim"
FILES = sorted(SOURCE.rglob("*.py"))

# A file may import from its own floor (rooms of one floor without going in circles) and below.
FLOORS = (
    {"errors", "tolerances", "plain_yaml", "arguments", "shortage", "devices", "sizes"},
    {"linalg"},
    {"formats"},
    {"moments", "layers", "model", "data", "distributed"},
    {"learn", "refine", "decompose", "allocate", "storage", "evaluate", "report", "serve"},
    {"recipes"},
    {"run"},
    {"api"},
    {"studies"},
    {"demo"},
    {"cli"},
    {"__main__", "registration"},
)
FLOOR_OF = {room: height for height, floor in enumerate(FLOORS) for room in floor}

# Recipes are data that only the upper floors read; the rooms below get plain values.
READERS_OF_RECIPES = {"recipe", "recipes", "run", "api", "studies", "demo", "cli"}

# The package itself offers the public names, so it may look anywhere, lazily.
PACKAGE = "__init__"

HEAVY = {
    "accelerate",
    "datasets",
    "greenlet",
    "gradio",
    "huggingface_hub",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "numpy",
    "peft",
    "pydantic",
    "rich",
    "safetensors",
    "torch",
    "torchao",
    "transformers",
    "yaml",
}
DEVICES = re.compile(r"(cpu|cuda|hip|mps|xpu)(:\d*)?")
PICKLES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
PICKLING_CALLS = {("torch", "load"), ("torch", "save"), ("pd", "read_pickle")}
UNIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
LONGEST_FILE, LONGEST_FUNCTION = 300, 60


@dataclass(frozen=True)
class Import:
    """One imported module; `eager` if it happens when the importing module is imported."""

    target: str
    line: int
    eager: bool


def module_name(path: Path) -> str:
    parts = ("spectrim", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Every import of a file, those inside functions and type-checking blocks included."""

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = eager and not isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inside = False
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, eager)
            elif isinstance(child, ast.ImportFrom):
                yield from named(child, eager)
            yield from visit(child, inside)

    def named(node: ast.ImportFrom, eager: bool) -> Iterator[Import]:
        base = node.module or ""
        if node.level:
            package = module_name(path).split(".")
            if path.name != "__init__.py":
                package = package[:-1]
            package = package[: len(package) - node.level + 1]
            base = ".".join([*package, base] if base else package)
        for alias in node.names:
            # `from spectrim.cli import plan` names a module, `... import __version__` does not.
            full = f"{base}.{alias.name}"
            yield Import(full if full in MODULES else base, node.lineno, eager)

    return tuple(visit(tree(path), eager=True))


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def inner_imports() -> Iterator[tuple[Path, Import]]:
    for path in FILES:
        for found in imports(path):
            if found.target.split(".")[0] == "spectrim":
                yield path, found


def test_every_room_has_a_floor():
    rooms = {room(module) for module in MODULES} - {PACKAGE, "recipe"}
    assert rooms <= set(FLOOR_OF), f"give these a place in FLOORS: {rooms - set(FLOOR_OF)}"


def test_imports_point_downwards():
    wrong = []
    for path, found in inner_imports():
        source, target = room(module_name(path)), room(found.target)
        if target == "recipe":
            allowed = source in READERS_OF_RECIPES | {PACKAGE}
        elif source == "recipe":
            # The words for objectives, rules, formats and storage kinds, and what they allow.
            allowed = target in FLOORS[0] | {"formats", "layers", "decompose", "allocate"}
        else:
            # `from spectrim import __version__` is the one thing everybody may take from the root.
            allowed = PACKAGE in (source, target) or FLOOR_OF[source] >= FLOOR_OF[target]
        if not allowed:
            wrong.append(f"{path.relative_to(SOURCE)}:{found.line} imports {found.target}")
    assert not wrong, "\n".join(wrong)


def test_only_the_version_is_taken_from_the_root():
    wrong = [
        f"{path.relative_to(SOURCE)}:{node.lineno}: {ast.unparse(node)}"
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom)
        and node.module == "spectrim"
        and room(module_name(path)) not in ("cli", "demo")
        and {alias.name for alias in node.names} - {"__version__"}
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_one_floor_do_not_import_each_other_in_circles():
    below: dict[str, set[str]] = {}
    for path, found in inner_imports():
        source, target = room(module_name(path)), room(found.target)
        if source != target and FLOOR_OF.get(source, -1) == FLOOR_OF.get(target, -2):
            below.setdefault(source, set()).add(target)
    while below:
        leaves = {target for targets in below.values() for target in targets} - set(below)
        free = [name for name, targets in below.items() if targets <= leaves]
        assert free, f"rooms import each other in a circle: {below}"
        for name in free:
            del below[name]


def test_rooms_inside_run_do_not_import_each_other_in_circles():
    below: dict[str, set[str]] = {}
    for path, found in inner_imports():
        source, target = (m.split(".") for m in (module_name(path), found.target))
        if source[1:2] == target[1:2] == ["run"] and len(source) > 3 and len(target) > 3:
            below.setdefault(source[2], set()).update({target[2]} - {source[2]})
    assert not below.get("parts"), f"what the passes share imports {below['parts']}"
    while below:
        free = [name for name, targets in below.items() if not targets & below.keys()]
        assert free, f"rooms import each other in a circle: {below}"
        for name in free:
            del below[name]


def test_no_two_files_import_each_other_even_inside_functions():
    left = {
        module: {f.target for f in imports(path) if f.target in MODULES} - {module, "spectrim"}
        for module, path in MODULES.items()
    }
    while left:
        free = [module for module, targets in left.items() if not targets & left.keys()]
        assert free, f"these import each other in a circle: {sorted(left)}"
        for module in free:
            del left[module]


def test_help_imports_nothing_heavy():
    pending, seen, wrong = ["spectrim.cli.main", "spectrim.__main__"], set(), []
    while pending:
        module = pending.pop()
        if module in seen or module not in MODULES:
            continue
        seen.add(module)
        # Importing a.b.c runs a and a.b first.
        if "." in module:
            pending.append(module.rpartition(".")[0])
        for found in imports(MODULES[module]):
            if found.eager and found.target.split(".")[0] in HEAVY:
                wrong.append(f"{module}:{found.line} imports {found.target}")
            if found.eager:
                pending.append(found.target)
    assert not wrong, "\n".join(wrong)
    assert "spectrim.cli.compress" in seen


def test_what_windows_lacks_is_not_needed_to_import_anything():
    assert [
        f"{path.relative_to(SOURCE)}:{found.line} imports {found.target}"
        for path in FILES
        for found in imports(path)
        if found.eager and found.target in UNIX_ONLY
    ] == []


def test_files_and_functions_are_short_and_never_unpickle():
    wrong = []
    for path in FILES:
        place = path.relative_to(SOURCE)
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE:
            wrong.append(f"{place} has {lines} lines")
        wrong += [
            f"{place}:{node.lineno} {node.name} is longer than {LONGEST_FUNCTION} lines"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
        ]
        pickles = (found for found in imports(path) if found.target.split(".")[0] in PICKLES)
        wrong += [f"{place}:{found.line} imports {found.target}" for found in pickles]
        wrong += [f"{place}:{line} unpickles" for line in unpickling_calls(tree(path))]
    assert not wrong, "\n".join(wrong)


def test_only_packages_list_what_they_offer():
    """Elsewhere a name is written once; what is a file's own begins with an underscore."""
    assert [p for p in FILES if p.name != "__init__.py" and "__all__" in p.read_text()] == []


def unpickling_calls(whole: ast.Module) -> Iterator[int]:
    for node in ast.walk(whole):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = getattr(node.func.value, "id", None)
            may = [k.value for k in node.keywords if k.arg == "allow_pickle"]
            never = all(isinstance(v, ast.Constant) and v.value is False for v in may)
            if (owner, node.func.attr) in PICKLING_CALLS or not never:
                yield node.lineno


def test_devices_are_named_in_one_place():
    """Other files ask what a device can do: one that nobody thought of answers as well."""
    found = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "torch":
                name = node.attr
            else:
                name = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
            if isinstance(name, str) and DEVICES.fullmatch(name):
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno} {name}")
    assert {entry.split(":")[0] for entry in found} == {"devices.py"}, found
