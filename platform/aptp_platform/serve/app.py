"""The whole server in one screen: Ingress -> Router -> one deployment per code, and the teacher if it is wanted.

serve run aptp_platform.serve.app:build release=runs/demo/release
serve deploy serve_configs/experts.yaml
"""

from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from aptp_platform.serve.args import ExpertArgs, ScalingArgs, ServeArgs
from aptp_platform.serve.engine.expert import Expert
from aptp_platform.serve.http.ingress import Ingress
from aptp_platform.serve.http.keys import read_keys_file
from aptp_platform.serve.http.wire.substitutes import check_names
from aptp_platform.serve.messages import TEACHER, code_name
from aptp_platform.serve.release_source import ReleaseSource
from aptp_platform.serve.routing.router import Router

_MANY = 1024  # requests that a replica of ingress or router may have under way: they wait, they do not compute


# No postponed annotations in this file: Ray Serve reads the type of `args` to validate a config file with it.
def build(args: ServeArgs) -> Application:
    """The application of a release. Code 3 is the deployment `Expert-03`.

    Raises:
        ValueError: `keys.file` cannot be read, no whole release is there, a file is not what its hash says, `codes`
            names a code that does not exist, `images.aliases` a model that does not, or the teacher is wanted and not
            in the release.
    """
    if args.keys.file is not None and args.keys.required:  # now: a server that runs is still there to go on
        read_keys_file(Path(args.keys.file))
    source = ReleaseSource(args.release, args.storage, args.cache)
    catalog = source.catalog(with_teacher=args.teacher_args is not None)
    unknown = set(args.codes) - set(range(len(catalog.codes)))
    if unknown:
        raise ValueError(f"codes: {min(unknown)}: the release has codes 0..{len(catalog.codes) - 1}: remove the entry")
    check_names(args.images, catalog)
    models = {code_name(index): (f"Expert-{index:02d}", args.expert(index)) for index in range(len(catalog.codes))}
    if args.teacher_args is not None:
        models[TEACHER] = ("Teacher", args.teacher_args)
    experts = {
        model: serve.deployment(name=name, **_expert_options(settings, args))(Expert).bind(
            source, catalog, model, settings
        )
        for model, (name, settings) in models.items()
    }
    deployments = {model: name for model, (name, _) in models.items()}
    batch_bounds = {model: settings.batch_bound for model, (_, settings) in models.items()}
    router_options = _options(args.router.num_cpus, args.router.scaling, args)
    router = serve.deployment(name="Router", **router_options)(Router).bind(
        source, catalog, args, experts, deployments, batch_bounds
    )
    ingress_options = _options(args.ingress.num_cpus, args.ingress.scaling, args)
    return serve.deployment(name="Ingress", **ingress_options)(Ingress).bind(router, catalog, args)


def _options(num_cpus: float, scaling: ScalingArgs, args: ServeArgs) -> dict[str, Any]:
    return {
        "ray_actor_options": {"num_cpus": num_cpus},
        "autoscaling_config": scaling.to_ray(_MANY / 8),
        "max_ongoing_requests": _MANY,
        **_drain_options(args),
    }


def _expert_options(expert: ExpertArgs, args: ServeArgs) -> dict[str, Any]:
    """A replica holds one batch and those who are next; the others wait where any replica can take them."""
    return {
        "ray_actor_options": {"num_cpus": expert.num_cpus, "num_gpus": expert.num_gpus},
        "autoscaling_config": expert.scaling.to_ray(expert.batch_bound),
        "max_ongoing_requests": expert.batch_bound + expert.max_waiting,
        "max_queued_requests": expert.max_queued_requests,
        **_drain_options(args),
    }


def _drain_options(args: ServeArgs) -> dict[str, Any]:
    return {"graceful_shutdown_timeout_s": args.drain_s, "max_surge_percent": args.surge_percent}
