"""From what the user calls a model to one in memory, with its tokenizer and its stored dtype."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from spectrim.arguments import refuse_unused
from spectrim.devices import HOST
from spectrim.errors import ArtifactError, ModelError
from spectrim.model.onload import Onloader
from spectrim.model.weights import sampled
from spectrim.run.admitting import check_unquantized, check_whole, one_line
from spectrim.run.finding import look_up
from spectrim.run.options import RunOptions
from spectrim.run.out_of_core import build_onloaded, checkpoint_folder
from spectrim.run.restoring import gguf_words, restored, stored_after
from spectrim.run.tokenizing import BAD_CONFIGURATION, load_tokenizer, refuse_remote_code
from spectrim.run.working import resolve_device, resolve_dtype, stored_dtype
from spectrim.storage.admission import admit_folder, needs_remote_code

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
        return _taken(model, options)
    place, name, trust_remote_code = resolve_device(device), str(model), options.trust_remote_code
    restoring = options.dequantize
    config = read_config(name, trust_remote_code, restoring=restoring)
    stored = stored_after(stored_dtype(config)) if restoring else stored_dtype(config)
    working = resolve_dtype(dtype, stored, place)
    notes: list[str] = []
    if whole and not restoring:
        check_unquantized(name, config)
        folder = checkpoint_folder(name)
        if not Path(name).is_dir():
            admit_folder(folder)
        notes += check_whole(name, folder, config, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        tokenizer, absent = load_tokenizer(name, trust_remote_code)
        notes += [absent] if absent and whole else []
    onloader = None
    if restoring:
        loaded, told = restored(name, config, working, place, trust_remote_code)
        notes.insert(0, told)
    elif options.out_of_core:
        loaded, onloader = _leave_blocks(name, config, working, place, trust_remote_code)
    else:
        loaded = _load_weights(name, working, place, trust_remote_code)
    if not trust_remote_code:
        # The classes in use are transformers' own: a result must not ask for the code again.
        vars(loaded.config).pop("auto_map", None)
    return LoadedModel(loaded.eval(), tokenizer, name, stored, onloader, notes)


def _taken(model: nn.Module, options: RunOptions) -> LoadedModel:
    """A model object as it is."""
    refuse_unused("a model object is what it is", {"dequantize": options.dequantize})
    stored = next(model.parameters()).dtype
    if str(options.device) != "auto":
        model.to(resolve_device(options.device))
    if options.dtype != "auto":
        model.to(resolve_dtype(options.dtype, stored, HOST))
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    return LoadedModel(model.eval(), options.tokenizer, name, stored)


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


def read_config(name: str, trust_remote_code: bool, *, restoring: bool = False) -> Any:
    """A checkpoint's configuration; the files of a folder are looked at first.

    Args:
        name: a folder or hub name; where weights are restored, a .gguf file too.
        trust_remote_code: run code that comes with the checkpoint.
        restoring: whether codes of a quantiser become weights again.

    Raises:
        ModelError: there is none, or none that transformers can use; gives the whole reason.
        ArtifactError: a damaged or truncated file; names it.
    """
    from transformers import AutoConfig

    look_up(name, restoring=restoring)
    local = Path(name).is_dir()
    if local:
        admit_folder(name)
    try:
        words = gguf_words(name) or {"pretrained_model_name_or_path": name}
        return AutoConfig.from_pretrained(**words, trust_remote_code=trust_remote_code)
    except BAD_CONFIGURATION as error:
        refuse_remote_code(name, error)
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
    except (SafetensorError, RuntimeError, *BAD_CONFIGURATION) as error:
        if _raised_here(error):
            raise
        refuse_remote_code(name, error)
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


def _name_damaged_file(name: str, error: BaseException) -> None:
    """Safetensors does not name the file; a download lies in a folder that can be looked at."""
    if not isinstance(error, SafetensorError):
        return
    from transformers.utils.hub import cached_file

    config = cached_file(name, "config.json", local_files_only=True)
    if config is not None:
        admit_folder(Path(config).parent)
    raise ArtifactError(f"a weight file of {name!r} is damaged: {one_line(error)}") from error
