"""From what the user calls a model to one in memory, with its tokenizer and its stored dtype."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from spectrim.errors import ArtifactError, ModelError
from spectrim.model.onload import Onloader
from spectrim.model.weights import sampled
from spectrim.run.out_of_core import build_onloaded, checkpoint_folder
from spectrim.run.working import resolve_device, resolve_dtype, stored_dtype
from spectrim.storage.admission import admit_folder, needs_remote_code

__all__ = ["LoadedModel", "load_model", "read_config"]

# What transformers raises for a configuration of wrong types, beside what it raises on purpose.
_BAD_CONFIGURATION = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    StrictDataclassError,
)

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
            if self.onloader is not None and p.is_meta:
                values = self.onloader.sample(name)
            else:
                values = sampled(p)
            digest.update(values.contiguous().numpy().tobytes())
        return digest.hexdigest()


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
        ModelError: nothing loadable there, only pickled weights, weights that are missing, or a
            model that needs Python code of its own while `trust_remote_code` is off.
        ArtifactError: a damaged or truncated file; names it.
        InputError: a device or dtype that does not work here.
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
    if (Path(model) / "config.json").is_file():
        admit_folder(model)
    config = read_config(str(model), trust_remote_code)
    stored = stored_dtype(config)
    working = resolve_dtype(dtype, stored, place)
    onloader = None
    if out_of_core:
        loaded, onloader = _leave_blocks(str(model), config, working, place, trust_remote_code)
    else:
        loaded = _load_weights(str(model), working, place, trust_remote_code)
    tokenizer = tokenizer or _load_tokenizer(str(model), trust_remote_code)
    if not trust_remote_code:
        # The classes in use are transformers' own: a result must not ask for the code again.
        vars(loaded.config).pop("auto_map", None)
    return LoadedModel(loaded.eval(), tokenizer, str(model), stored, onloader)


def _leave_blocks(
    name: str, config: Any, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> tuple[Any, Onloader]:
    """The model with its blocks left in the checkpoint, which is looked at as any other."""
    folder = checkpoint_folder(name)
    if not Path(name).is_dir():
        admit_folder(folder)
    try:
        return build_onloaded(
            folder, config, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
    except _BAD_CONFIGURATION as error:
        _refuse_remote_code(name, error)
        raise ModelError(
            f"{name!r} cannot be built as a causal language model: {_first_line(error)}"
        ) from error


def read_config(name: str, trust_remote_code: bool) -> Any:
    """A checkpoint's configuration.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except _BAD_CONFIGURATION as error:
        _refuse_remote_code(name, error)
        raise ModelError(
            f"no model at {name!r}: neither a folder with a config.json nor a model on the hub "
            f"that can be reached ({_first_line(error)})"
        ) from error


def _load_weights(name: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool):
    from transformers import AutoModelForCausalLM

    try:
        # The stubs do not know that loading information makes it a pair.
        pair: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, *_BAD_CONFIGURATION) as error:
        _refuse_remote_code(name, error)
        _name_damaged_file(name, error)
        raise ModelError(
            f"{name!r} cannot be loaded as a causal language model from safetensors: "
            f"{_first_line(error)}"
        ) from error
    loaded, info = pair
    missing = sorted(info["missing_keys"])
    if missing:
        code = " or it needs the Python code that comes with it: pass --trust-remote-code"
        raise ModelError(
            f"{name!r} lacks {len(missing)} weights of a {type(loaded).__name__} "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}), which would be "
            f"random numbers; the checkpoint is incomplete{code if _has_code(name) else ''}"
        )
    return loaded


def _has_code(name: str) -> bool:
    return Path(name).is_dir() and needs_remote_code(name)


def _refuse_remote_code(name: str, error: BaseException) -> None:
    """Transformers says "no" to code with a long text; say what to do in one line."""
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        raise ModelError(
            f"{name!r} needs Python code that comes with it (auto_map), which could do anything; "
            "pass --trust-remote-code (trust_remote_code=True) only if you trust its author"
        ) from error


def _name_damaged_file(name: str, error: BaseException) -> None:
    """Safetensors does not name the file; a download lies in a folder that can be looked at."""
    if not isinstance(error, SafetensorError):
        return
    from transformers.utils.hub import cached_file

    config = cached_file(name, "config.json", local_files_only=True)
    if config is not None:
        admit_folder(Path(config).parent)
    raise ArtifactError(f"a weight file of {name!r} is damaged: {_first_line(error)}") from error


def _load_tokenizer(name: str, trust_remote_code: bool):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        _refuse_remote_code(name, error)
        # A folder without tokenizer is usable with token windows; text sources refuse None later.
        return None
    except Exception as error:
        # The tokenizers package raises bare `Exception` for a damaged file; nothing else is meant.
        if type(error) is not Exception:
            raise
        raise ModelError(f"the tokenizer of {name!r} is damaged: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
