"""A Serve config file that cannot be served is told so before anything is deployed, at any level, in one line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from aptp_platform.serve.config_check import check_config


def config(**args: Any) -> dict[str, Any]:
    application = {"name": "aptp", "import_path": "aptp_platform.serve.app:build", "args": args}
    return {"http_options": {"port": 8000}, "applications": [application]}


def changed(place: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    data: Any = config(release="/nowhere")
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return data


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (changed(("http_option",), {}), "^http_option: unknown key; did you mean http_options"),
        (changed(("http_options", "hots"), "x"), r"^http_options\.hots: unknown key; did you mean http_options\.host"),
        (
            changed(("applications", 0, "arg"), {}),
            r"^applications\.0\.arg: unknown key; did you mean applications\.0\.args",
        ),
        (
            changed(("applications", 0, "deployments"), [{"name": "Router", "num_replica": 2}]),
            r"^applications\.0\.deployments\.0\.num_replica: unknown key",
        ),
        (changed(("http_options", "port"), "x"), r"^http_options\.port: "),
        (changed(("applications", 0, "args", "relese"), 1), r"^applications\.0\.args\..*relese: unknown key"),
        (config(release="/nowhere", codes={1: {"num_cpu": 2}}), r"codes\.1: num_cpu: unknown key"),
        (config(release="/nowhere"), r"/nowhere.* holds no release\.json"),
        (config(release="/nowhere", keys={"file": "/no/keys.json"}), r"^keys\.file: /no/keys\.json: FileNotFoundError"),
        ([], "must be a mapping"),
    ],
)
def test_what_cannot_be_served_is_named_by_its_place(data: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=named) as caught:
        check_config(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FileNotFoundError"):
        check_config(tmp_path / "serve.yaml")
    (tmp_path / "serve.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        check_config(tmp_path / "serve.yaml")
