"""The work folder: what a run has finished, so that the next one goes on from there.

    work.json                 whose work it is, and the SHA-256 of every finished file
    cut-003.safetensors       a finished piece: tensors, and facts as JSON in the header
    lock                      held by the process that works here

A piece is written under a temporary name, forced to disk and renamed; then the manifest is, in
the same way. A kill at any moment leaves a folder in which every listed file is whole. Work of
another recipe, model, text or version is never used: the differences are named and refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim import __version__
from spectrim.errors import ArtifactError, InputError, OutputError
from spectrim.storage.lock import locked
from spectrim.storage.manifests import FileRecord, WorkManifest, read_work_manifest
from spectrim.storage.tensor_file import Slot, TensorFile, write_tensors
from spectrim.storage.whole_file import PARTIAL, file_hash, whole_file

logger = logging.getLogger(__name__)

MANIFEST = "work.json"
LOCK = "lock"
SUFFIX = ".safetensors"
CHECKPOINTS = ("learning.safetensors", "recovery.safetensors")
"""Of a training, beside the finished pieces: of the whole, and of its recovery phase."""
_FACTS = "facts"


class WorkFolder:
    """A work folder whose lock is held; made by `open_work`.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self._manifest: WorkManifest | None = None

    @property
    def finished(self) -> Collection[str]:
        """Keys of the finished pieces."""
        return () if self._manifest is None else self._manifest.files.keys()

    def begin(
        self, identity: Mapping[str, Any], chosen: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Say whose work this is; earlier work is verified and goes on.

        Args:
            identity: flat plain data: everything that the pieces depend on.
            chosen: the same of what this machine suggests and the first run decides.

        Returns:
            What was chosen when the work began.

        Raises:
            InputError: the folder holds the work of another run; names what differs.
            ArtifactError: the manifest or a finished file is damaged.
            OutputError: the folder cannot be written.
        """
        plain, decided = (json.loads(json.dumps(dict(x))) for x in (identity, chosen or {}))
        path = self.path / MANIFEST
        if not path.exists():
            self._manifest = WorkManifest(identity=plain | decided)
            self._save()
            return decided
        found = read_work_manifest(path)
        decided |= {key: found.identity[key] for key in decided if key in found.identity}
        self._compare(found, plain | decided)
        self._manifest = found
        gone = [key for key in found.files if not self._path(key).exists()]
        for key in gone:
            logger.warning("%s is gone and will be computed again", self._path(key))
            del found.files[key]
        for key, file in found.files.items():
            self._verify(key, file)
        if found.files:
            logger.info("%s: going on after %d finished pieces", self.path, len(found.files))
        return decided

    def begin_anew(self) -> None:
        """Forget what lies here, and hold the copy of another folder's work.

        Raises:
            OutputError: the folder cannot be written.
        """
        if (self.path / MANIFEST).exists():
            self.take_up()
            self.clear()
        self._manifest = WorkManifest()
        self._save()

    def take_up(self) -> None:
        """Know what was finished here, whoever's work it is.

        Raises:
            ArtifactError: the manifest is damaged.
        """
        self._manifest = read_work_manifest(self.path / MANIFEST)

    def keep_here(self) -> None:
        """What is finished lies here already."""

    def _compare(self, found: WorkManifest, identity: dict[str, Any]) -> None:
        here = {"spectrim": __version__, **identity}
        there = {"spectrim": found.spectrim, **found.identity}
        names = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
        if names:
            listed = "; ".join(f"{k}: {there.get(k)!r} there, {here.get(k)!r} now" for k in names)
            raise InputError(
                f"{self.path} belongs to another run, {len(names)} setting(s) differ: {listed}. "
                "Resume with the same settings, or remove the folder to start anew"
            )

    def _verify(self, key: str, file: FileRecord) -> None:
        path = self._path(key)
        try:
            whole = path.stat().st_size == file.bytes and file_hash(path) == file.sha256
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
        if not whole:
            raise ArtifactError(
                f"{path} is damaged: its SHA-256 or size is not the one in {MANIFEST}; remove this "
                "file and run again, it will be computed again"
            )

    def write(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Finish a piece.

        Args:
            key: its name in the folder, e.g. `cut-003`.
            tensors: stored as they are.
            facts: plain data.

        Raises:
            OutputError: the disk is full or the folder cannot be written; what was finished
                before is kept.
        """
        assert self._manifest is not None
        slots = [Slot.of(name, tensor) for name, tensor in tensors.items()]
        try:
            digest = write_tensors(self._path(key), slots, {_FACTS: json.dumps(facts)})
            size = self._path(key).stat().st_size
        except OSError as error:
            raise self._unwritten(key, error) from error
        self._manifest.files[key] = FileRecord(sha256=digest, bytes=size)
        self._save()

    def file(self, key: str) -> TensorFile:
        """A finished piece, for reading tensors from."""
        return TensorFile(self._path(key))

    def load(self, key: str) -> tuple[TensorFile, dict[str, Any]]:
        """A finished piece and its facts."""
        file = self.file(key)
        return file, json.loads(file.metadata()[_FACTS])

    def clear(self, *also: str) -> None:
        """Remove what was finished, the manifest, and these files; nothing else that lies here."""
        names = [self._path(key).name for key in self.finished]
        for name in (MANIFEST, *names, *also):
            (self.path / name).unlink(missing_ok=True)
        self._manifest = None

    def tidy(self) -> None:
        """Remove what an earlier process left half-written."""
        for name in (MANIFEST, f"*{SUFFIX}"):
            for path in (*self.path.glob(f".{name}.*{PARTIAL}"), *self.path.glob(name + PARTIAL)):
                path.unlink()

    @property
    def is_empty(self) -> bool:
        """Whether nothing worth keeping lies here."""
        return all(path.name in (LOCK, MANIFEST) for path in self.path.iterdir()) and not (
            self.finished
        )

    def _path(self, key: str) -> Path:
        return self.path / f"{key}{SUFFIX}"

    def _save(self) -> None:
        assert self._manifest is not None
        try:
            with whole_file(self.path / MANIFEST) as partial:
                partial.write_text(self._manifest.model_dump_json(indent=1), encoding="utf-8")
        except OSError as error:
            raise self._unwritten(MANIFEST, error) from error

    def _unwritten(self, what: str, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path / what} could not be written: {error.strerror or error}; "
            f"{len(self.finished)} finished pieces are kept there: make room and run again"
        )


