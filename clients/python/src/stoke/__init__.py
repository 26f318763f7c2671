"""A client of Stoke's HTTP API, on Python's standard library alone.

    from stoke import Client

    client = Client()                                  # STOKE_CLUSTER, or the local cluster of `stoke up`
    job = client.submit("jobs/specs/digits.toml", key="nightly-2026-11-27")
    job = client.wait(job.id)                          # raises JobFailed when it has failed
    print(job.metrics["accuracy"], job.checkpoint)
"""

from stoke._client import (
    Client,
    Conflict,
    Forbidden,
    Invalid,
    Job,
    JobCancelled,
    JobFailed,
    NotFound,
    StokeError,
    Unavailable,
)

__all__ = [
    "Client",
    "Conflict",
    "Forbidden",
    "Invalid",
    "Job",
    "JobCancelled",
    "JobFailed",
    "NotFound",
    "StokeError",
    "Unavailable",
]
