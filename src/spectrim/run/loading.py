"""From what the user calls a model to one in memory, with its tokenizer and its stored dtype."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from spectrim.devices import HOST
from spectrim.errors import ArtifactError, ModelError
from spectrim.model.onload import Onloader
from spectrim.model.weights import sampled
from spectrim.run.admitting import check_unquantized, check_whole, one_line
from spectrim.run.finding import look_up
from spectrim.run.options import RunOptions
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

_BAD_TOKENIZER = (*_BAD_CONFIGURATION, ImportError, RuntimeError)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
"""Any of them says that a checkpoint is meant to have a tokenizer."""

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
        notes: what the report must say of how it was loaded.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    stored_dtype: torch.dtype
    onloader: Onloader | None = None
    notes: list[str] = field(default_factory=list)

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
    options: RunOptions = RunOptions(),
    *,
    whole: bool = False,
) -> LoadedModel:
    """Load a checkpoint by name or folder, or take a model object as it is.

    A model object keeps its device and, with `auto`, its dtype. Out of core, blocks stay in the
    checkpoint until they are worked on; this happens only where the options say True.

    Args:
        model: a hub name, a folder, or a model object.
        options: device, dtype, a tokenizer in place of the checkpoint's, whether to run its code.
        whole: what is loaded is going to be saved again, so it must be all of the checkpoint, in
            16- or 32-bit numbers; looked at before a weight is read.

    Raises:
        ModelError: nothing loadable there, only pickled weights, weights that are missing, a
            model that needs Python code of its own while `trust_remote_code` is off, or a
            tokenizer that cannot be loaded.
        ArtifactError: a damaged or truncated file; names it.
        InputError: a device or dtype that does not work here.
    """
    device, dtype, tokenizer = options.device, options.dtype, options.tokenizer
    if isinstance(model, nn.Module):
        stored = next(model.parameters()).dtype
        if str(device) != "auto":
            model.to(resolve_device(device))
        if dtype != "auto":
            model.to(resolve_dtype(dtype, stored, HOST))
        name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        return LoadedModel(model.eval(), tokenizer, name, stored)
    place, name, trust_remote_code = resolve_device(device), str(model), options.trust_remote_code
    config = read_config(name, trust_remote_code)
    stored = stored_dtype(config)
    working = resolve_dtype(dtype, stored, place)
    notes: list[str] = []
    if whole:
        check_unquantized(name, config)
        folder = checkpoint_folder(name)
        if not Path(name).is_dir():
            admit_folder(folder)
        notes += check_whole(name, folder, config, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        tokenizer, absent = _load_tokenizer(name, trust_remote_code)
        notes += [absent] if absent and whole else []
    onloader = None
    if options.out_of_core:
        loaded, onloader = _leave_blocks(name, config, working, place, trust_remote_code)
    else:
        loaded = _load_weights(name, working, place, trust_remote_code)
    if not trust_remote_code:
        # The classes in use are transformers' own: a result must not ask for the code again.
        vars(loaded.config).pop("auto_map", None)
    return LoadedModel(loaded.eval(), tokenizer, name, stored, onloader, notes)


def _leave_blocks(
    name: str, config: Any, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> tuple[Any, Onloader]:
    """The model with its blocks left in the checkpoint, which is looked at as any other."""
    folder = checkpoint_folder(name)
    if not Path(name).is_dir():
        admit_folder(folder)
    return build_onloaded(
        folder, config, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )


def read_config(name: str, trust_remote_code: bool) -> Any:
    """A checkpoint's configuration; the files of a folder are looked at first.

    Raises:
        ModelError: there is none, or none that transformers can use; gives the whole reason.
        ArtifactError: a damaged or truncated file; names it.
    """
    from transformers import AutoConfig

    look_up(name)
    local = Path(name).is_dir()
    if local:
        admit_folder(name)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except _BAD_CONFIGURATION as error:
        _refuse_remote_code(name, error)
        found = f"{Path(name) / 'config.json'} cannot be used" if local else f"no model {name!r}"
        raise ModelError(f"{found}: {one_line(error)}") from error


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
        if _raised_here(error):
            raise
        _refuse_remote_code(name, error)
        _name_damaged_file(name, error)
        raise ModelError(
            f"{name!r} cannot be loaded as a causal language model from safetensors: "
            f"{one_line(error)}"
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


def _raised_here(error: BaseException) -> bool:
    """Whether an error comes out of spectrim's own code, which transformers calls to load a result.

    Such a one is a mistake of ours and must not read as a damaged checkpoint.
    """
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    where = "" if innermost is None else innermost.tb_frame.f_globals.get("__name__", "")
    return where.startswith("spectrim.")


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
    raise ArtifactError(f"a weight file of {name!r} is damaged: {one_line(error)}") from error


def _load_tokenizer(name: str, trust_remote_code: bool) -> tuple[Any, str | None]:
    """The tokenizer, or None and a note where the checkpoint has none.

    Raises:
        ModelError: its files are there and cannot be used; gives the reason.
    """
    from transformers import AutoTokenizer

    if Path(name).is_dir() and not _tokenizer_files(name):
        return None, "the model has no tokenizer, and neither has the result"
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code), None
    except Exception as error:
        _refuse_remote_code(name, error)
        # The tokenizers package raises bare `Exception` for a damaged file.
        if type(error) is not Exception and not isinstance(error, _BAD_TOKENIZER):
            raise
        present = _tokenizer_files(name)
        if not present:
            return None, "the model has no tokenizer, and neither has the result"
        raise ModelError(
            f"the tokenizer of {name!r} ({', '.join(present[:3])}) cannot be loaded: "
            f"{one_line(error)}; install what it needs, mend the file, or pass the tokenizer "
            "yourself (tokenizer=...)"
        ) from error


def _tokenizer_files(name: str) -> list[str]:
    """Those that a folder has, or that were downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return [file for file in TOKENIZER_FILES if (Path(name) / file).is_file()]
    found = {file: try_to_load_from_cache(name, file) for file in TOKENIZER_FILES}
    return [file for file, path in found.items() if isinstance(path, str)]
