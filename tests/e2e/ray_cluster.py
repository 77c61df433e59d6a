"""A Ray cluster on this machine, until stdin ends: ``python ray_cluster.py FOLDER NODES``.

Its address and the process ids of its nodes, the head's first, are one line on stdout, once all are alive.
Everything of it is in the folder: Ray's own would be shared with whatever cluster was here before.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

folder, count = Path(sys.argv[1]), int(sys.argv[2])
(folder / "ray").mkdir()
os.environ["RAY_TMPDIR"] = str(folder)
# Ray's workers have a niceness of 15, with which they hardly start beside tests that use all cores.
os.environ["RAY_worker_niceness"] = "0"

from ray.cluster_utils import Cluster  # noqa: E402  # reads the variables

NODES_SECONDS = 120.0

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.head_node, *(cluster.add_node(num_cpus=1, wait=False) for _ in range(count - 1))]
cluster.wait_for_nodes(NODES_SECONDS)  # a node that was added and has died counts as missing
pids = [node.all_processes["raylet"][0].process.pid for node in nodes]
sys.stdout.write(json.dumps({"address": cluster.address, "nodes": pids}) + "\n")
sys.stdout.flush()
sys.stdin.read()
cluster.shutdown()
