"""Blocks come to hand when a pass works on them, and what a pass has finished is kept.

A pass says `with keeper.at_hand(block)` around its work on a block, `keeper.finish(stage, block)`
when the block is as it will stay, and `keeper.restore(stage, block)` where an earlier run has
finished it. For a model in memory without a work folder all of that does nothing; with a work
folder finished blocks are files; and with an onloader blocks are in memory only while at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import ArtifactError, ModelError
from spectrim.layers.quantized import built, described
from spectrim.layers.swap import compressed_layers, swap_in
from spectrim.model.anatomy import Block
from spectrim.model.onload import Onloader, give_back
from spectrim.model.weights import get_module
from spectrim.run.log import RunLog
from spectrim.storage.shared_work import Piece, Work


class Keeper:
    """What a run keeps between two blocks.

    Attributes:
        model: the model being compressed.
        log: facts about finished blocks are taken from here, and put back.
        work: where finished pieces are kept, None to keep nothing.
        onloader: loads blocks, None for a model in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        log: RunLog,
        *,
        work: Work | None = None,
        onloader: Onloader | None = None,
    ):
        self.model = model
        self.log = log
        self.work = work
        self.onloader = onloader
        self._notes_before = 0
        self._depth = 0

    @contextmanager
    def at_hand(self, block: Block) -> Iterator[nn.Module]:
        """The block's module with its weights in memory; blocks beside it may be held inside."""
        if not self._depth:
            self._notes_before = len(self.log.notes)
        self._depth += 1
        try:
            if self.onloader is None:
                yield get_module(self.model, block.name)
            else:
                with self.onloader.hold(block.name) as module:
                    yield module
        finally:
            self._depth -= 1
            if not self._depth:
                give_back()

    def has(self, key: str) -> bool:
        """Whether a piece was finished, by this run or an earlier one."""
        return self.work is not None and key in self.work.finished

    def save(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a piece that is no block; does nothing without a work folder.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        if self.work is not None:
            self.work.write(key, tensors, facts)

    def load(self, key: str) -> tuple[Piece, dict[str, Any]]:
        """A piece that was finished."""
        assert self.work is not None
        return self.work.load(key)

    def is_finished(self, stage: str, block: Block) -> bool:
        """Whether a pass has finished a block."""
        return self.has(_key(stage, block))

    def all_finished(self, stage: str, blocks: Sequence[Block]) -> bool:
        """Whether a pass has finished all of them."""
        return all(self.is_finished(stage, block) for block in blocks)

    def finish(self, stage: str, block: Block) -> None:
        """Keep the block that stands in the model, with what the log says of it.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        if self.work is None:
            if self.onloader is not None:
                raise ModelError(f"{block.name} would be lost: out of core needs a work folder")
            return
        module = get_module(self.model, block.name)
        facts = {
            "layers": {name: described(x) for name, x in compressed_layers(module).items()},
            "targets": {t.name: self.log.targets.get(t.name, {}) for t in block.targets},
            "block": self.log.blocks.get(block.name),
            "notes": self.log.notes[self._notes_before :],
        }
        self.work.write(_key(stage, block), module.state_dict(), facts)
        self._read_from(_key(stage, block), block)

    def restore(self, stage: str, block: Block) -> None:
        """Put a block that was finished into the model, and what was said of it into the log.

        Raises:
            ArtifactError: the file does not fit the model.
        """
        key = _key(stage, block)
        file, facts = self.load(key)
        module = get_module(self.model, block.name)
        device = self._device(module)
        for name, said in facts["layers"].items():
            swap_in(module, name, built(said))
        state = {name: file.read(name).to(device) for name in file.entries}
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ArtifactError(f"{file.path} does not fit {block.name!r}: {error}") from error
        self._read_from(key, block)
        for name, said in facts["targets"].items():
            self.log.target(name, **said)
        if facts["block"] is not None:
            self.log.blocks[block.name] = facts["block"]
        self.log.notes.extend(facts["notes"])

    def _device(self, module: nn.Module) -> torch.device:
        return self.onloader.device if self.onloader else next(module.parameters()).device

    def _read_from(self, key: str, block: Block) -> None:
        if self.onloader is not None:
            assert self.work is not None  # `finish` has refused to be without
            self.onloader.read_from(block.name, self.work.file(key).read_all)


def _key(stage: str, block: Block) -> str:
    return f"{stage}-{block.index:03d}"
