"""Settings of the whole suite."""

import torch
from hypothesis import settings

# Drawn examples are the same in every run, and fifty of them say what a law is.
settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("suite")

# Tiny tensors gain nothing from threads, and two suites side by side lose a lot to them.
torch.set_num_threads(1)

LONGEST = (
    "distributed/test_team.py",
    "law_suite/test_recipes.py",
    "law_suite/test_rescaling.py",
    "run/test_out_of_core.py",
    "run/test_resume.py",
    "serve/test_browser.py",
    "tests/test_readme.py",
    "golden/test_two_blocks.py",
    "studies/test_curve_runs.py",
    "run/test_mixtures.py",
    "run/test_elastic_model.py",
)
"""A file is the work of one process: begun at the end, a long one would have a core to itself."""


def pytest_collection_modifyitems(items):
    """Long files first; the others stay in their order."""
    place = {name: position for position, name in enumerate(LONGEST)}

    def rank(item):
        return place.get("/".join(item.path.parts[-2:]), len(place))

    items.sort(key=rank)
