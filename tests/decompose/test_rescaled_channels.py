"""The same function written with other channel scales is cut in the same way."""

import pytest
import torch

from spectrim.decompose import decompose
from spectrim.moments.moments import Moments, OutputMoments

OBJECTIVES = {
    "fisher": ("fisher", {}),
    "fisher-out": ("fisher", {"side": "out"}),
    "activation-1": ("activation", {"alpha": 1.0}),
    "whitened": ("whitened", {}),
    "whitened-shrunk": ("whitened", {"shrink_in": 0.3}),
    "shifted": ("shifted", {"shrink_in": 0.3}),
    "anchored": ("anchored", {}),
    "anchored-ridge": ("anchored", {"ridge": 1e-3, "shrink_in": 0.3, "blend": 0.7}),
    "anchored-damped": ("anchored", {"ridge": 0.0}),
    "kfac": ("kfac", {"shrink_in": 0.1, "shrink_out": 0.1}),
    "kfac-damped": ("kfac", {"shrink_out": 0.0}),
    "anchored-kfac": ("anchored_kfac", {"shrink_in": 0.1, "shrink_out": 0.1}),
}
"""All but `plain` and `activation` with another exponent, which see the weight as it is written."""

OUTPUT_WEIGHED = ("kfac", "kfac-damped", "anchored-kfac")
"""The objectives that measure outputs by what the loss feels of them, in whatever unit they are."""


def powers(count, seed):
    exponents = torch.randint(-12, 13, (count,), generator=torch.Generator().manual_seed(seed))
    return 2.0 ** exponents.double()


def rescaled(layer, d, e):
    """Inputs times d and outputs times e, with the weight that makes it the same function."""
    W, moments, output = layer.W, layer.moments, layer.output
    pair, out = d[:, None] * d, e[:, None] * e
    return (
        e[:, None] * W / d,
        Moments(
            moments.tokens,
            moments.C * pair,
            moments.shifted * pair,
            moments.cross * pair,
            moments.absolute * d,
        ),
        OutputMoments(
            output.tokens,
            output.windows,
            output.G / out,
            output.fisher_in * d.square(),
            output.fisher_out / e.square(),
        ),
    )


@pytest.mark.parametrize("shape", [(7, 12, 60), (12, 8, 60), (9, 11, 5)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rescaled_channels_give_the_same_product_and_spectrum(name, shape, make):
    objective, options = OBJECTIVES[name]
    layer = make(*shape)
    layer.W[:, 3] = 0.0  # nobody reads this channel
    d, e = powers(shape[1], 1), powers(shape[0], 2)
    if name == "fisher-out":
        d = torch.ones_like(d)  # it weighs outputs and sees inputs as they are written
    elif name not in OUTPUT_WEIGHED:
        e = torch.ones_like(e)
    ours = decompose(objective, layer.W, layer.moments, layer.output, name="layer", **options)
    W, moments, output = rescaled(layer, d, e)
    theirs = decompose(objective, W, moments, output, name="layer", **options)
    assert torch.allclose(theirs.energy, ours.energy, rtol=1e-9, atol=1e-12 * ours.total)
    assert theirs.total == pytest.approx(ours.total, rel=1e-9)
    assert theirs.irreducible == pytest.approx(ours.irreducible, rel=1e-6, abs=1e-10 * ours.total)
    assert theirs.ridge == ours.ridge
    assert theirs.damping == ours.damping
    for k in (1, 3, 6):
        product = theirs.up[:, :k] @ theirs.down[:k]
        back = product * d / e[:, None]
        expected = ours.up[:, :k] @ ours.down[:k]
        assert torch.allclose(back, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
