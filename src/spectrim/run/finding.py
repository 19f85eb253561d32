"""What a user calls a model, looked up on the disk before anybody asks the hub.

transformers takes whatever is no folder for a name on the hub, and asks for it for half a minute
before it gives up. What lies on the disk, or evidently should, is settled here at once.
"""

from __future__ import annotations

import difflib
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import nn

from spectrim.allocate.plan import Plan
from spectrim.errors import InputError, ModelError
from spectrim.storage.survey_record import Survey

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?", re.ASCII)
PATIENCE = 5.0
"""Seconds to wait for the hub's machine to answer at all."""


def check_brought(model: object, *, plan: object = None, survey: object = None) -> None:
    """Refuse what is no model, plan or survey, nor the name of one.

    Raises:
        InputError: names the argument and what it is.
    """
    kinds = {
        "model": (model, nn.Module, "a hub name, a folder, or a loaded model"),
        "plan": (plan, Plan, "a plan or the file of one"),
        "survey": (survey, Survey, "a survey or the folder of one"),
    }
    for name, (value, kind, expected) in kinds.items():
        absent = value is None and name != "model"
        if not absent and (not isinstance(value, str | Path | kind) or value == ""):
            raise InputError(
                f"{name} is {value!r:.80} ({type(value).__name__}); expected {expected}"
            )


def look_up(name: str, *, restoring: bool = False) -> None:
    """Refuse what cannot be a model: a wrong path, an adapter, a file in another format.

    Args:
        name: a folder, or a name on the hub.
        restoring: whether a .gguf file can be one, whose weights are going to be restored.

    Raises:
        ModelError: says what is there instead, and what to do.
    """
    path = Path(name)
    if path.is_dir():
        _check_folder(path)
    elif path.is_file():
        if not (restoring and path.suffix == ".gguf"):
            raise ModelError(_what_file(path))
    elif HUB_NAME.fullmatch(name):
        _check_hub(name)
    else:
        raise ModelError(f"there is no folder {name!r}{_suggestion(path)}")


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds a PEFT adapter (adapter_config.json), which names another model to "
            "load; merge it first (merge_and_unload) and save the result, or measure both with "
            "spectrim evaluate BASE --adapter DIR"
        )
    if (folder / "config.json").is_file():
        return
    found = sorted(entry.name for entry in folder.iterdir())
    gguf = [entry for entry in found if entry.endswith(".gguf")]
    if gguf:
        raise ModelError(_what_file(folder / gguf[0]))
    listed = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
    raise ModelError(
        f"{folder} is no model folder: it has no config.json "
        f"({f'found {listed}' if found else 'it is empty'})"
    )


def _what_file(path: Path) -> str:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        return (
            f"{path} is a GGUF file, which holds rounded weights for other programs; give the "
            "folder or hub name of the 16- or 32-bit model it was made from, or restore what the "
            "file holds with --dequantize (dequantize=True)"
        )
    return f"{path} is a file; give the folder with config.json and the weights"


def _suggestion(path: Path) -> str:
    """The nearest thing that does exist, where there is one."""
    if path.parts and path.parts[0] == "~":
        return "; the shell expands '~' only at the beginning of an unquoted word"
    parent = path.parent
    if not parent.is_dir():
        return ""
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; there is {str(parent / close[0])!r}" if close else ""


def _check_hub(name: str) -> None:
    """Whether the hub can be asked at all, unless its cache has the model.

    Raises:
        ModelError: it cannot.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    host = urlsplit(constants.ENDPOINT)
    if isinstance(cached, str) or host.scheme in getproxies() or host.hostname is None:
        return
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("offline mode is on")
        port = host.port or (80 if host.scheme == "http" else 443)
        socket.create_connection((host.hostname, port), timeout=PATIENCE).close()
    except OSError as error:
        raise ModelError(
            f"no model {name!r}: there is no such folder{_suggestion(Path(name))}, the hub's "
            f"cache does not have it, and {host.hostname} cannot be asked "
            f"({error.strerror or error})"
        ) from error
