"""Metaflow: a step that trains on the cluster, and one that decides by what came of it.

    python metaflow_train.py run --spec jobs/specs/digits.toml --least 0.9

The key is the run's: a step that is retried, or a run that is resumed, gets the job that it had.
"""

from metaflow import FlowSpec, Parameter, current, retry, step

from stoke import Client


class Train(FlowSpec):
    spec = Parameter("spec", help="a job spec (TOML)", required=True)
    least = Parameter("least", help="held-out accuracy that is good enough", default=0.9)

    @retry(times=3)
    @step
    def start(self):
        with Client() as client:
            job = client.submit(self.spec, key=f"{current.flow_name}-{current.run_id}")
            print(f"{job.id} was submitted")
            job = client.wait(job.id, on_change=lambda job: print(job.state, job.step))
        self.job, self.metrics, self.checkpoint = job.id, dict(job.metrics), job.checkpoint
        self.next(self.end)

    @step
    def end(self):
        accuracy = self.metrics["accuracy"]
        if accuracy < self.least:
            raise ValueError(f"{self.job} has {accuracy:.4f}, less than {self.least}")
        print(f"{self.job} is good: {accuracy:.4f}, {self.checkpoint}")


if __name__ == "__main__":
    Train()
