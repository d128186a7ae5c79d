"""A toy trained by two workers on two machines of a small cluster, in a process of its own: one of them is killed.

Run as a script: `two_nodes.py <folder>` prints the summary of the run as JSON.
"""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import ray
import ray.cloudpickle
from ray.cluster_utils import Cluster

from aptp_platform.storage.store import Store
from aptp_platform.train.trainer import fit
from tests.support import toy_spec
from tests.support.toy_spec import toy

NODES = 3  # two are used, one is spare
STEPS = 75
# A node is told that it will go, and a little later does. No regular checkpoint is due before.
FAULTS = ((24, "notice"), (55, "node"))


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80_000_000})
    for _ in range(NODES):
        cluster.add_node(wait=False, num_cpus=1, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
    ray.cloudpickle.register_pickle_by_value(toy_spec)
    stage = toy(folder, steps=STEPS, workers=2, faults=FAULTS, pause=0.1)
    stage = replace(stage, training=replace(stage.training, cpus_per_worker=1.0))
    print(json.dumps(fit(stage, Store.open(folder), "run")))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
