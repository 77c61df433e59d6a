"""Where the ranks of a replica meet: on loopback, and nowhere else."""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from ullm.model.layers.parallel import rendezvous_store, stay_on_loopback
from ullm.protocol.messages import RankSpec


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/net/tcp")
def test_only_loopback_hears() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    specs = [RankSpec(rank=rank, world_size=2, rendezvous=f"127.0.0.1:{port}") for rank in range(2)]
    stores: list[Any] = []

    def meet(spec: RankSpec) -> None:
        stores.append(rendezvous_store(spec))

    threads = [threading.Thread(target=meet, args=(spec,)) for spec in specs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(stores) == 2
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()
    ]
    listening = [words[1] for words in lines if words[3] == "0A" and words[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]


def test_traffic_of_the_ranks_stays_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    stay_on_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "eth0"
