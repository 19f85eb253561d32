"""`spectrim survey`: moments, spectra and scores of every target, once, for any number of plans."""

from __future__ import annotations

from spectrim.cli import options

__all__ = ["survey"]


def survey(
    model: options.Model,
    output: options.Output,
    recipe: options.RecipeName = None,
    text: options.Text = None,
    windows: options.Windows = None,
    window_length: options.WindowLength = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure MODEL once, for any number of plans.

    OUT holds moments, spectra and scores of every target; `spectrim plan OUT` reads it.
    """
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=quiet, output=output) as progress:
        from spectrim import api

        api.survey(
            model,
            output=output,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
            **options.given(
                recipe=recipe,
                text=text,
                windows=windows,
                window_length=window_length,
                seed=seed,
                device=device,
                dtype=dtype,
            ),
        )
    from spectrim.cli.render import print_facts

    print_facts({"output": output, "next": f"spectrim plan {output} --keep 0.6"})
