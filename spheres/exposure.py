"""What an address is, who can reach it, and what is said of one beyond this machine. No socket is opened here."""

from __future__ import annotations

from ipaddress import ip_address

__all__ = ["insecure_warning", "is_address", "is_every_address", "is_loopback"]


def is_address(text: str) -> bool:
    """Whether a text is HOST:PORT, with a port from 0 to 65535: gRPC itself takes port 99999 for another one."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and int(port) <= 65_535


def is_every_address(host: str) -> bool:
    """Whether what listens on ``host`` listens on every address of its machine: it is dialled under another one."""
    return host in ("0.0.0.0", "::", "[::]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``; a name other than localhost counts as no."""
    host = host.strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def insecure_warning(address: str) -> str:
    """Return what a node says once in its log where it listens beyond loopback (--insecure)."""
    return (
        f"listening on {address} with --insecure: nothing is encrypted and nobody is asked who they are; whoever "
        "reaches this port can read and change weights and gradients, and end the run. Keep it in a private network"
    )
