"""From what the user calls a model to one in memory, with its tokenizer and its stored dtype."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.errors import InputError, ModelError
from spectrim.model.onload import Onloader
from spectrim.model.weights import sampled
from spectrim.run.out_of_core import build_onloaded, checkpoint_folder

__all__ = [
    "LoadedModel",
    "load_model",
    "read_config",
    "resolve_device",
    "resolve_dtype",
    "stored_dtype",
]

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


_CIRCUMSTANCES = frozenset({"_name_or_path", "dtype", "torch_dtype", "transformers_version"})


@dataclass
class LoadedModel:
    """A model ready to work on.

    Attributes:
        model: in the working dtype, on the working device, in evaluation mode.
        tokenizer: its tokenizer, None where there is none.
        name: what the user called it.
        stored_dtype: dtype of the checkpoint, in which results are stored and bytes are counted.
        onloader: loads the blocks of a model that is not in memory; None where it is.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    stored_dtype: torch.dtype
    onloader: Onloader | None = None

    @property
    def device(self) -> torch.device:
        """Where blocks are worked on."""
        if self.onloader is not None:
            return self.onloader.device
        return next(self.model.parameters()).device

    def identity(self) -> str:
        """SHA-256 of the configuration and of every parameter's name, shape and a sample of it.

        Where the model lies, the dtype it was loaded in and the library's version play no part.
        """
        digest = hashlib.sha256()
        config = getattr(self.model, "config", None)
        if config is not None:
            fields = {k: v for k, v in config.to_diff_dict().items() if k not in _CIRCUMSTANCES}
            digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
        for name, p in self.model.named_parameters():
            digest.update(f"{name}{tuple(p.shape)}".encode())
            lies_elsewhere = self.onloader is not None and p.is_meta
            values = self.onloader.sample(name) if lies_elsewhere else sampled(p)
            digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the accelerator where there is one, else the CPU."""
    if str(device) != "auto":
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise InputError(f"unknown device {device!r}: {error}") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator if accelerator is not None else torch.device("cpu")


def resolve_dtype(dtype: str | torch.dtype, stored: torch.dtype, device: torch.device):
    """The working dtype: on a CPU half precision is slow and coarse, so `auto` works in fp32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else stored
    if dtype not in _DTYPES:
        raise InputError(f"unknown dtype {dtype!r}; use auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def load_model(
    model: str | Path | nn.Module,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    out_of_core: bool = False,
) -> LoadedModel:
    """Load a checkpoint by name or folder, or take a model object as it is.

    A model object keeps its device and, with `auto`, its dtype. Out of core, blocks stay in the
    checkpoint until they are worked on.

    Raises:
        ModelError: nothing loadable there, or only pickled weights.
        ArtifactError: out of core, a shard is missing or damaged.
    """
    if isinstance(model, nn.Module):
        stored = next(model.parameters()).dtype
        if str(device) != "auto":
            model.to(resolve_device(device))
        if dtype != "auto":
            model.to(resolve_dtype(dtype, stored, torch.device("cpu")))
        name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        return LoadedModel(model.eval(), tokenizer, name, stored)
    place = resolve_device(device)
    config = read_config(str(model), trust_remote_code)
    stored = stored_dtype(config)
    working = resolve_dtype(dtype, stored, place)
    tokenizer = tokenizer or _load_tokenizer(str(model), trust_remote_code)
    if out_of_core:
        built, onloader = build_onloaded(
            checkpoint_folder(str(model)),
            config,
            dtype=working,
            device=place,
            trust_remote_code=trust_remote_code,
        )
        return LoadedModel(built, tokenizer, str(model), stored, onloader)
    loaded = _load_weights(str(model), working, place, trust_remote_code)
    return LoadedModel(loaded.eval(), tokenizer, str(model), stored)


def read_config(name: str, trust_remote_code: bool) -> Any:
    """A checkpoint's configuration.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"no model at {name!r}: neither a folder with a config.json nor a model on the hub "
            f"that can be reached ({_first_line(error)})"
        ) from error


def _load_weights(name: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool):
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name!r} cannot be loaded as a causal language model from safetensors: "
            f"{_first_line(error)}"
        ) from error


def _load_tokenizer(name: str, trust_remote_code: bool):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        # A folder without tokenizer is usable with token windows; text sources refuse None later.
        return None


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype that a configuration says its checkpoint has."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype)
    return dtype or torch.float32


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
