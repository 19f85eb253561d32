"""The words of every function that loads a model, declared as in `words.py`."""

from typing import TYPE_CHECKING, Annotated, TypedDict

from spectrim.run.word import Word

if TYPE_CHECKING:
    import torch


class LoadWords(TypedDict, total=False):
    """How a model is loaded."""

    device: Annotated[
        "str | torch.device", Word("auto, cpu, cuda, cuda:1, mps, ...; default auto.")
    ]
    dtype: Annotated[
        "str | torch.dtype", Word("auto (as stored), float32, bfloat16, float16; default auto.")
    ]
    trust_remote_code: Annotated[bool, Word("Run Python code that comes with the checkpoint.")]


class RestoringWords(LoadWords, total=False):
    """How a model is loaded that may be published in codes."""

    dequantize: Annotated[
        bool, Word("Restore 16-bit weights from a quantised checkpoint or a .gguf file.")
    ]
