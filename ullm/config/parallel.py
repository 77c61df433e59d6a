"""The workers: ranks and replicas, the hosts that they run on, and what connects these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ullm.config.options import option

Transport = Literal["auto", "process", "thread", "ray", "fake"]
Role = Literal["prefill", "decode", "both"]
"""What a replica is for: the prompts of long requests, all tokens after them, or everything."""
LINK_FILES = ("link_certfile", "link_keyfile", "link_ca_file")
"""Options that belong together: connections between hosts are encrypted by them."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Ranks and replicas, and where they run."""

    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Device that the model runs on; auto: cuda where a GPU is found, else cpu."
    )
    tp_size: int = option(
        1, "Number of tensor-parallel ranks per replica.", aliases=("--tensor-parallel-size", "-tp")
    )
    pp_size: int = option(
        1,
        "Number of pipeline stages per replica: each has a part of the layers, in --tp-size ranks.",
        aliases=("--pipeline-parallel-size", "-pp"),
    )
    replicas: int = option(
        1, "Number of data-parallel replicas of the whole model.", aliases=("--data-parallel-size", "-dp")
    )
    routing: Literal["prefix", "least-loaded", "round-robin"] = option(
        "prefix",
        "Which of several replicas a request goes to; prefix: the one with most of its prompt cached, "
        "weighed against the load, least-loaded: that with the fewest requests, round-robin: each in turn.",
    )
    roles: tuple[str, ...] = option(
        (),
        "What each replica is for, one entry each: prefill computes long prompts, decode all else, both "
        "everything. A request whose prompt is computed moves on with its KV. Default: both for all.",
    )
    prefill_threshold: int = option(
        256,
        "With --roles, tokens to compute from which a request goes to a replica for prefill first; shorter "
        "ones, and those whose beginning is cached, are computed where they decode.",
    )
    kv_handover: bool = option(
        True,
        "Copy the KV of requests that move to another replica on purpose, as in a reload; otherwise it is "
        "computed again there.",
    )
    migration_limit: int | None = option(
        None,
        "Number of times that a request goes on after the workers that computed it were lost; after one more "
        "loss it ends with an error. Default: no limit.",
    )
    device_ids: tuple[int, ...] | None = option(
        None,
        "Indices of the GPUs to use, --tp-size × --pp-size for each replica; default: the first ones.",
    )
    nccl_port: int = option(
        0,
        "First port for the rendezvous of a replica's ranks, of which each replica uses 16 in turn; 0: a "
        "free one, which the operating system chooses. With --nnodes: the port at which the engine waits for "
        "the other hosts; 0: 29501.",
        aliases=("--master-port",),
    )
    master_addr: str = option(
        "127.0.0.1",
        "Address at which a replica's ranks meet, one of loopback; with --nnodes, the address of the "
        "engine's host at which it waits for the other hosts.",
    )
    nnodes: int = option(
        1,
        "Number of hosts that share the ranks of all replicas; each runs the same command, with its own "
        "--node-rank.",
    )
    node_rank: int = option(
        0, "Index of this host: 0 has the engine and its server, the others only run workers for it."
    )
    node_secret_file: str | None = option(
        None,
        "File with a secret by which the hosts know each other, at least 16 bytes, the same on all; needed "
        "with --nnodes.",
    )
    link_certfile: str | None = option(
        None,
        "File with this host's certificate for connections between hosts (PEM, with intermediates): those of "
        "--listen HOST:PORT, --connect HOST:PORT and --nnodes are encrypted by TLS, and both ends show a "
        "certificate. Needs --link-keyfile and --link-ca-file.",
    )
    link_keyfile: str | None = option(None, "File with the key of --link-certfile, without a password.")
    link_ca_file: str | None = option(
        None,
        "File with the authority whose certificates are let in over --link-certfile: an own one, since each "
        "certificate of it is.",
    )
    node_timeout: float = option(
        5.0, "Seconds without a sign of life after which a host counts as lost, and its workers with it."
    )
    transport: Transport = option(
        "auto",
        "Kind of worker: process, thread, or ray for a Ray actor (fake: for tests); auto: thread on Windows "
        "with one rank, else process.",
    )
    cpu_threads: int | None = option(
        None,
        "Number of threads that a CPU worker computes with; default: the cores that affinity and the "
        "container's quota leave, rounded up, divided among the ranks of a replica.",
    )
