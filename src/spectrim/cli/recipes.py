"""`spectrim recipes`: the methods by name, with their equations, papers and settings."""

from __future__ import annotations

import textwrap
from typing import Annotated

import typer

PAGE_WIDTH = 100

app = typer.Typer(
    help="List the recipes, or explain one: `recipes show NAME`.",
    invoke_without_command=True,
)


@app.callback()
def recipes(context: typer.Context) -> None:
    """List the recipes when no subcommand is given."""
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes() -> None:
    """List the recipes by name."""
    from spectrim.cli.render import print_table
    from spectrim.recipes import PRESETS

    print_table(
        ("recipe", "what it does", "paper"),
        [(recipe.name, recipe.title, recipe.paper or "-") for recipe in PRESETS.values()],
        words=3,
    )


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe's name or a YAML file.")],
) -> None:
    """Explain one recipe and print it as YAML.

    The YAML is what `--recipe FILE` reads: save it, change it, use it.
    """
    import yaml

    from spectrim.cli.render import stdout_console
    from spectrim.recipes import get_recipe

    recipe = get_recipe(name)
    console = stdout_console()
    prose = {
        "title": recipe.title,
        "paper": recipe.paper,
        "equation": recipe.equation,
        "differences from the authors' code": recipe.differences,
    }
    # As comments, so that the whole output is a recipe file when it is redirected into one.
    for label, value in prose.items():
        if value:
            for line in wrap_comment(f"{label}: {value}", console.width):
                console.print(line, soft_wrap=True)
    settings = recipe.model_dump(mode="json", exclude={"title", "paper", "equation", "differences"})
    body = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    console.print(body, soft_wrap=True, end="")


def wrap_comment(text: str, width: int) -> list[str]:
    """YAML comment lines of at most `width` characters, and never wider than a page."""
    return textwrap.wrap(
        text, max(min(width, PAGE_WIDTH), 20), initial_indent="# ", subsequent_indent="#   "
    )
