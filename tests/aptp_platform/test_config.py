"""A config states what differs, prints back whole, and says in one line what is wrong with it."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, strategies as st

from aptp.relax import Relaxation
from aptp.routes import RouterConfig
from aptp.sites import Granule, any_order, read_space
from aptp_platform.config import ConfigError, GranuleSection, RelaxationSection, RouterSection, RunConfig, SpaceSection
from aptp_platform.config_file import dump_config, load_config, parse_config, to_tree
from aptp_platform.models import pruning_space
from aptp_platform.run.facts import differences
from aptp_platform.train.specs import router_config
from tests.support import tiny

MINIMAL = {"data": {"source": "s3://bucket/shards"}, "model": {"pipeline": "/models/sd"}}
DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.yaml"


def merged(**sections) -> dict[str, Any]:
    return {**MINIMAL, **{name: {**MINIMAL.get(name, {}), **fields} for name, fields in sections.items()}}


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as caught:
        parse_config(tree)
    return str(caught.value)


def test_what_is_not_stated_is_the_default():
    config = parse_config(merged(prune={"run": {"steps": 7, "engine": {"zero_stage": 3}}}))
    assert config.prune.run.steps == 7
    assert config.prune.run.engine.zero_stage == 3
    assert config.prune.run.engine.precision == RunConfig().prune.run.engine.precision
    assert config.finetune == RunConfig().finetune
    assert parse_config({**MINIMAL, "prune": None}) == parse_config(MINIMAL)
    assert parse_config({**MINIMAL, "prune": {"run": None}}) == parse_config(MINIMAL)


def test_a_section_that_states_one_value_keeps_its_own_other_defaults():
    """Not those of its type: fine-tuning has other steps and another rate than pruning."""
    stated = parse_config(merged(finetune={"run": {"batch_size": 8}})).finetune.run
    assert stated == replace(RunConfig().finetune.run, batch_size=8)
    assert stated.steps == 30_000


def test_the_sections_of_router_and_space_are_the_library_s():
    for section, theirs, elsewhere in (
        (RouterSection(), RouterConfig(8), {"budget", "embedding_dim"}),
        (RelaxationSection(), Relaxation(), set()),
        (GranuleSection(), Granule(), set()),
    ):
        assert {field.name for field in fields(section)} ^ {field.name for field in fields(theirs)} == elsewhere
    assert router_config(RouterSection(), 768) == RouterConfig(8)
    changed = parse_config(merged(router={"features": "mixed", "relaxation": {"temperature": 1.5}}))
    expected = RouterConfig(8, 384, features="mixed", relaxation=Relaxation(temperature=1.5))
    assert router_config(changed.router, 384) == expected


def test_the_section_of_the_space_is_what_is_read_from_the_network():
    unet = tiny.unet()
    assert pruning_space(unet, SpaceSection()) == read_space(unet)
    stated = parse_config(merged(space={"granule": {"groups": 2}, "depth": "every", "order": "any_order"})).space
    expected = read_space(unet, granule=Granule(groups=2), depth="every", depth_order=any_order)
    assert pruning_space(unet, stated) == expected
    assert expected != read_space(unet)


@given(
    steps=st.integers(1, 10**9),
    rate=st.floats(1e-9, 1, allow_subnormal=False),
    share=st.floats(0, 1),
    endpoint=st.none() | st.just("https://minio:9000"),
    timesteps=st.lists(st.integers(0, 999), min_size=1).map(tuple),
)
def test_a_dumped_config_reads_back_equal(tmp_path_factory, steps, rate, share, endpoint, timesteps):
    config = parse_config(
        merged(
            prune={"run": {"steps": steps, "learning_rate": rate}},
            data={"max_bad_share": share},
            storage={"endpoint": endpoint},
            evaluate={"timesteps": timesteps},
        )
    )
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_the_example_is_legal_and_overrides_change_one_value(tmp_path):
    assert load_config(DEMO).router.num_codes == 4
    changed = load_config(DEMO, ["router.num_codes=2", "prune.run.learning_rate=1e-3", "router.features=mixed"])
    assert (changed.router.num_codes, changed.prune.run.learning_rate, changed.router.features) == (2, 1e-3, "mixed")
    expected = to_tree(load_config(DEMO))
    expected["router"]["num_codes"] = 2
    expected["prune"]["run"]["learning_rate"] = 1e-3
    expected["router"]["features"] = "mixed"
    assert to_tree(changed) == expected


def test_the_demo_on_a_gpu_differs_in_its_place_its_devices_and_its_precision_alone():
    found = differences(to_tree(load_config(DEMO)), to_tree(load_config(DEMO.with_name("demo_gpu.yaml"))))
    assert {line.split(":")[0] for line in found} == {
        "root", "encode.gpus_per_actor", "prune.run.workers", "prune.run.gpus_per_worker",
        "prune.run.engine.precision", "finetune.run.gpus_per_worker", "finetune.run.cpus_per_worker",
        "finetune.run.engine.precision",
        "refit.gpus_per_task", "refit.cpus_per_task", "evaluate.gpus_per_network",
        "evaluate.cpus_per_network",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            merged(prune={"run": {"stepz": 3}}),
            "prune.run.stepz: unknown key; did you mean prune.run.steps? Known: steps, batch_size,",
        ),
        (
            merged(finetune={"run": {"engine": {"zero": 1}}}),
            "finetune.run.engine.zero: unknown key; did you mean",
        ),
        ({**MINIMAL, "purne": {}}, "purne: unknown key; did you mean prune?"),
        (merged(prune={"objective": {"budget": 0.7}}), "prune.objective.budget: unknown key; router.budget sets it"),
        (merged(prune={"objective": {"contrastiv": 1}}), "prune.objective.contrastiv: unknown key; did you mean"),
        (merged(prune={"objective": {"pull_weight": -1}}), "prune.objective: pull_weight must not be negative"),
        (merged(assign={"min_prompts": 0}), "assign.min_prompts: 0: must be greater than or equal to 1"),
        (
            merged(prune={"run": {"batch_size": 10, "workers": 4}}),
            "prune.run: batch_size 10 must be a multiple of workers, 4",
        ),
        (merged(prune={"run": {"steps": "many"}}), "prune.run.steps: 'many': must be a valid integer"),
        (merged(prune={"run": {"engine": {"zero_stage": 4}}}), "prune.run.engine.zero_stage: 4: must be 0, 1, 2 or 3"),
        (merged(prune={"run": {"steps": 0}}), "prune.run.steps: 0: must be at least 1"),
        ({**MINIMAL, "prune": 3}, "prune: 3: must be a dictionary"),
        (merged(router={"budget": 1.5}), "router.budget: 1.5: must be less than or equal to 1"),
        (merged(data={"image_size": 500}), "data.image_size: 500: must be a multiple of 8"),
        (merged(data={"image_size": 0}), "data.image_size: 0: must be greater than 0"),
        (merged(encode={"actors": 0}), "encode.actors: 0: must be greater than or equal to 1"),
        ({"model": {"pipeline": "a"}}, "data.source: '': must name a folder"),
        ({"data": {"source": "a"}}, "model.pipeline: '': must name a folder"),
        (merged(data={"source": "htp://a"}), "data.source: htp://...: unknown scheme; use a path, file://, s3://"),
    ],
)
def test_refusals_name_the_field_the_value_and_the_rule(tree, message):
    assert refusal(tree).startswith(message)


@pytest.mark.parametrize(
    "tree",
    [
        merged(storage={"secret_key": "s3cr3t"}),
        merged(storage={"endpoint": "http://user:s3cr3t@minio:9000"}),
        merged(storage={"profile": ["s3cr3t"]}),
        merged(data={"source": "s3://key:s3cr3t@bucket/a"}),
        {**MINIMAL, "root": "s3://bucket/a?secret_key=s3cr3t"},
    ],
)
def test_a_secret_is_refused_and_not_repeated(tree):
    assert "s3cr3t" not in refusal(tree)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (None, [], r"config: .*none.yaml does not exist"),
        ("a: [1", [], r"config: .* is not YAML: .* in line 1$"),
        ("- a", [], r"config: .* holds list; it must be a mapping"),
        ("root: a", ["prune.run.steps"], r"override: 'prune.run.steps' has no value; write section.field=value"),
        ("root: a", ["root.deeper=1"], r"override: root.deeper: root is a value, not a section"),
        ("root: a", ["root=[1"], r"override: root: its value is not YAML"),
        ("root: a", ["prune.run.stepz=1"], r"prune.run.stepz: unknown key; did you mean prune.run.steps"),
    ],
)
def test_files_and_overrides_that_cannot_be_read(tmp_path, text, overrides, message):
    path = tmp_path / "none.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path, overrides)


def test_the_dump_is_plain_yaml():
    tree = yaml.safe_load(dump_config(parse_config(MINIMAL)))
    assert tree["evaluate"]["timesteps"] == [100, 400, 700]
    assert "budget" not in tree["prune"]["objective"], "router.budget sets it"
