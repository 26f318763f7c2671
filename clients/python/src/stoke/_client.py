"""The client: one HTTPS connection with a user's certificate, questions that are asked again, and answers as plain types.

Questions may be repeated without harm (a submission has its key), so each is asked again on a fresh connection while the coordinator is away, until `patience` is over.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import pathlib
import ssl
import time
import tomllib
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# The keys of [data] that hold paths, as `stoke submit` takes them: relative to the spec.
_PATHS = ("train", "held_out")
_ENDED = frozenset({"succeeded", "failed", "cancelled"})


class StokeError(Exception):
    """Something was not done. `mend` says what to do about it."""

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(f"{message} ({mend})" if mend else message)
        self.message = message
        self.mend = mend


class Invalid(StokeError):
    """The spec or an argument is wrong."""


class NotFound(StokeError):
    """There is no such job or node, or no cluster in the folder."""


class Forbidden(StokeError):
    """The role of this certificate does not allow it, or there is none that is valid."""


class Conflict(StokeError):
    """The key is another spec's, or the job has ended already."""


class Unavailable(StokeError):
    """The coordinator was not reached within the client's patience."""


class JobFailed(StokeError):
    """A job that was waited for has failed. `job` is as it ended."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"{job.id} ({job.name}) has failed: {job.reason}", f"stoke explain {job.id}; stoke logs {job.id}")
        self.job = job


class JobCancelled(StokeError):
    """A job that was waited for was cancelled. `job` is as it ended."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"{job.id} ({job.name}) was cancelled")
        self.job = job


