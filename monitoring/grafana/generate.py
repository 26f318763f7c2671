"""Writes the dashboards beside this file: `python3 generate.py`; with `--check` it only says whether they are what it would write. Panels are lines here, so that a review sees them."""

import json
import pathlib
import sys

BY_JOB = "{{job}} {{name}}"
BY_NODE = "{{node}} {{name}}"

# Dashboard: title, and rows of (panel, unit, [(expression, legend)]).
DASHBOARDS = {
    "cluster": (
        "Stoke: cluster",
        [
            ("Nodes by state", "short", [("stoke_nodes", "{{state}}")]),
            ("Jobs by state", "short", [("stoke_jobs > 0", "{{state}}")]),
            ("Processors: load of each node", "percentunit", [("stoke_node_cpu_load_ratio", BY_NODE)]),
            ("Processors that ranks have", "percentunit", [("stoke_node_cpus_used / stoke_node_cpus", BY_NODE)]),
            ("Memory that ranks have", "percentunit", [("stoke_node_memory_reserved_bytes / stoke_node_memory_bytes", BY_NODE)]),
            ("GPUs that ranks have", "short", [("stoke_node_gpus_used", BY_NODE)]),
            ("Ranks of each node", "short", [("stoke_node_ranks", BY_NODE)]),
            ("Seconds since a node was heard", "s", [("stoke_node_silent_seconds", BY_NODE)]),
        ],
    ),
    "training": (
        "Stoke: training",
        [
            ("Loss", "short", [("stoke_job_loss", BY_JOB)]),
            ("Samples a second", "short", [("stoke_job_samples_per_second", BY_JOB)]),
            ("Done", "percentunit", [("stoke_job_step / stoke_job_steps", BY_JOB)]),
            ("World size", "short", [("stoke_job_world_size", BY_JOB)]),
            (
                "Where a step's time goes",
                "s",
                [
                    ("stoke_job_compute_seconds", f"{BY_JOB} compute"),
                    ("stoke_job_exchange_seconds", f"{BY_JOB} exchange"),
                    ("stoke_job_apply_seconds", f"{BY_JOB} optimizer"),
                ],
            ),
            ("Since the last step", "s", [("time() - stoke_job_moved_timestamp_seconds", BY_JOB)]),
            ("Age of the newest checkpoint", "s", [("time() - stoke_job_checkpoint_timestamp_seconds", BY_JOB)]),
            ("Generations that lost ranks, an hour", "short", [("increase(stoke_job_recoveries_total[1h])", BY_JOB)]),
        ],
    ),
    "rl": (
        "Stoke: reinforcement learning",
        [
            ("Return, mean of a hundred episodes", "short", [("stoke_job_episode_return", BY_JOB)]),
            ("Environment steps a second", "short", [("rate(stoke_job_env_steps_total[1m])", BY_JOB)]),
            ("Updates that trajectories are behind (IMPALA)", "short", [("stoke_job_policy_lag", BY_JOB)]),
            ("Weights to all ranks that play", "s", [("stoke_job_broadcast_seconds", BY_JOB)]),
            (
                "Environments that failed, or strayed, ten minutes",
                "short",
                [
                    ("increase(stoke_job_environment_failures_total[10m])", BY_JOB + " failed"),
                    ("increase(stoke_job_environment_strays_total[10m])", BY_JOB + " strayed"),
                ],
            ),
            ("Ranks", "short", [("stoke_job_world_size and on (job, name) stoke_job_env_steps_total", BY_JOB)]),
        ],
    ),
    "serving": (
        "Stoke: serving",
        [
            ("Replicas that answer", "short", [("stoke_model_answering", "{{model}}"), ("stoke_model_replicas", "{{model}} wanted")]),
            ("Requests: running, waiting, at gateways", "short", [("stoke_model_running", "{{model}} running"), ("stoke_model_waiting", "{{model}} waiting"), ("stoke_model_held", "{{model}} at gateways")]),
            ("Tokens a second", "short", [("rate(stoke_model_tokens_total[1m])", "{{model}}")]),
            ("Answers a second", "short", [("rate(stoke_model_answers_total[1m])", "{{model}}")]),
            ("Refused requests a second", "short", [("rate(stoke_model_refused_total[5m])", "{{model}}")]),
            (
                "First token: p50, p99",
                "s",
                [
                    ("histogram_quantile(0.5, sum by (model, le) (rate(stoke_model_first_token_seconds_bucket[1m])))", "{{model}} p50"),
                    ("histogram_quantile(0.99, sum by (model, le) (rate(stoke_model_first_token_seconds_bucket[1m])))", "{{model}} p99"),
                ],
            ),
        ],
    ),
    "coordinator": (
        "Stoke: coordinator",
        [
            ("Answers", "short", [('up{job="stoke-coordinator"}', "{{instance}}")]),
            ("Requests a second", "short", [("rate(stoke_requests_total[1m])", "{{verb}}")]),
            ("Journal: entries a second", "short", [("rate(stoke_journal_entries_total[1m])", "entries")]),
            ("Journal: a commit, p99", "s", [("histogram_quantile(0.99, rate(stoke_journal_commit_seconds_bucket[1m]))", "commit")]),
            ("Journal: room on its disk", "bytes", [("stoke_journal_free_bytes", "free")]),
            ("Deciding: one input, p99", "s", [("histogram_quantile(0.99, rate(stoke_step_seconds_bucket[1m]))", "input")]),
            ("Heartbeats a second", "short", [("rate(stoke_heartbeats_total[1m])", "heartbeats")]),
            ("Certificates end in", "s", [("stoke_certificate_expiry_timestamp_seconds - time()", "{{of}}")]),
        ],
    ),
}

SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def panel(number: int, title: str, unit: str, targets: list[tuple[str, str]]) -> dict:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0 if unit in ("percentunit", "bytes") else None}, "overrides": []},
        "options": {"legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull"]}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
            for at, (expression, legend) in enumerate(targets)
        ],
    }


def dashboard(name: str) -> dict:
    title, panels = DASHBOARDS[name]
    return {
        "uid": f"stoke-{name}",
        "title": title,
        "tags": ["stoke"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]},
        "links": [{"type": "dashboards", "title": "Stoke", "tags": ["stoke"], "asDropdown": True}],
        "panels": [panel(number, *line) for number, line in enumerate(panels)],
    }


folder = pathlib.Path(__file__).parent
stale = []
for name in DASHBOARDS:
    path, text = folder / f"{name}.json", json.dumps(dashboard(name), indent=1) + "\n"
    if "--check" in sys.argv:
        stale += [] if path.exists() and path.read_text() == text else [path.name]
    else:
        path.write_text(text)
if stale:
    sys.exit(f"{', '.join(stale)}: not what generate.py writes; run it")
