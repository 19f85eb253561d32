"""Studies over several runs, with their files; the command line says the same words."""

from spectrim.studies.calibration import calibration_study
from spectrim.studies.comparison import compare
from spectrim.studies.curves import curve
from spectrim.studies.depth import PUBLISHED_OBJECTIVES, distortion, layer_errors
from spectrim.studies.measure import Measure
from spectrim.studies.opening import dense_twin
from spectrim.studies.page import report
from spectrim.studies.sliding import slider

__all__ = [
    "PUBLISHED_OBJECTIVES",
    "Measure",
    "calibration_study",
    "compare",
    "curve",
    "dense_twin",
    "distortion",
    "layer_errors",
    "report",
    "slider",
]
