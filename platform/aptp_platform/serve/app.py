"""The whole server in one screen: Ingress -> Router -> one deployment a code, and the teacher if it is wanted.

serve run aptp_platform.serve.app:build release=runs/demo/release
serve deploy serve_configs/experts.yaml
"""

from typing import Any

from ray import serve
from ray.serve import Application

from aptp_platform.serve.args import ExpertArgs, ScalingArgs, ServeArgs
from aptp_platform.serve.expert import Expert
from aptp_platform.serve.ingress import Ingress
from aptp_platform.serve.orders import TEACHER, code_name
from aptp_platform.serve.released import ReleaseSource
from aptp_platform.serve.router import Router

_MANY = 1024  # requests that a replica of ingress or router may have under way: they wait, they do not compute


# No postponed annotations in this file: Ray Serve reads the type of `args` to validate a config file with it.
def build(args: ServeArgs) -> Application:
    """The application of a release. Code 3 is the deployment `Expert-03`.

    Raises:
        ValueError: no whole release is there, a file is not what its hash says, `codes` names a code that does not
            exist, or the teacher is wanted and not in the release.
    """
    source = ReleaseSource(args.release, args.storage, args.cache)
    catalog = source.catalog(with_teacher=args.teacher_args is not None)
    unknown = set(args.codes) - set(range(len(catalog.codes)))
    if unknown:
        raise ValueError(f"codes: {min(unknown)}: the release has codes 0..{len(catalog.codes) - 1}: remove the entry")
    models = {code_name(index): (f"Expert-{index:02d}", args.expert(index)) for index in range(len(catalog.codes))}
    if args.teacher_args is not None:
        models[TEACHER] = ("Teacher", args.teacher_args)
    experts = {
        model: serve.deployment(name=name, **_expert_options(settings, args.drain_s))(Expert).bind(
            source, catalog, model, settings
        )
        for model, (name, settings) in models.items()
    }
    deployments = {model: name for model, (name, _) in models.items()}
    batch_sizes = {model: settings.max_batch_size for model, (_, settings) in models.items()}
    router_options = _options(args.router.num_cpus, args.router.scaling, args.drain_s)
    router = serve.deployment(name="Router", **router_options)(Router).bind(
        source, catalog, args, experts, deployments, batch_sizes
    )
    ingress_options = _options(args.ingress.num_cpus, args.ingress.scaling, args.drain_s)
    return serve.deployment(name="Ingress", **ingress_options)(Ingress).bind(router, catalog, args)


def _options(num_cpus: float, scaling: ScalingArgs, drain_s: float) -> dict[str, Any]:
    return {
        "ray_actor_options": {"num_cpus": num_cpus},
        "autoscaling_config": scaling.to_ray(_MANY / 8),
        "max_ongoing_requests": _MANY,
        "graceful_shutdown_timeout_s": drain_s,
    }


def _expert_options(args: ExpertArgs, drain_s: float) -> dict[str, Any]:
    """A replica holds one batch and those who are next; the others wait where any replica can take them."""
    return {
        "ray_actor_options": {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        "autoscaling_config": args.scaling.to_ray(args.max_batch_size),
        "max_ongoing_requests": args.max_batch_size + args.max_waiting,
        "max_queued_requests": args.max_queued_requests,
        "graceful_shutdown_timeout_s": drain_s,
    }
