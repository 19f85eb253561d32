"""`spectrim survey`: moments, spectra and scores of every target, once, for any number of plans."""

from __future__ import annotations

from typing import Annotated

import typer

from spectrim.cli import options

__all__ = ["survey"]


def survey(
    model: options.Model,
    output: options.Output,
    recipe: options.RecipeName = None,
    text: options.Text = None,
    windows: options.Windows = None,
    window_length: options.WindowLength = None,
    batch: options.Batch = None,
    scores: Annotated[
        str | None,
        typer.Option(
            "--scores",
            metavar="NAMES",
            help="first_order, second_order, kfac, measured, table; default the first two.",
        ),
    ] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    out_of_core: options.OutOfCore = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure MODEL once, for any number of plans.

    OUT holds moments, spectra and scores of every target; `spectrim plan OUT` reads it.
    """
    from spectrim.cli.crew import crew
    from spectrim.cli.session import session

    with (
        session(verbose=verbose, quiet=quiet, output=output, resumes=True) as progress,
        crew(device, progress) as team,
    ):
        from spectrim import api

        made = api.survey(
            model,
            output=output,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
            team=team,
            **options.given(
                recipe=recipe,
                text=text,
                windows=windows,
                window_length=window_length,
                batch=batch,
                scores=None if scores is None else [s.strip() for s in scores.split(",")],
                seed=seed,
                device=device,
                dtype=dtype,
                out_of_core=out_of_core,
            ),
        )
    if not team.leads:
        return
    from spectrim.cli.progress import format_seconds
    from spectrim.cli.render import print_facts

    print_facts(
        {
            "model": made.model_name,
            "targets": len(made.curves),
            "scores": ", ".join(made.scores),
            "time": format_seconds(sum(made.facts["seconds"].values())),
            "notes": "; ".join(made.notes) or None,
            "output": output,
            "next": f"spectrim plan {output} --keep 0.6",
        }
    )
