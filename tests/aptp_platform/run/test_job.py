"""A job that runs in a copy of the working directory takes no place that is relative to it."""

from pathlib import Path

import pytest

from aptp_platform.config import ConfigError
from aptp_platform.config_file import load_config, places
from aptp_platform.run.job import require_lasting

ROOT = Path(__file__).parents[3]
COPY = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1")


@pytest.mark.parametrize("field", ["root", "data.source", "model.pipeline", "model.text_encoder"])
def test_a_relative_place_is_refused_in_a_submitted_job_alone(field: str) -> None:
    bucket = ROOT / "jobs/configs/bucket.yaml"
    require_lasting(load_config(bucket), COPY)
    require_lasting(load_config(bucket, [f"{field}=/shared/folder"]), COPY)
    relative = load_config(bucket, [f"{field}=some/folder"])
    assert places(relative)[field] == "some/folder"
    require_lasting(relative, ROOT)
    with pytest.raises(ConfigError, match=rf"^{field}: some/folder: is relative.*--set {field}=s3://bucket/key$"):
        require_lasting(relative, COPY)
