"""The smallest application of Ray Serve."""

from ray import serve


class Echo:
    """Answers each request with a word."""

    def __call__(self) -> str:
        return "echo"


app = serve.deployment(ray_actor_options={"num_cpus": 0})(Echo).bind()
