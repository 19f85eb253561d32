"""Models and windows for gradient passes, and the two passes under one signature."""

from contextlib import contextmanager

from architectures import tiny, windows
from spectrim.model.replay import record
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module
from spectrim.moments.gradients import gradient_pass
from spectrim.moments.gradients_by_block import gradients_by_block
from spectrim.moments.gradients_recomputed import gradients_recomputed

T = 12
FP32_ONLY = {"mixtral"}  # torch multiplies groups of experts in no wider dtype


def prepared(name="llama", count=4, **config):
    """A model, its anatomy and windows; fp64 where the architecture can."""
    model, _ = tiny(name, **config)
    if name not in FP32_ONLY:
        model.double()
    ids = windows(count, T)
    return model, trace(model, ids[:1]), ids


@contextmanager
def _at_hand(model, block):
    yield get_module(model, block.name)


def by_block(model, anatomy, ids, **options):
    """Pairs of a block and what was found in it."""
    replay = record(model, ids, batch=3, device="cpu", anatomy=anatomy)
    return gradients_by_block(
        replay, anatomy, ids, at_hand=lambda b: _at_hand(model, b), batch=3, **options
    )


def recomputed(model, anatomy, ids, **options):
    """The same with a block's graph at a time."""
    replay = record(model, ids, batch=3, device="cpu", anatomy=anatomy)
    found = gradients_recomputed(replay, anatomy, ids, batch=3, **options)
    return [(block, found.of(block)) for block in anatomy.blocks]


def at_once(model, anatomy, ids, **options):
    """The same from one pass over the whole model."""
    found = gradient_pass(model, anatomy, ids, batch=3, **options)
    return [(block, found.of(block)) for block in anatomy.blocks]
