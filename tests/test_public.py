import sys
from types import ModuleType

import pytest

import spectrim


def test_public_names_are_found_where_they_live():
    from spectrim.api import compress
    from spectrim.recipe import Recipe

    assert spectrim.compress is compress
    assert spectrim.Recipe is Recipe
    assert {"compress", "evaluate", "Recipe"} <= set(dir(spectrim))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spectrim.nothing


def test_evaluate_is_a_function_and_a_room(monkeypatch):
    import spectrim.evaluate.perplexity as perplexity

    assert isinstance(spectrim.evaluate, ModuleType)
    assert spectrim.evaluate is sys.modules["spectrim.evaluate"]
    assert spectrim.evaluate.perplexity is perplexity
    monkeypatch.setattr("spectrim.api.evaluate", lambda *args, **options: (args, options))
    assert spectrim.evaluate("model", text="x") == (("model",), {"text": "x"})
