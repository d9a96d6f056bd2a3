"""What holds for every test: no network, no GPU test without a GPU."""

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# Before anything imports huggingface_hub: its downloader is partly not Python, out of reach of the guard below.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def is_loopback(host: str) -> bool:
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return host == socket.gethostname()  # gloo looks its own machine up by name


@pytest.fixture(autouse=True)
def no_network_attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Refuse connections and name look-ups that leave this machine; an attempt fails the test even if it was caught."""
    attempts: list[str] = []

    def refuse_unless_loopback(host: object) -> None:
        name = host.decode() if isinstance(host, bytes) else str(host or "")
        if not is_loopback(name):
            attempts.append(name)
            raise OSError(f"tests may not use the network (asked for {name})")

    def guarded(method: str) -> Any:
        original = getattr(socket.socket, method)

        def call(self: socket.socket, address: Any, *args: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse_unless_loopback(address[0])
            return original(self, address, *args)

        return call

    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse_unless_loopback(host)
        return look_up(host, *args, **kwargs)

    for method in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, method, guarded(method))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield attempts
    if attempts:
        pytest.fail(f"the test asked for the network: {', '.join(attempts)}")


@pytest.fixture(autouse=True)
def usual_attention_backend() -> Iterator[None]:
    """diffusers' ``set_attention_backend`` changes the default of all models, and its reset does not take that back."""
    yield
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is not None:
        dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)
