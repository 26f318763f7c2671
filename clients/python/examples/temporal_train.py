"""Temporal: an activity that trains on the cluster, beats while it waits, and cancels the job when the workflow is cancelled.

    python temporal_train.py ADDRESS worker                     serves the queue until it is interrupted
    python temporal_train.py ADDRESS start ID jobs/specs/digits.toml     starts a workflow, waits for it and prints what came of it
    python temporal_train.py ADDRESS cancel ID

The key is the workflow's id: an activity that is tried again, on any worker, goes on waiting for the job that it had.
"""

import asyncio
import concurrent.futures
import datetime
import sys

from temporalio import activity, workflow
from temporalio.client import Client as Temporal
from temporalio.common import RetryPolicy
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.worker import Worker

with workflow.unsafe.imports_passed_through():
    from stoke import Client, JobCancelled, JobFailed

QUEUE = "stoke"


@activity.defn
def train(spec: str) -> dict:
    with Client() as client:
        job = client.submit(spec, key=f"temporal-{activity.info().workflow_id}")
        try:
            while not job.has_ended:
                # Where a cancellation arrives.
                activity.heartbeat(job.state, job.step)
                try:
                    job = client.wait(job.id, timeout=2)
                except TimeoutError:
                    job = client.job(job.id)
        except CancelledError:
            client.cancel(job.id)
            raise
        except (JobFailed, JobCancelled) as error:
            # Another try would find the same job.
            raise ApplicationError(str(error), non_retryable=True) from error
    return {"job": job.id, "checkpoint": job.checkpoint, **job.metrics}


@workflow.defn
class Train:
    @workflow.run
    async def run(self, spec: str) -> dict:
        return await workflow.execute_activity(
            train,
            spec,
            start_to_close_timeout=datetime.timedelta(days=7),
            # A cancellation is heard of within this.
            heartbeat_timeout=datetime.timedelta(seconds=10),
            retry_policy=RetryPolicy(maximum_interval=datetime.timedelta(minutes=1)),
            cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
        )


async def main() -> None:
    address, what, *rest = sys.argv[1:]
    temporal = await Temporal.connect(address)
    if what == "worker":
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            await Worker(temporal, task_queue=QUEUE, workflows=[Train], activities=[train], activity_executor=threads).run()
    elif what == "start":
        identity, spec = rest
        print(await temporal.execute_workflow(Train.run, spec, id=identity, task_queue=QUEUE), flush=True)
    elif what == "cancel":
        await temporal.get_workflow_handle(rest[0]).cancel()


if __name__ == "__main__":
    asyncio.run(main())
