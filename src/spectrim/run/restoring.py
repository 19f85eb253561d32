"""Weights of 16 bits from a checkpoint that holds codes of a quantiser, as far as transformers can.

A model is read as it is published (FP8, MXFP4, compressed-tensors, bitsandbytes, GGUF), its codes
are multiplied out, and nothing of the quantisation stays in its configuration: from then on it is
an ordinary model. What rounding lost is lost; the report says where the weights come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from spectrim.errors import InputError, ModelError
from spectrim.run.admitting import QUANTIZATION_KEYS, one_line, quantization_of
from spectrim.storage.table import QUANT_METHOD

WIDE = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def gguf_words(name: str) -> dict[str, str] | None:
    """What `from_pretrained` is told of a .gguf file, None for anything else.

    Raises:
        ModelError: the library that reads such files is not installed.
    """
    path = Path(name)
    if path.suffix != ".gguf" or not path.is_file():
        return None
    if find_spec("gguf") is None:
        raise ModelError(f"{name} is read with the extra `gguf`: pip install 'spectrim[gguf]'")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def stored_after(stated: torch.dtype) -> torch.dtype:
    """The dtype in which a restored model is stored: the configuration's if it has 16 bits."""
    return stated if stated.itemsize == 2 else torch.bfloat16


def restored(
    name: str,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
) -> tuple[Any, str]:
    """A model with ordinary weights, and what the report has to say of them.

    Args:
        name: folder, hub name or .gguf file.
        config: its configuration, as transformers reads it.
        dtype: to work in.
        device: to work on.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        InputError: the checkpoint is not quantised.
        ModelError: transformers, or a library that it needs for this format, cannot restore the
            weights; tensors are missing or have no place.
    """
    words = gguf_words(name)
    method = "GGUF" if words is not None else _asked_back(name, config)
    model, info = _loaded(name, words, config, dtype, device, trust_remote_code, method)
    if getattr(model, "hf_quantizer", None) is not None:
        try:
            model = model.dequantize()
        except (NotImplementedError, ImportError, ValueError) as error:
            raise _cannot(name, method, error) from error
    _forget(model)
    narrow = [n for n, p in model.named_parameters() if p.dtype not in WIDE]
    if narrow:
        raise _cannot(name, method, f"{narrow[0]} and {len(narrow) - 1} others are still codes")
    _check_complete(name, model, info)
    told = (
        f"the checkpoint is quantised ({method}); its weights were restored to {dtype} before "
        "anything else, and what its rounding lost stays lost"
    ).replace("torch.", "")
    return model.to(dtype), told


def _asked_back(name: str, config: Any) -> str:
    """Ask the configuration for wide weights; returns the method's name."""
    stated = quantization_of(config)
    if stated is None:
        raise InputError(f"{name!r} is not quantised; leave out --dequantize (dequantize=True)")
    if str(stated.get("quant_method")) == QUANT_METHOD:
        raise ModelError(f"{name!r} is already compressed; start from the original model")
    for part, key in _places(config):
        setattr(part, key, {**stated, "dequantize": True})
    return str(stated.get("quant_method") or stated.get("quant_algo") or "unknown method")


def _places(config: Any) -> Iterator[tuple[Any, str]]:
    """Where a configuration speaks of quantisation."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in {id(p): p for p in (config, text)}.values():
        for key in QUANTIZATION_KEYS:
            if getattr(part, key, None) is not None:
                yield part, key


def _loaded(
    name: str,
    words: dict[str, str] | None,
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
    method: str,
) -> tuple[Any, dict[str, Any]]:
    import transformers

    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if words is None:
        options |= {"pretrained_model_name_or_path": name, "config": config}
        options |= {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    else:
        options |= words
        # Later releases leave the codes as they are unless they are told otherwise.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        found: Any = transformers.AutoModelForCausalLM.from_pretrained(
            **options, output_loading_info=True
        )
        return found
    # What quantisers raise where a library, a device or a format is not there.
    except (ImportError, RuntimeError, OSError, ValueError, TypeError, KeyError) as error:
        raise _cannot(name, method, error) from error


def _cannot(name: str, method: str, why: BaseException | str) -> ModelError:
    reason = one_line(why) if isinstance(why, BaseException) else why
    return ModelError(
        f"transformers cannot restore the weights of {name!r}, which is quantised ({method}): "
        f"{reason}; install what it names, or give the 16- or 32-bit model it was made from"
    )


def _forget(model: Any) -> None:
    """Nothing of the quantisation stays: not in the configuration, nor in what saving reverses."""
    for part, key in list(_places(model.config)):
        delattr(part, key)
    for module in model.modules():
        vars(getattr(module, "config", None) or module).pop("_is_quantized", None)
    model.is_quantized = False
    model._weight_conversions = None


def _check_complete(name: str, model: Any, info: dict[str, Any]) -> None:
    """Refuse what would be random numbers, or lost; the companions of codes are neither."""
    known = model.state_dict()
    missing = sorted(info["missing_keys"])
    spare = sorted(
        key for key in info["unexpected_keys"] if f"{key.rpartition('.')[0]}.weight" not in known
    )
    for keys, what in ((missing, "lacks"), (spare, "holds, without a place for them,")):
        if keys:
            raise ModelError(
                f"{name!r} {what} {len(keys)} tensors of a {type(model).__name__} ({keys[0]}, ...)"
            )
