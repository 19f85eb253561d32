"""Every numerical tolerance of the package, by name. All are relative but one, which says so.

A tolerance multiplies a scale taken from the data (the largest eigenvalue, the mean diagonal,
the norm of a vector). Nothing in spectrim compares with an absolute epsilon.
"""

RANK_CUTOFF_FP64 = 1e-12
"""Eigenvalues of a moment matrix below this share of the largest one count as zero (fp64)."""

DAMPING_START = 1e-10
"""First damping of a failed Cholesky factorisation, as a share of the mean diagonal."""

DAMPING_FACTOR = 10.0
"""Each further attempt damps this many times more."""

DAMPING_LIMIT = 1e-2
"""Damping above this share of the mean diagonal would change the objective: a typed error."""

LEAST_SQUARES_RIDGE = 1e-6
"""Ridge of least-squares maps against shifted inputs, as a share of the mean diagonal."""

SAME_FUNCTION = 1e-2
"""Largest relative difference between the output of a layer of an unknown class and that of a
linear layer with its weight, for which both are the same. Half precision stays below; a scale or a
clip does not."""

LATENT_MATCH = 1e-2
"""Largest relative difference between cached states and those restored from latents for which both
count as the same. Rounding to half precision stays below; a missing rotation or norm does not."""

ROUNDING_DAMPING = 1e-2
"""Rounding with feedback trusts a moment matrix less than its own diagonal by this share."""

ROUNDING_PRIOR = 1e-2
"""Share of the prior in the metric of rounding with feedback: on SmolLM2-135M it takes up to 45 %
off what 4 bits lose on tokens that calibration did not see; ten times as much is no better."""

SAME_LOGITS = 2e-2
"""Largest difference, as a share of the largest logit, between a model's own logits and those found
piece by piece. Products of other shapes round differently, in half precision by up to 1 %."""

STEP_COUNT = 1e-9
"""Share by which a span of sizes may miss a whole number of steps and still count it."""

SCALING = 1e-10
"""Relative change of a row's size at which balancing rows and columns has come to rest."""

SYMMETRY = 1e-4
"""Largest asymmetry, relative to the Frobenius norm, that a moment matrix may show before it is
refused. Sums accumulated in fp32 are asymmetric by their rounding, a wrong matrix by far more."""

PIVOT_GROWTH_LIMIT = 1.01
"""Max-volume swaps stop once no coefficient of a packed layer exceeds this."""

PACKED_ERROR_SHARE = 0.25
"""A packed target falls back to factored storage if rounding costs more than this share of
its truncation error."""

ADAM_EPSILON = 1e-8
"""Added to the root of Adam's second moment, in the unit of a gradient: the one absolute number
here. Results are those of `torch.optim.AdamW`, whose default it is."""

KEEP_STEPS = 512
"""Parts of the reachable range of keeps that a search for a loss tells apart."""
