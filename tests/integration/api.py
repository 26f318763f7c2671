"""What the Python client sees of a live cluster. Called by api.rs.

usage: api.py SPEC     (STOKE_CLUSTER names the cluster; SPEC trains a few steps)
Prints one JSON document; the test compares it with what `stoke` itself says.
"""

import json
import sys

from stoke import Client, Conflict, Invalid, JobCancelled, NotFound


def refusal(kind, call):
    try:
        call()
    except kind as error:
        return {"message": error.message, "mend": error.mend}
    raise AssertionError(f"no {kind.__name__}")


spec = sys.argv[1]
told = {}
with Client() as client:
    told["cluster"] = client.cluster()
    told["nodes"] = [node["name"] for node in client.nodes()]
    job = client.submit(spec, key="from-python", ranks=2)
    told["again"] = client.submit(spec, key="from-python", ranks=2).id == job.id
    told["conflict"] = refusal(Conflict, lambda: client.submit(spec, key="from-python", ranks=1))
    changes = []
    job = client.wait(job.id, timeout=120, every=0.05, on_change=lambda job: changes.append((job.state, job.step)))
    told["job"] = job.document
    told["states"] = list(dict.fromkeys(state for state, _ in changes))
    told["history"] = [point["step"] for point in client.history(job.id)]
    told["log_ranks"] = sorted({rank for rank, _ in client.logs(job.id)})
    told["events"] = [event["text"] for event in client.explain(job.id)["events"]]
    told["checkpoints"] = client.checkpoints(job.id)
    told["listed"] = [found.id for found in client.jobs()]
    told["absent"] = refusal(NotFound, lambda: client.job("job-999"))
    told["no_id"] = refusal(Invalid, lambda: client.job("banana"))
    told["bad_spec"] = refusal(Invalid, lambda: client.submit("name = 'x'\ntrainr = 'digits'\n", key="bad"))
    long = client.submit({"name": "long", "trainer": "digits", "train": {"batch": 128, "steps": 1_000_000}, "data": {"train": sys.argv[2]}}, key="long")
    client.cancel(long.id)
    told["cancelled"] = refusal(JobCancelled, lambda: client.wait(long.id))
    told["cancelled_again"] = client.job(long.id).state
print(json.dumps(told))
