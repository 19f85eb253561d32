"""Typed errors: each message says what was found, what was expected, where, and what to do.

The command line turns every `SpectrimError` into one line on stderr and exit code 2.
"""


class SpectrimError(Exception):
    """Root of all errors that spectrim raises on purpose."""


class InputError(SpectrimError):
    """The user asked for something that cannot be done as asked."""


class RecipeError(InputError):
    """An unknown recipe, an unknown key, or a value outside its range."""


class TextError(InputError):
    """A text source that is unknown, empty, too short, or cannot be read."""


class ModelError(InputError):
    """A model without blocks or targets, already compressed, quantised, or not loadable."""


class BudgetError(InputError):
    """A size or keep that cannot be reached; the message names the reachable range."""


class OutputError(InputError):
    """The output folder exists, is locked, or cannot be written."""


class ArtifactError(InputError):
    """A saved result that is damaged, from a newer version, or of another model."""


class MissingExtraError(InputError):
    """An optional dependency is absent."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}; "
            f"install it with: pip install 'spectrim[{extra}]'"
        )


class LostRankError(SpectrimError):
    """Another process of the same run was killed, or cannot be reached."""


class MemoryShortError(SpectrimError):
    """The machine has not enough memory for what was asked."""


class NumericalError(SpectrimError):
    """A computation that cannot be trusted; names the layer and what to do."""


class NonFiniteError(NumericalError):
    """NaN or infinity in weights, activations, moments or a loss."""


class NotPositiveDefiniteError(NumericalError):
    """A moment matrix that stays indefinite after the largest allowed damping."""
