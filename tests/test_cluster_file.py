"""`cluster.yaml` is a launcher file that Ray accepts."""

import json
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


def test_cluster_yaml_follows_ray_s_schema() -> None:
    cluster = yaml.safe_load(CLUSTER.read_text())
    jsonschema.validate(cluster, SCHEMA)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    starts = [each for when in ("head", "worker") for each in cluster[f"{when}_start_ray_commands"] if " start" in each]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in each for each in starts), "a node that takes anyone's orders"
    assert "/home/ubuntu/.ray/auth_token" in cluster["file_mounts"]


def test_the_schema_refuses_an_unknown_key() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**yaml.safe_load(CLUSTER.read_text()), "max_wrokers": 3}, SCHEMA)
