"""Prefect: a task that trains on the cluster.

    python prefect_train.py jobs/specs/digits.toml

The key is the flow run's: a task that is retried gets the job that it had.
"""

import sys

from prefect import flow, get_run_logger, task
from prefect.runtime import flow_run

from stoke import Client


@task(retries=3, retry_delay_seconds=5)
def train(spec: str, key: str) -> dict:
    log = get_run_logger()
    with Client() as client:
        job = client.submit(spec, key=key)
        log.info("%s was submitted", job.id)
        job = client.wait(job.id, on_change=lambda job: log.info("%s at step %s", job.state, job.step))
    return {"job": job.id, "checkpoint": job.checkpoint, **job.metrics}


@flow
def nightly(spec: str, key: str | None = None) -> dict:
    return train(spec, key or f"prefect-{flow_run.id}")


if __name__ == "__main__":
    print(nightly(sys.argv[1], *sys.argv[2:3]))
