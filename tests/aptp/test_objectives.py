from typing import Any

import pytest

from aptp.objectives import FinetuningConfig, PruningConfig


@pytest.mark.parametrize(
    ("config", "values", "words"),
    [
        (PruningConfig, {"budget": 1.5}, "budget must lie between 0 and 1"),
        (PruningConfig, {"warmup_steps": -1}, "warmup_steps must not be negative"),
        (PruningConfig, {"usage_decay": 1.0}, r"usage_decay must lie in \[0, 1\)"),
        (PruningConfig, {"pull_weight": -1.0}, "pull_weight must not be negative, it is -1.0"),
        (FinetuningConfig, {"null_share": 1.0}, r"null_share must lie in \[0, 1\)"),
        (FinetuningConfig, {"output_weight": -0.1}, "output_weight must not be negative, it is -0.1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(config: Any, values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**values)
