"""Where along the depth several results depart from their original, with table and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectrim.errors import InputError
from spectrim.evaluate.distortion import Distortion, distortion_by_depth, distortion_rows
from spectrim.measure.evaluating import evaluation_windows_of
from spectrim.report.content import as_json
from spectrim.report.drawing import new_figure, save_figure
from spectrim.report.figures import draw_depth
from spectrim.report.tables import rows_csv
from spectrim.run.loading import load_model
from spectrim.studies.files import study_folder, write_whole
from spectrim.studies.measure import Measure

__all__ = ["distortion"]


def distortion(
    model: str | Path,
    results: Sequence[str | Path],
    *,
    measure: Measure | None = None,
    output: str | Path | None = None,
) -> list[Distortion]:
    """Distance of every block's and target's output from the original's, for several results.

    Args:
        model: the dense model.
        results: folders of compressed models; named by their last part.
        measure: text and protocol.
        output: folder for `distortion.json`, `.csv`, and `mse` and `cosine` as `.png` and `.svg`.

    Raises:
        SpectrimError: no results, two of one name, or models that cannot be compared.
    """
    measure = measure or Measure()
    names = [Path(result).name or str(result) for result in results]
    if not names or len(set(names)) < len(names):
        raise InputError(f"expected results with different folder names, found {names}")
    options = {
        "device": measure.device,
        "dtype": measure.dtype,
        "trust_remote_code": measure.trust_remote_code,
    }
    dense = load_model(model, **options)
    windows = evaluation_windows_of(dense, measure.text, measure.window_length, measure.max_tokens)
    loaded = {
        name: load_model(result, **options).model
        for name, result in zip(names, results, strict=True)
    }
    found = distortion_by_depth(dense.model, loaded, windows, batch=measure.batch)
    if output is not None:
        folder = study_folder(output)
        record = {
            "format_version": 1,
            "model": dense.name,
            "protocol": windows.record(),
            "distortion": [one.record() for one in found],
        }
        write_whole(folder / "distortion.json", as_json(record))
        write_whole(folder / "distortion.csv", rows_csv(distortion_rows(found)))
        for name in ("mse", "cosine"):
            with new_figure() as (figure, axes):
                draw_depth(axes, found, measure=name)
                for suffix in ("png", "svg"):
                    save_figure(figure, folder / f"{name}.{suffix}")
    return found