_ERRORS: dict[str, type[StokeError]] = {
    "invalid": Invalid,
    "not-found": NotFound,
    "forbidden": Forbidden,
    "unauthenticated": Forbidden,
    "conflict": Conflict,
    "unavailable": Unavailable,
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A job as it stood when it was asked for. `document` is all that the API says of it."""

    id: str
    name: str
    state: str
    reason: str
    document: Mapping[str, Any]

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED

    @property
    def step(self) -> int | None:
        outcome, progress = self.document.get("outcome"), self.document.get("progress")
        found = outcome or progress
        return found["step"] if found else None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of a job that has succeeded; else none."""
        outcome = self.document.get("outcome")
        return outcome.get("metrics", {}) if outcome else {}

    @property
    def checkpoint(self) -> str | None:
        """URI of the newest one."""
        checkpoint = self.document.get("checkpoint")
        return checkpoint["uri"] if checkpoint else None


class Client:
    """A cluster, seen with the credentials in a folder of `stoke login`, of a coordinator or of `stoke up`.

    `cluster`: that folder; left out, STOKE_CLUSTER or the default one. `api`: URL of the HTTP API; left out, what the folder says. `patience`: seconds for which a coordinator
    that does not answer is asked again. Not for several threads at once: give each its own.
    """

    def __init__(self, cluster: str | os.PathLike[str] | None = None, *, api: str | None = None, patience: float = 30.0) -> None:
        self._folder = _credentials(cluster)
        said = tomllib.loads((self._folder / "cluster.toml").read_text())
        api = api or said.get("api")
        if not api:
            raise NotFound(
                f"the cluster of {self._folder} has no HTTP API, or had none at the login",
                "start the coordinator with --api ADDRESS, then log in again or give Client(api=...)",
            )
        url = urllib.parse.urlsplit(api)
        if url.scheme != "https" or not url.hostname:
            raise Invalid(f"{api!r} is no URL of an API", "write for example https://head.example.org:7879")
        self._host, self._port = url.hostname, url.port or 443
        self._patience = patience
        self._connection: http.client.HTTPSConnection | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    def cluster(self) -> Mapping[str, Any]:
        """The cluster, and who asks."""
        return self._ask("GET", "/v1/cluster")

    def nodes(self) -> list[Mapping[str, Any]]:
        return self._ask("GET", "/v1/nodes")["nodes"]

    def jobs(self) -> list[Job]:
        """The newest thousand, newest first."""
        return [_job(document) for document in self._ask("GET", "/v1/jobs")["jobs"]]

    def job(self, job: str) -> Job:
        return _job(self._ask("GET", f"/v1/jobs/{_part(job)}"))

    def submit(self, spec: str | os.PathLike[str] | Mapping[str, Any], *, key: str, ranks: int | None = None) -> Job:
        """Submits a spec: a path of a TOML file, its text, or a mapping. The same `key` with the same spec is one job, over any number of tries: a workflow that is run again gets the job that it had.

        Relative paths in [data] are taken from the spec's folder, or from the current one. `ranks`: the world size; left out, what the spec says, else one a node.
        """
        document, base = _document(spec)
        data = document.get("data")
        if isinstance(data, dict):
            for name in _PATHS:
                if isinstance(data.get(name), str):
                    data[name] = str(pathlib.Path(base, data[name]).absolute())
        if ranks is not None:
            document.setdefault("resources", {})["ranks"] = ranks
        answer = self._ask("POST", "/v1/jobs", {"spec": document}, {"Idempotency-Key": key})
        return self.job(answer["job"])

    def wait(self, job: str, *, timeout: float | None = None, every: float = 0.5, on_change: Callable[[Job], None] | None = None) -> Job:
        """Until the job has succeeded; raises JobFailed or JobCancelled. `timeout`: seconds, then TimeoutError; the job goes on. `on_change` is called with each new state or step."""
        deadline = None if timeout is None else time.monotonic() + timeout
        seen = None
        while True:
            found = self.job(job)
            if on_change and seen != (found.state, found.step):
                seen = (found.state, found.step)
                on_change(found)
            if found.state == "failed":
                raise JobFailed(found)
            if found.state == "cancelled":
                raise JobCancelled(found)
            if found.state == "succeeded":
                return found
            if deadline is not None and time.monotonic() + every > deadline:
                raise TimeoutError(f"{job} is {found.state} after {timeout} s, at step {found.step}")
            time.sleep(every)

    def cancel(self, job: str) -> Job:
        """Returns when no rank of it will start any more. A job that has ended already is a Conflict."""
        self._ask("POST", f"/v1/jobs/{_part(job)}/cancel")
        return self.job(job)

    def scale(self, job: str, ranks: int) -> None:
        """Lets a job have so many ranks from now on, while it runs."""
        self._ask("POST", f"/v1/jobs/{_part(job)}/scale", {"ranks": ranks})

    def explain(self, job: str) -> Mapping[str, Any]:
        """Why it waits, and what has happened to it."""
        return self._ask("GET", f"/v1/jobs/{_part(job)}/explanation")

    def history(self, job: str) -> list[Mapping[str, Any]]:
        """Its curve since the coordinator began: step, loss, accuracy, samples_per_second, env_steps, episode_return."""
        return self._ask("GET", f"/v1/jobs/{_part(job)}/history")["points"]

    def checkpoints(self, job: str | None = None) -> list[Mapping[str, Any]]:
        query = f"?job={_part(job)}" if job else ""
        return self._ask("GET", f"/v1/checkpoints{query}")["checkpoints"]

    def logs(self, job: str, *, rank: int | None = None, tail: int | None = None, follow: bool = False) -> Iterator[tuple[int, str]]:
        """Rank and line of each line of its ranks. `follow`: until the job has ended."""
        asked = {"rank": rank, "tail": tail, "follow": "true" if follow else None}
        query = urllib.parse.urlencode({name: value for name, value in asked.items() if value is not None})
        # On a connection of its own: the answer may last as long as the job.
        connection = self._connect(timeout=None)
        try:
            response = self._once(connection, "GET", f"/v1/jobs/{_part(job)}/logs?{query}", None, {})
            for text in response:
                line = json.loads(text)
                if "error" in line:
                    raise Unavailable(line["error"])
                yield line["rank"], line["line"]
        except ssl.SSLError as error:
            raise _untrusted(error, self._folder) from error
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"https://{self._host}:{self._port} ended the log of {job}: {error}", "ask again; `tail` leaves out what was read") from error
        finally:
            connection.close()

    def _ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        text = None if body is None else json.dumps(body)
        headers = {**(headers or {}), **({"content-type": "application/json"} if text else {})}
        deadline, wait = time.monotonic() + self._patience, 0.1
        while True:
            try:
                self._connection = self._connection or self._connect(timeout=30.0)
                return json.loads(self._once(self._connection, method, path, text, headers).read())
            except (Unavailable, OSError, http.client.HTTPException) as error:
                self.close()
                if isinstance(error, ssl.SSLError):
                    raise _untrusted(error, self._folder) from error
                if time.monotonic() + wait > deadline:
                    raise Unavailable(
                        f"https://{self._host}:{self._port} does not answer: {error}", "see whether the coordinator runs: stoke status"
                    ) from error
            time.sleep(wait)
            wait = min(2 * wait, 2.0)

    def _connect(self, timeout: float | None) -> http.client.HTTPSConnection:
        # Read anew: `stoke` renews certificates.
        context = ssl.create_default_context(cafile=str(self._folder / "ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(str(self._folder / "identity.pem"))
        return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=context)

    @staticmethod
    def _once(
        connection: http.client.HTTPSConnection, method: str, path: str, text: str | None, headers: Mapping[str, str]
    ) -> http.client.HTTPResponse:
        connection.request(method, path, text, dict(headers))
        response = connection.getresponse()
        if response.status >= 400:
            said = response.read()
            try:
                error = json.loads(said)["error"]
            except (ValueError, KeyError, TypeError):
                raise Unavailable(f"status {response.status}: {said[:200]!r}") from None
            raise _ERRORS.get(error["code"], StokeError)(error["message"], error["mend"])
        return response


def _untrusted(error: ssl.SSLError, folder: pathlib.Path) -> StokeError:
    mend = f"if the certificate in {folder} has expired, `stoke --cluster {folder} status` renews it while it is valid, `stoke login` makes a new one"
    return Forbidden(f"the coordinator and this client do not accept each other's certificates: {error}", mend)


def _credentials(cluster: str | os.PathLike[str] | None) -> pathlib.Path:
    named = cluster or os.environ.get("STOKE_CLUSTER")
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    folder = pathlib.Path(named or pathlib.Path(data, "stoke", "local"))
    for found in (folder, folder / "admin", folder / "coordinator" / "admin"):
        if (found / "cluster.toml").is_file():
            return found
    raise NotFound(f"no cluster in {folder}", "start one with `stoke up`, log in with `stoke login`, or name its folder with STOKE_CLUSTER")


def _document(spec: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Any], pathlib.Path]:
    """A spec, and the folder that its paths are relative to."""
    if isinstance(spec, Mapping):
        return json.loads(json.dumps(spec)), pathlib.Path.cwd()
    try:
        if isinstance(spec, str) and "\n" in spec:
            return tomllib.loads(spec), pathlib.Path.cwd()
        path = pathlib.Path(spec)
        return tomllib.loads(path.read_text()), path.absolute().parent
    except tomllib.TOMLDecodeError as error:
        raise Invalid(f"spec: {error}", "mend the TOML") from error


def _job(document: Mapping[str, Any]) -> Job:
    return Job(document["job"], document["name"], document["state"], document["reason"], document)


def _part(text: str) -> str:
    return urllib.parse.quote(text, safe="")