def work_beside(output: str | Path) -> Path:
    """Where the work of a result is kept while it is unfinished: `OUT.work` beside `OUT`."""
    path = Path(output).resolve()
    return path.with_name(f"{path.name}.work")


@contextmanager
def open_work(path: str | Path, *, place: str | Path | None = None) -> Iterator[WorkFolder]:
    """A work folder with its lock held; one in which nothing was finished is removed at the end.

    Args:
        path: the folder; made if it is not there.
        place: what the work is for, for messages; the folder itself by default.

    Raises:
        OutputError: another process works there, it is no work folder, or cannot be written.
    """
    folder = Path(path).resolve()
    made = [p for p in folder.parents if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror or error}") from error
    _check_ours(folder)
    work = WorkFolder(folder)
    with ExitStack() as stack:
        # Last of all, when the lock file is gone too.
        stack.callback(remove_empty, [folder, *made])
        stack.enter_context(locked(folder / LOCK, place=place or folder))
        try:
            work.tidy()
            yield work
        finally:
            if work.is_empty:
                work.clear()


def _check_ours(folder: Path) -> None:
    """Half-written files are removed from a work folder, so it must hold nobody else's."""
    names = sorted(path.name for path in folder.iterdir())
    begun = (LOCK, MANIFEST)
    foreign = [n for n in names if n not in begun and not n.endswith(PARTIAL)]
    if MANIFEST not in names and foreign:
        raise OutputError(
            f"{folder} is no work folder: it holds {foreign[0]!r} and no {MANIFEST}; choose one "
            "that is new or empty"
        )


def discard_work(path: Path) -> None:
    """Remove the unfinished work beside a result that is finished now; other files there stay.

    Raises:
        OutputError: another process works there.
    """
    if not (path / MANIFEST).is_file():
        return
    with open_work(path) as work:
        work.take_up()
        work.clear(*CHECKPOINTS)


def remove_empty(folders: list[Path]) -> None:
    """Remove folders in which nothing lies, innermost first."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
