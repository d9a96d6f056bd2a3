import socket

import pytest


def test_connection_leaving_the_machine_is_refused(no_network_attempts: list[str]) -> None:
    with pytest.raises(OSError, match="may not use the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)  # TEST-NET-1, which nobody owns
    with pytest.raises(OSError, match="may not use the network"):
        socket.getaddrinfo("example.org", 443)
    assert no_network_attempts == ["192.0.2.1", "example.org"]
    no_network_attempts.clear()


def test_loopback_is_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
