"""Whether a checkpoint, whole, is the model that it will be loaded as; before a weight is read.

transformers loads a checkpoint into whatever class fits its configuration: a speech model becomes
its decoder, a classifier a language model, and tensors without a place are dropped with a warning.
A model that lost half of itself must not be compressed and saved as a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from spectrim.errors import ModelError
from spectrim.storage.dry_load import DryLoad, dry_load
from spectrim.storage.headers import TensorEntry, read_header
from spectrim.storage.json_file import read_json
from spectrim.storage.table import QUANT_METHOD
from spectrim.storage.weight_files import checkpoint_files

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
SIDE_FILES = {"quantize_config.json": "GPTQ", "hf_quant_config.json": "ModelOpt"}
"""Files in which quantisers describe a model whose config.json does not."""

KINDS = {
    "ForConditionalGeneration": "a vision-language, speech or encoder-decoder model",
    "ForImageTextToText": "a vision-language model",
    "ForSequenceClassification": "a sequence classifier",
    "ForTokenClassification": "a token classifier",
    "ForQuestionAnswering": "a model with a question-answering head",
    "ForMultipleChoice": "a model with a multiple-choice head",
    "ForMaskedLM": "a masked language model",
    "ForPreTraining": "a model with the heads of its pre-training",
    "Model": "a model without an output head",
}
"""How the names of classes end, and what that means."""

ROUNDED = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3"})
ROUNDED |= {"F6_E3M2", "I8", "U8", "I32"}
"""Dtypes of matrices that hold codes instead of numbers."""


def check_unquantized(name: str, config: Any) -> None:
    """Refuse weights that are codes: there is nothing in them to decompose.

    Args:
        name: what the user calls the model.
        config: its configuration, as transformers reads it.

    Raises:
        ModelError: names the method.
    """
    stated = quantization_of(config)
    if stated is None and Path(name).is_dir():
        side = next((f for f in SIDE_FILES if (Path(name) / f).is_file()), None)
        stated = None if side is None else {"quant_method": f"{SIDE_FILES[side]}, {side}"}
    if stated is None:
        return
    method = str(stated.get("quant_method") or stated.get("quant_algo") or "unknown method")
    if method == QUANT_METHOD:
        raise ModelError(f"{name!r} is already compressed; start from the original model")
    bits = stated.get("bits", stated.get("w_bit"))
    raise ModelError(
        f"{name!r} is quantised ({method}{f', {bits} bits' if bits else ''}), and spectrim "
        "decomposes 16- or 32-bit weights; give the model it was made from, or restore such "
        "weights with --dequantize (dequantize=True)"
    )


def quantization_of(config: Any) -> Mapping[str, Any] | None:
    """What a configuration says of the quantiser of its weights, None if it says nothing."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (config, text):
        for key in QUANTIZATION_KEYS:
            stated = getattr(part, key, None)
            if stated is not None:
                return stated if isinstance(stated, Mapping) else stated.to_dict()
    return None


def check_whole(
    name: str, folder: Path, config: Any, *, trust_remote_code: bool = False
) -> list[str]:
    """Refuse a checkpoint that is not, tensor by tensor, what it would be loaded as.

    Args:
        name: what the user calls the model.
        folder: with its files.
        config: its configuration.
        trust_remote_code: build classes that come with the checkpoint.

    Returns:
        Notes for the report: tensors that the class itself leaves out.

    Raises:
        ModelError: the weights belong to a model of another class, some are missing, some have no
            place, or some are codes of a quantiser; names the first.
        ArtifactError: a damaged file.
    """
    skeleton = _skeleton(name, config, trust_remote_code)
    _check_class(name, config, type(skeleton))
    entries = [entry for file in checkpoint_files(folder) for entry in read_header(file).values()]
    _check_numbers(name, entries)
    stored = {e.name: torch.empty(e.shape, dtype=skeleton.dtype, device="meta") for e in entries}
    found = dry_load(type(skeleton), config, stored)
    _check_tensors(name, found)
    if not found.ignored:
        return []
    ignored = set(found.ignored)
    lost = sum(entry.bytes for entry in entries if entry.name in ignored)
    return [
        f"{len(ignored)} tensors of the checkpoint ({lost:,} bytes, {_some(found.ignored)}) are no "
        f"part of a {type(skeleton).__name__}, which ignores them on purpose; the result does not "
        "have them"
    ]


def _skeleton(name: str, config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    # What transformers raises for configurations that make no model: sizes that do not divide,
    # fields of wrong types or none, classes that it does not know.
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        _refuse_other_kind(name, config)
        raise ModelError(
            f"{name!r} cannot be built as a causal language model: {one_line(error)}"
        ) from error


def _check_class(name: str, config: Any, found: type) -> None:
    import transformers

    stated = list(config.architectures or ())
    # Classes that transformers does not know are old spellings: there the tensors decide.
    if found.__name__ not in stated and any(hasattr(transformers, a) for a in stated):
        _refuse_other_kind(name, config, f"; as a {found.__name__} it would lose what it is")


def _refuse_other_kind(name: str, config: Any, consequence: str = "") -> None:
    stated = next(iter(config.architectures or ()), None)
    if stated is None or (stated.endswith(("ForCausalLM", "LMHeadModel")) and not consequence):
        return
    kind = next((words for end, words in KINDS.items() if stated.endswith(end)), "another model")
    raise ModelError(
        f"{name!r} is a {stated}, {kind}, and spectrim compresses causal language models"
        f"{consequence}; load the part that is one yourself, and give the loaded model or the "
        "folder it is saved to"
    )


def _check_numbers(name: str, entries: Iterable[TensorEntry]) -> None:
    codes = [
        entry
        for entry in entries
        if len(entry.shape) == 2 and entry.dtype in ROUNDED and entry.name.endswith("weight")
    ]
    if codes:
        raise ModelError(
            f"{name!r} is quantised: {codes[0].name!r} and {len(codes) - 1} other weights are "
            f"stored in {codes[0].dtype}, without a quantization_config that says how to read "
            "them; give the 16- or 32-bit model it was made from"
        )


def _check_tensors(name: str, found: DryLoad) -> None:
    kind = type(found.model).__name__
    if found.mismatched:
        tensor, stored, own = found.mismatched[0]
        raise ModelError(
            f"{name!r}: config.json does not describe the weights: {tensor} is {stored} in the "
            f"files, a {kind} of this configuration has {own} there "
            f"({len(found.mismatched)} tensors differ)"
        )
    if found.missing:
        code = Path(name).is_dir() and "auto_map" in read_json(Path(name) / "config.json")
        hint = " or it needs the Python code that comes with it: pass --trust-remote-code"
        raise ModelError(
            f"{name!r} lacks {len(found.missing)} weights of a {kind} ({_some(found.missing)}), "
            f"which would be random numbers; the checkpoint is incomplete{hint if code else ''}"
        )
    if found.unused:
        raise ModelError(
            f"{name!r} holds {len(found.unused)} tensors that a {kind} of its configuration has no "
            f"place for ({_some(found.unused)}) and that the result would lose; look at config.json"
            " (fewer layers than there are weights for?) or give the model the tensors belong to"
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def one_line(error: BaseException, most: int = 600) -> str:
    """The whole text of an error in one line, its end cut off where it is very long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 4]} ..."
