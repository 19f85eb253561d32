"""Presets made quick by small numbers in their own fields; what they do stays the same."""

from spectrim.recipe import Recipe

__all__ = ["FEW_STEPS", "quick"]

QUICK_STEPS = {
    "closed_form": {},
    "projected_gradient": {"stages": 2},
    "block": {"epochs": 2, "batch": 4},
    "distill": {"steps": 4, "evaluate_every": 2, "batch": 4, "windows": 8},
    "lora": {"epochs": 1, "batch": 4, "rank": 2},
}
QUICK_LEARNING = {
    "acip": {
        "stop_keep": 0.5,
        "learning_rate": 3e-3,
        "lora_learning_rate": 2e-3,
        "lora_rank": 2,
        "clip": 1.0,
        "pressure_growth": 1.3,
        "pressure_every": 1,
        "steps": 16,
        "max_steps": 40,
        "size_every": 1,
        "heal_steps": 4,
        "heal_grid": 3,
    },
    "soco": {
        "warmup_steps": 2,
        "explore_steps": 6,
        "oscillate_steps": 6,
        "sparsify_steps": 6,
        "recover_steps": 2,
    },
}

FEW_STEPS = {
    "stop_keep": 0.5,
    "lora_rank": 1,
    "learning_rate": 4e-3,
    "lora_learning_rate": 2e-3,
    "steps": 10,
    "max_steps": 30,
    "pressure_growth": 1.5,
    "pressure_every": 1,
    "size_every": 1,
    "heal_steps": 2,
    "heal_grid": 3,
}
"""Of ACIP: every stage begins, and ends at once."""


def quick(recipe: Recipe, keep: float) -> Recipe:
    data = recipe.model_dump(mode="json")
    data["keep"] = keep
    data["calibration"] |= {"text": "self", "windows": 16, "window_length": 12, "batch": 8}
    data["allocate"] |= {"gradient_windows": 4}
    for step in data["refine"]:
        step |= QUICK_STEPS[step["step"]]
        if step.get("windows") is not None:
            step["windows"] = 4
    if data["learn"] is not None:
        data["learn"] |= QUICK_LEARNING[data["learn"]["method"]]
    return Recipe.model_validate(data)
