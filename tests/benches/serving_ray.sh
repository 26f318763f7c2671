#!/usr/bin/env bash
# Ray Serve with a deployment that gives back what it gets, loaded by the same clients as ours (bench `serving`), in a network namespace of its own.
# usage: tests/benches/serving_ray.sh       (installs ray[serve] from PyPI into ~/.cache/stoke-ray, 400 MB, once)
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=~/.cache/stoke-ray
if ! "$venv/bin/python" -c 'import ray.serve' 2>/dev/null; then
    echo "== ray[serve] 2.51.1 from PyPI into $venv, once"
    python3 -m venv "$venv" && "$venv/bin/pip" install -q "ray[serve]==2.51.1" "protobuf==6.33.5"
fi
cargo bench --locked -p stoke-cli -p stoke-tests --bench serving --no-run 2> /tmp/serving-ray-build.log
load=$(grep -o '[^ (]*/serving-[0-9a-f]*' /tmp/serving-ray-build.log | tail -1)
cat > /tmp/serving_ray.py <<'PYTHON'
import ray, subprocess, sys, json
from ray import serve
from starlette.requests import Request

@serve.deployment(num_replicas=1, max_ongoing_requests=1000)
class Noop:
    async def __call__(self, request: Request):
        return await request.json()

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": 8000}, logging_config={"log_level": "ERROR", "enable_access_log": False})
serve.run(Noop.bind(), route_prefix="/")
body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}]})
for clients in (1, 32, 512):
    out = subprocess.run([sys.argv[1], "--load", "127.0.0.1:8000", "/", body, str(clients), "5"], capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stderr)
    done = json.loads(out.stdout)
    print(f"  {clients:>4} clients  {done['rate']:>7.0f} requests/s  median {done['median_ms']:>7.2f} ms  p99 {done['p99_ms']:>7.2f} ms  {done['failed']} failed", flush=True)
serve.shutdown()
PYTHON
echo "Ray Serve $("$venv/bin/python" -c 'import ray; print(ray.__version__)'), the same"
unshare -rn bash -c "ip link set lo up && RAY_USAGE_STATS_ENABLED=0 exec '$venv/bin/python' /tmp/serving_ray.py '$load'" 2> /tmp/serving-ray.log || { tail -5 /tmp/serving-ray.log >&2; exit 1; }
