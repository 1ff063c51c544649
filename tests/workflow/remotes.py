"""Servers that a DVC remote can be on, started here on the loopback: a real sshd and a real WebDAV server."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Remote:
    """Where a remote is (`url`), the folder in which its objects arrive, and DVC's further settings of it."""

    url: str
    folder: Path
    settings: dict[str, str] = field(default_factory=dict)

    def objects(self) -> dict[str, int]:
        """Name -> size of what is stored."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in files}


@contextlib.contextmanager
def ssh(place: Path) -> Iterator[Remote]:
    """A sshd of its own, as the present user, with its own host key; skips where there is none (openssh-server)."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if sshd is None or shutil.which("ssh-keygen") is None:
        pytest.skip("no sshd here: install openssh-server")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd started by root insists on its folder
    place.mkdir(parents=True)
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name], check=True)
    shutil.copy(place / "key.pub", place / "authorized_keys")
    port = free_port()
    config = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": place / "host_key",
        "AuthorizedKeysFile": place / "authorized_keys",
        "PidFile": place / "pid",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "yes",
        "StrictModes": "no",
        "UsePAM": "no",
        "Subsystem": "sftp internal-sftp",
    }
    (place / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in config.items()))
    folder = place / "storage"
    folder.mkdir()
    with _server([sshd, "-D", "-e", "-f", place / "sshd_config"], port, place / "log"):
        yield Remote(f"ssh://{getpass.getuser()}@127.0.0.1:{port}{folder}", folder, {"keyfile": str(place / "key")})


@contextlib.contextmanager
def webdav(place: Path) -> Iterator[Remote]:
    """A WebDAV server (wsgidav)."""
    folder = place / "storage"
    folder.mkdir(parents=True)
    port = free_port()
    command = [Path(sys.executable).parent / "wsgidav", "--host", "127.0.0.1", "--port", str(port)]
    with _server([*command, "--root", folder, "--auth", "anonymous"], port, place / "log"):
        yield Remote(f"webdav://127.0.0.1:{port}/", folder)


@contextlib.contextmanager
def local(place: Path) -> Iterator[Remote]:
    """A folder, as on a mounted disk."""
    folder = place / "storage"
    folder.mkdir(parents=True)
    yield Remote(str(folder), folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _server(command: list[str | Path], port: int, log: Path) -> Iterator[None]:
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        else:
            raise AssertionError(f"{command[0]} does not answer: {log.read_text()}")
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)
