"""The processes of one run, and the few things they say to each other.

Every method is collective unless it says otherwise: all ranks call it, in the same order. A lone
process is a team of one, for which nothing is sent, so that passes are written once. Messages are
JSON in tensors and sums are fp64: nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim.devices import HOST
from spectrim.distributed.owners import owners, share
from spectrim.errors import LostRankError, NonFiniteError, NumericalError

BUCKET_BYTES = 32 * 2**20
"""Smaller tensors travel together, up to this size; larger ones without a copy."""


@dataclass(frozen=True)
class Team:
    """One process among those of a run.

    Attributes:
        rank: of this process, 0 is the one that speaks and saves.
        size: number of processes.
        device: where this process works, None for the caller's choice.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @property
    def leads(self) -> bool:
        """Whether this process prints, shows progress and saves."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's part of `count` windows; not collective."""
        return share(count, self.rank, self.size)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """The rank that does each job, balanced by cost; not collective."""
        return owners(costs, self.size)

    def barrier(self) -> None:
        """Wait for everybody."""
        self.gather(None)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over the ranks, in its own dtype, in place.

        All ranks get the same bits.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        for bucket in _buckets(tensors):
            whole = bucket[0] if len(bucket) == 1 else torch.cat([t.reshape(-1) for t in bucket])
            sent = whole if whole.is_contiguous() else whole.contiguous()
            _sent(lambda sent=sent: dist.all_reduce(sent))
            if len(bucket) == 1:
                if sent is not whole:
                    whole.copy_(sent)
                continue
            for place, part in zip(bucket, sent.split([t.numel() for t in bucket]), strict=True):
                place.copy_(part.view_as(place))

    def broadcast_(self, tensors: Iterable[Tensor], source: int) -> None:
        """Fill every tensor with the values that it has on `source`, in place."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            sent = tensor.detach().contiguous()
            # As bytes: gloo does not know every dtype.
            content = sent.view(-1).view(torch.uint8)
            _sent(lambda content=content: dist.broadcast(content, src=source))
            if self.rank != source and sent.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(sent)

    def gather(self, value: Any) -> list[Any]:
        """A JSON-ready value of every rank, by rank; NaN and infinity are allowed."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        _sent(lambda: dist.all_gather(lengths, torch.tensor([len(content)])))
        longest = int(max(lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(content)] = content
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        _sent(lambda: dist.all_gather(parts, padded))
        return [
            json.loads(bytes(part[: int(length)].tolist()))
            for part, length in zip(parts, lengths, strict=True)
        ]

    def total(self, act: Callable[[], float]) -> float:
        """Sum of what `act` returns on the ranks, added in their order.

        Raises:
            NumericalError: `act` raised one on some rank; then it is raised on all, so that a
                caller who goes on without the result does so everywhere.
        """
        if self.size == 1:
            return act()
        value, failure = 0.0, None
        try:
            value = float(act())
        except NumericalError as error:
            failure = [isinstance(error, NonFiniteError), str(error)]
        answers = self.gather([value, failure])
        for rank, (_, failed) in enumerate(answers):
            if failed is not None:
                kind = NonFiniteError if failed[0] else NumericalError
                raise kind(f"{failed[1]} (on rank {rank})")
        return sum(value for value, _ in answers)

    def move(
        self, moves: Sequence[tuple[int, int]], outgoing: Callable[[int], Tensor], empty: Tensor
    ) -> dict[int, Tensor]:
        """Send tensors of one shape from rank to rank.

        Args:
            moves: (source, destination) of every parcel; the same list on all ranks.
            outgoing: number of a parcel -> its content, asked on its source only.
            empty: a tensor of the parcels' shape and dtype, on any device.

        Returns:
            The parcels that have arrived here, by number.
        """
        import torch.distributed as dist

        arrived: dict[int, Tensor] = {}
        waiting = []
        for number, (source, destination) in enumerate(moves):
            if self.rank == source:
                content = outgoing(number).contiguous().view(-1).view(torch.uint8)
                work = _sent(lambda c=content, d=destination, n=number: dist.isend(c, d, tag=n))
                waiting.append((work, content))
            elif self.rank == destination:
                arrived[number] = torch.empty_like(empty, device=HOST)
                place = arrived[number].view(-1).view(torch.uint8)
                work = _sent(lambda p=place, s=source, n=number: dist.irecv(p, s, tag=n))
                waiting.append((work, place))
        for work, _ in waiting:
            _sent(work.wait)
        return arrived


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Neighbours of one dtype and device together, up to the size of a bucket."""
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not alike or held + size > BUCKET_BYTES):
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += size
    if bucket:
        yield bucket


def _sent(call: Callable[[], Any]) -> Any:
    """The result of a call of torch.distributed; its many errors all mean that a peer is gone."""
    try:
        return call()
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LostRankError(
            f"lost contact with another process of this run, which was killed or ended ({reason}); "
            "look for its last words, and for a lack of memory"
        ) from error
