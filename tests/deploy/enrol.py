"""Lets real nodes join a real coordinator by stoke-enrol, as on the machines of a cloud, and checks what else the bootstrap puts there.

The metadata services are small servers below, which insist on the headers that the clouds insist on. S3 is SeaweedFS, which checks signatures. Google's
and Azure's stores are servers below that keep objects for the right token: their APIs are as their documents say, and were not tried against the clouds.
Started by terraform.sh.
"""

import hashlib
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from xml.sax.saxutils import escape

FILES = Path(__file__).resolve().parents[2] / "terraform/modules/bootstrap/files"
STOKE = os.environ["STOKE_BIN"]
SEAWEED = os.environ["SEAWEED_BIN"]


class Server(http.server.ThreadingHTTPServer):
    """Answers by `route(method, path, query, headers, body)`, which gives (status, body)."""

    daemon_threads = True

    def __init__(self, route):
        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                path, _, query = self.path.partition("?")
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, text = route(self.command, path, dict(urllib.parse.parse_qsl(query)), self.headers, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def aws_metadata(method, path, _query, headers, _body):
    if method == "PUT" and path == "/latest/api/token" and headers["X-aws-ec2-metadata-token-ttl-seconds"]:
        return 200, b"session"
    if headers["X-aws-ec2-metadata-token"] != "session":
        return 401, b""
    answers = {
        "/latest/meta-data/instance-id": "i-0abc",
        "/latest/meta-data/iam/security-credentials/": "lab-node",
        "/latest/meta-data/iam/security-credentials/lab-node": json.dumps({"AccessKeyId": "key", "SecretAccessKey": "secret"}),
    }
    return (200, answers[path].encode()) if path in answers else (404, b"")


def google_metadata(_method, path, _query, headers, _body):
    if headers["Metadata-Flavor"] != "Google":
        return 403, b""
    answers = {
        "/computeMetadata/v1/instance/id": b"1234567890",
        "/computeMetadata/v1/instance/service-accounts/default/token": b'{"access_token": "bearer", "expires_in": 3599}',
    }
    return (200, answers[path]) if path in answers else (404, b"")


def azure_metadata(_method, path, query, headers, _body):
    if headers["Metadata"] != "true" or "api-version" not in query:
        return 400, b""
    if path == "/metadata/instance/compute/vmId" and query.get("format") == "text":
        return 200, b"0f0f0f0f-1111-2222-3333-444444444444"
    if path == "/metadata/identity/oauth2/token" and query.get("resource") == "https://storage.azure.com/" and query.get("client_id") == "client":
        return 200, b'{"access_token": "bearer"}'
    return 404, b""


class GoogleStore:
    """The JSON API of Google Cloud Storage, as far as it is asked."""

    def __init__(self):
        self.objects = {}

    def __call__(self, method, path, query, headers, body):
        if headers["Authorization"] != "Bearer bearer":
            return 401, b""
        if (method, path) == ("POST", "/upload/storage/v1/b/lab-join/o") and query.get("uploadType") == "media":
            self.objects[query["name"]] = body
            return 200, b"{}"
        if (method, path) == ("GET", "/storage/v1/b/lab-join/o"):
            names = [n for n in self.objects if n.startswith(query["prefix"])]
            return 200, json.dumps({"kind": "storage#objects", **({"items": [{"name": n} for n in names]} if names else {})}).encode()
        name = urllib.parse.unquote(path.removeprefix("/storage/v1/b/lab-join/o/"))
        if name not in self.objects:
            return 404, b"No such object"
        if method == "DELETE":
            del self.objects[name]
            return 204, b""
        return (200, self.objects[name]) if query.get("alt") == "media" else (400, b"")


class AzureStore:
    """The REST API of Azure's blob storage, as far as it is asked."""

    def __init__(self):
        self.objects = {}

    def __call__(self, method, path, query, headers, body):
        if headers["Authorization"] != "Bearer bearer" or not headers["x-ms-version"]:
            return 401, b""
        container, _, name = path.lstrip("/").partition("/")
        if query == {"restype": "container", "comp": "list"}:
            blobs = "".join(f"<Blob><Name>{escape(n)}</Name></Blob>" for c, n in self.objects if c == container)
            return 200, f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults><Blobs>{blobs}</Blobs><NextMarker /></EnumerationResults>'.encode()
        key = (container, urllib.parse.unquote(name))
        if method == "PUT":
            if headers["x-ms-blob-type"] != "BlockBlob":
                return 400, b""
            self.objects[key] = body
            return 201, b""
        if key not in self.objects:
            return 404, b"BlobNotFound"
        if method == "DELETE":
            del self.objects[key]
            return 202, b""
        return 200, self.objects[key]


class Enrolment(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.processes = []
        self.addCleanup(self.stop)
        coordinator = self.start([STOKE, "coordinator", "--dir", self.folder / "cluster", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True)
        self.address = coordinator.stdout.readline().split()[-1]

    def start(self, command, **options):
        log = open(self.folder / f"log-{len(self.processes)}", "wb")
        self.addCleanup(log.close)
        self.processes.append(subprocess.Popen(command, stderr=log, **options))
        return self.processes[-1]

    def stop(self):
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout:
                process.stdout.close()

    def until(self, what, condition, seconds=40):
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                self.fail(f"{what}: not within {seconds} s\n" + "\n".join(p.read_text() for p in sorted(self.folder.glob("log-*"))))
            time.sleep(0.2)

    def stoke(self, *arguments):
        return json.loads(subprocess.run([STOKE, "--cluster", self.folder / "cluster", "--json", *arguments], check=True, capture_output=True, text=True).stdout)

    def enrol(self, settings, node_dir="node"):
        file = self.folder / f"enrol-{node_dir}.json"
        file.write_text(json.dumps({**settings, "cluster": str(self.folder / "cluster"), "node_dir": str(self.folder / node_dir)}))
        return {**os.environ, "STOKE_ENROL": str(file), "STOKE_BIN": STOKE}

    def node(self, environment, name):
        arguments = ["--coordinator", self.address, "--name", name, "--gateway", "none", "--cpus", "1"]
        return self.start([sys.executable, FILES / "stoke-enrol", "node", *arguments], env=environment, stdout=subprocess.DEVNULL)

    def answer(self, environment):
        """One run of the timer's service."""
        return subprocess.run([sys.executable, FILES / "stoke-enrol", "coordinator"], env=environment, capture_output=True, text=True, timeout=60)

    def joins(self, settings, objects, request):
        """A node asks, is answered, joins, and comes back without a token; `objects()` names what the store holds."""
        environment = self.enrol(settings)
        self.assertEqual(self.answer(environment).returncode, 0, "nothing to answer is no fault")
        agent = self.node(environment, "first")
        self.until("the node asks", lambda: request in objects())
        run = self.answer(environment)
        self.assertEqual((run.returncode, run.stderr), (0, ""))
        self.assertNotIn(request, objects())
        self.until("the node is up", lambda: [(n["name"], n["state"]) for n in self.stoke("nodes")["nodes"]] == [("first", "up")])
        agent.terminate()
        self.assertEqual(agent.wait(20), 0)
        before = objects()
        self.node(environment, "first")
        self.until("it is back as itself", lambda: [(n["node"], n["state"]) for n in self.stoke("nodes")["nodes"]] == [("node-1", "up")])
        self.assertEqual(objects(), before, "it asked for no token")
        self.assertEqual([(t["role"], t["state"]) for t in self.stoke("token", "list")["tokens"]], [("node", "used")])
        # A machine made anew under the same name in the store waits for a token of its own, and does not take the used one.
        again = self.enrol(settings, "another")
        self.node(again, "second")
        self.until("the new machine asks", lambda: request in objects())
        self.assertEqual(self.answer(again).returncode, 0)
        self.until("it is up", lambda: sorted(n["name"] for n in self.stoke("nodes")["nodes"] if n["state"] == "up") == ["first", "second"])

    def test_on_google(self):
        store = GoogleStore()
        with Server(google_metadata) as metadata, Server(store) as objects:
            settings = {"cloud": "gcp", "bucket": "lab-join", "metadata": metadata.url, "endpoint": objects.url}
            # Names that are no names of machines are thrown away unanswered.
            store.objects["requests/../../etc"] = b"join"
            store.objects["requests/" + "x" * 200] = b"join"
            self.joins(settings, lambda: sorted(store.objects), "requests/1234567890")
            self.assertEqual(sorted(store.objects), ["tokens/1234567890"])

    def test_on_azure(self):
        store = AzureStore()
        with Server(azure_metadata) as metadata, Server(store) as objects:
            settings = {"cloud": "azure", "account": "lab", "client_id": "client", "metadata": metadata.url, "endpoint": objects.url}
            self.joins(settings, lambda: [f"{c}/{n}" for c, n in store.objects], "join-requests/0f0f0f0f-1111-2222-3333-444444444444")

    def test_on_aws_with_real_signatures(self):
        with Server(aws_metadata) as metadata:
            endpoint = self.seaweed()
            settings = {"cloud": "aws", "region": "eu-central-1", "bucket": "lab-join", "role_id": "AROAEXAMPLE", "metadata": metadata.url, "endpoint": endpoint}
            store = self.load("stoke-enrol").Aws(settings)
            self.until("the bucket is there", lambda: self.quiet(lambda: store.call("PUT", "")), 60)
            objects = lambda: sorted([f"requests/{n}" for n in store.list("requests")] + [f"tokens/{n}" for n in store.list("tokens")])
            self.joins(settings, objects, "requests/AROAEXAMPLE:i-0abc")
            with Server(lambda *call: (200, b'{"AccessKeyId": "key", "SecretAccessKey": "wrong"}') if call[1].endswith("lab-node") else aws_metadata(*call)) as wrong:
                run = self.answer(self.enrol({**settings, "metadata": wrong.url}))
                self.assertEqual(run.returncode, 1)
                self.assertIn("403", run.stderr)
                self.assertNotIn("wrong", run.stderr)

    def test_a_machine_without_a_role_is_told_so(self):
        with Server(lambda *_: (404, b"") if "iam" in _[1] else aws_metadata(*_)) as metadata:
            run = self.answer(self.enrol({"cloud": "aws", "region": "eu-central-1", "bucket": "b", "role_id": "A", "metadata": metadata.url}))
            self.assertEqual(run.returncode, 1)
            self.assertIn("has the instance a role?", run.stderr)
            self.assertNotIn("Traceback", run.stderr)

    def load(self, name):
        loader = __import__("importlib.machinery", fromlist=["x"]).SourceFileLoader(name.replace("-", "_"), str(FILES / name))
        spec = __import__("importlib.util", fromlist=["x"]).spec_from_loader(loader.name, loader)
        module = __import__("importlib.util", fromlist=["x"]).module_from_spec(spec)
        loader.exec_module(module)
        return module

    def quiet(self, call):
        try:
            call()
            return True
        except (OSError, RuntimeError):
            return False

    def seaweed(self):
        (self.folder / "s3.json").write_text(
            json.dumps({"identities": [{"name": "test", "credentials": [{"accessKey": "key", "secretKey": "secret"}], "actions": ["Admin", "Read", "Write", "List"]}]})
        )
        (self.folder / "data").mkdir()
        probes = [socket.socket() for _ in range(8)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        options = f"""-dir={self.folder / 'data'} -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.port={master} -master.port.grpc={master_grpc} -volume.port={volume}
            -volume.port.grpc={volume_grpc} -filer=true -filer.port={filer} -filer.port.grpc={filer_grpc} -s3=true -s3.port={s3} -s3.port.grpc={s3_grpc}
            -s3.config={self.folder / 's3.json'} -s3.port.iceberg=0 -s3.port.lance=0 -volume.max=20 -master.volumeSizeLimitMB=64 -master.telemetry=false
            -filer.localSocket={self.folder}/filer.sock -s3.localSocket={self.folder}/s3.sock"""
        self.start([SEAWEED, "server", *options.split()], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        return f"http://127.0.0.1:{s3}"


class Install(unittest.TestCase):
    def test_only_what_has_the_right_sum_is_installed(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", "/CN=localhost",
                            "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", folder / "ca.pem"], check=True, capture_output=True)
            binary = b"#!/bin/sh\necho stoke\n"
            # The script installs to /usr/local/bin: here to a folder of the test.
            script = folder / "stoke-install"
            script.write_text((FILES / "stoke-install").read_text().replace("/usr/local/bin", str(folder / "bin")).replace("--retry 10 ", "--retry 0 "))
            (folder / "bin").mkdir()
            with Server(lambda *_: (200, binary)) as server:
                tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                tls.load_cert_chain(folder / "ca.pem", folder / "key.pem")
                server.socket = tls.wrap_socket(server.socket, server_side=True)
                install = lambda scheme, sum: subprocess.run(
                    ["sh", script, f"{scheme}://localhost:{server.server_address[1]}/stoke", sum], env={**os.environ, "CURL_CA_BUNDLE": str(folder / "ca.pem")}, capture_output=True
                ).returncode
                self.assertNotEqual(install("https", "0" * 64), 0)
                self.assertNotEqual(install("http", hashlib.sha256(binary).hexdigest()), 0)
                self.assertEqual(list((folder / "bin").iterdir()), [])
                self.assertEqual(install("https", hashlib.sha256(binary).hexdigest()), 0)
                self.assertEqual(subprocess.run([folder / "bin/stoke"], capture_output=True, text=True).stdout, "stoke\n")
                self.assertEqual([p.name for p in (folder / "bin").iterdir()], ["stoke"])


class Documents(unittest.TestCase):
    """What cloud-init and systemd would get: rendered by Terraform into STOKE_RENDERED by terraform.sh."""

    def setUp(self):
        import yaml

        rendered = json.loads(Path(os.environ["STOKE_RENDERED"]).read_text())
        self.texts = {"coordinator": rendered["coordinator"]["value"], **{f"node {k}": v for k, v in rendered["nodes"]["value"].items()}}
        for text in self.texts.values():
            self.assertTrue(text.startswith("#cloud-config\n"))
        self.documents = {name: yaml.safe_load(text) for name, text in self.texts.items()}

    def files(self, name):
        return {f["path"]: f for f in self.documents[name]["write_files"]}

    def test_no_secret_is_in_them(self):
        for name, text in self.texts.items():
            self.assertNotIn("stoke1.", text, name)
            self.assertNotIn("PRIVATE KEY", text, name)

    def test_settings_are_such_that_the_binary_takes_them(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            # Port and addresses of this machine; the loopback is what the admin finds then.
            move = lambda text: (
                text.replace("/var/lib", str(folder)).replace("0.0.0.0:7878", "0.0.0.0:0").replace("127.0.0.1:9090", "127.0.0.1:0")
                .replace('["10.78.0.10:7878","198.51.100.7:7878"]', "[]")
            )
            (folder / "stoke.toml").write_text(move(self.files("coordinator")["/etc/stoke/stoke.toml"]["content"]))
            run = subprocess.Popen([STOKE, "coordinator", "--config", folder / "stoke.toml"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            try:
                address = run.stdout.readline().split()[-1].replace("0.0.0.0", "127.0.0.1")
                token = subprocess.run([STOKE, "--cluster", folder / "stoke/cluster", "token", "create", "--role", "node"], check=True, capture_output=True).stdout
                (folder / "node.toml").write_text(move(self.files("node steady-0")["/etc/stoke/stoke-node.toml"]["content"]).replace("10.78.0.10:7878", address))
                agent = subprocess.Popen([STOKE, "node", "--config", folder / "node.toml", "--gateway", "none", "--join", "-"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
                agent.stdin.write(token)
                agent.stdin.close()
                try:
                    labels, end = None, time.monotonic() + 30
                    while labels is None and time.monotonic() < end:
                        out = subprocess.run([STOKE, "--cluster", folder / "stoke/cluster", "--json", "nodes"], capture_output=True, text=True).stdout
                        labels = next((n["labels"] for n in json.loads(out)["nodes"] if n["state"] == "up"), None)
                    self.assertEqual({k: labels[k] for k in ("group", "gpu", "rack")}, {"group": "steady", "gpu": "false", "rack": "a"})
                finally:
                    agent.terminate()
                    agent.wait(20)
            finally:
                run.terminate()
                self.assertEqual(run.wait(20), 0)
                run.stdout.close()

    @unittest.skipUnless(shutil.which("systemd-analyze"), "no systemd here")
    def test_units_are_such_that_systemd_takes_them(self):
        with tempfile.TemporaryDirectory() as folder:
            for name in self.documents:
                for path, file in self.files(name).items():
                    if path.endswith((".service", ".timer")):
                        # Programs that are not on this machine.
                        text = file["content"].replace("/usr/local/bin/stoke-enrol", "/bin/true").replace("/usr/local/bin/stoke", "/bin/true").replace("User=stoke", "User=root")
                        (Path(folder) / Path(path).name).write_text(text)
            units = sorted(str(p) for p in Path(folder).iterdir())
            self.assertEqual(len(units), 4)
            run = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, env={**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:"})
            ours = [line for line in run.stderr.splitlines() if "stoke" in line]
            self.assertEqual((ours, run.returncode), ([], 0), run.stderr)

    def test_nodes_differ_in_what_they_should(self):
        self.assertEqual(sorted(self.documents), ["coordinator", "node gpu-0", "node steady-0", "node steady-1"])
        self.assertIn("https://example.org/stoke-cuda", str(self.documents["node gpu-0"]["runcmd"]))
        self.assertIn("https://example.org/stoke'", str(self.documents["node steady-0"]["runcmd"]))
        self.assertNotIn("/etc/stoke/stoke.toml", self.files("node steady-0"))
        self.assertNotIn("/etc/systemd/system/stoke-node.service", self.files("coordinator"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
