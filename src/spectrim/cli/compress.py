"""`spectrim compress`: make a model smaller and save it as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options

__all__ = ["compress"]


def compress(
    model: options.Model,
    output: options.Output,
    keep: options.Keep = None,
    size: options.Size = None,
    recipe: options.RecipeName = None,
    text: options.Text = None,
    windows: options.Windows = None,
    window_length: options.WindowLength = None,
    batch: options.Batch = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Ranks from `spectrim plan -o FILE`."),
    ] = None,
    survey: Annotated[
        Path | None,
        typer.Option("--survey", metavar="DIR", help="Ranks and decompositions from a survey."),
    ] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="factored, packed or auto.")
    ] = None,
    weights: Annotated[str | None, typer.Option("--weights", help="native, int8 or int4.")] = None,
    effort: Annotated[
        str | None,
        typer.Option("--effort", help="fast, balanced or thorough, of the default recipe."),
    ] = None,
    offload_streams: Annotated[
        Path | None,
        typer.Option(
            "--offload-streams", metavar="DIR", help="Keep the hidden states on disk in DIR."
        ),
    ] = None,
    on_failure: Annotated[
        str | None,
        typer.Option("--on-failure", help="error, or keep-unrefined for a block that diverges."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="DIR",
            help="Keep finished blocks in DIR; default OUT.work, removed when OUT is there.",
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume", help="Go on from what an earlier run finished, as by default."
        ),
    ] = None,
    out_of_core: options.OutOfCore = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Predict time and peak memory; load and write nothing."),
    ] = False,
    self_contained: Annotated[
        bool,
        typer.Option("--self-contained", help="Include the base model in an elastic artifact."),
    ] = False,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Compress MODEL and save the result to OUT.

    OUT is an ordinary Hugging Face folder with a model card, the complete recipe and a report.
    With the recipe acip it is an elastic artifact, which `spectrim resize` cuts to any size.
    """
    from spectrim.cli.crew import crew
    from spectrim.cli.session import session

    choices = options.given(
        keep=keep,
        size=size,
        recipe=recipe,
        text=text,
        windows=windows,
        window_length=window_length,
        batch=batch,
        seed=seed,
        device=device,
        dtype=dtype,
        plan=plan,
        storage=storage,
        weights=weights,
        effort=effort,
        offload_streams=offload_streams,
        out_of_core=out_of_core,
    )
    written, resumes = None if dry_run else output, resume is not False
    with (
        session(
            verbose=verbose,
            quiet=quiet,
            output=written,
            resumes=resumes,
            work=None if dry_run else work,
        ) as progress,
        crew(device, progress) as team,
    ):
        from spectrim import api

        if dry_run:
            from spectrim.cli.results import print_estimate

            if team.leads:
                found = api.estimate(model, trust_remote_code=trust_remote_code, **choices)
                print_estimate(found.summary())
            return
        result = api.compress(
            model,
            output=output,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            self_contained=self_contained,
            progress=progress,
            team=team,
            **options.given(survey=survey, on_failure=on_failure, work=work, resume=resume),
            **choices,
        )
    from spectrim.cli.results import print_compression

    if team.leads:
        print_compression(result.report, output)
