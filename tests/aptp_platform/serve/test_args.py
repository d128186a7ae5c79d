"""A Serve config file: what differs for one code is laid over what holds for all; unknown keys name the nearest one."""

from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from aptp_platform.serve.app import _expert_options, build
from aptp_platform.serve.args import ServeArgs


def parse(**data: Any) -> ServeArgs:
    return ServeArgs.model_validate({"release": "runs/demo/release", **data})


def test_a_code_differs_only_where_it_says_so() -> None:
    args = parse(
        experts={"num_cpus": 2, "scaling": {"max_replicas": 4, "upscale_delay_s": 1}},
        codes={3: {"max_batch_size": 16, "scaling": {"min_replicas": 0}}},
    )
    assert args.expert(0) == args.experts
    special = args.expert(3)
    assert (special.num_cpus, special.max_batch_size) == (2, 16)
    assert (special.scaling.min_replicas, special.scaling.max_replicas, special.scaling.upscale_delay_s) == (0, 4, 1)


def test_the_teacher_takes_the_experts_settings_or_its_own() -> None:
    assert parse().teacher_args is None
    shared = parse(teacher=True, experts={"num_cpus": 3})
    assert shared.teacher_args == shared.experts
    own = parse(teacher={"num_gpus": 1}).teacher_args
    assert own is not None
    assert own.device == "cuda"


def test_the_demo_s_replicas_share_one_gpu_in_half_precision_twice_over() -> None:
    demo, on_gpu = (_arguments(name) for name in ("demo", "demo_gpu"))
    experts = on_gpu.experts
    assert (experts.device, experts.dtype) == ("cuda", "float16")
    options = _expert_options(experts, on_gpu)
    assert options["ray_actor_options"] == {"num_cpus": experts.num_cpus, "num_gpus": experts.num_gpus}
    replicas = 2 * (4 + 1)  # of four codes and the teacher, while a new release takes over
    assert replicas * experts.num_gpus <= 1
    assert replicas * experts.num_cpus + 2 * (on_gpu.router.num_cpus + on_gpu.ingress.num_cpus) <= 4
    assert on_gpu.model_copy(update={"experts": demo.experts, "release": demo.release}) == demo


def _arguments(name: str) -> ServeArgs:
    path = Path(__file__).parents[3] / "serve_configs" / f"{name}.yaml"
    return ServeArgs.model_validate(yaml.safe_load(path.read_text())["applications"][0]["args"])


def test_a_full_batch_is_the_target_of_scaling_unless_the_config_names_one() -> None:
    assert parse(experts={"max_batch_size": 6}).experts.scaling.to_ray(6)["target_ongoing_requests"] == 6
    named = parse(experts={"scaling": {"target_ongoing_requests": 2.5}})
    assert named.experts.scaling.to_ray(6)["target_ongoing_requests"] == 2.5


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"expert": {}}, "expert: unknown key; did you mean experts"),
        ({"experts": {"max_batch": 4}}, "max_batch: unknown key; did you mean max_batch_size"),
        ({"codes": {1: {"scaling": {"max_replica": 2}}}}, "max_replica: unknown key; did you mean max_replicas"),
        ({"codes": {1: {"num_cpu": 2}}}, r"codes\.1: num_cpu: unknown key; did you mean num_cpus"),
        ({"codes": {2: {"scaling": {"min_replicas": -1}}}}, r"codes\.2\.scaling\.min_replicas: "),
        ({"images": {"other_sizes": "largest"}}, "other_sizes"),
        ({"images": {"sizes": ["64"]}}, 'sizes: .64.: write "WxH"'),
        ({"codes": {-1: {}}}, "-1"),
        ({"experts": {"scaling": {"min_replicas": 3, "max_replicas": 2}}}, "min_replicas 3"),
        ({"experts": {"max_batch_size": 0}}, "max_batch_size"),
        ({"images": {"num_inference_steps": 80, "max_inference_steps": 50}}, "num_inference_steps 80"),
        ({"storage": {"endpoint": 3}}, "endpoint"),
        ({"release": ""}, "release"),
    ],
)
def test_a_wrong_config_is_refused_by_name(data: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        parse(**data)


def test_serve_validates_a_config_file_with_the_builder_s_own_type() -> None:
    assert isinstance(build, FunctionType)
    with pytest.raises(ValidationError, match="relese: unknown key; did you mean release"):
        call_user_app_builder_with_args_if_necessary(build, {"relese": "runs/demo/release"})
