"""Renders the chart and the overlays, checks what they say, and drives the scripts of the pods against a real coordinator.

There is no API server here: manifests are checked against Kubernetes' own schemas (kubernetes-validate --strict, three versions), and the script that makes
join tokens runs against a small server below that keeps pods and one Secret, with the real `stoke` behind it. Started by kubernetes.sh.
"""

import base64
import copy
import glob
import http.server
import json
import os
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
from pathlib import Path

import helm_python as helm
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "kubernetes"
CHART = KUBERNETES / "helm" / "stoke"
ONE_POOL = {"pools": {"cpu": {}}}
OVERLAYS = ["cpu", "nvidia", "dev"]
# The oldest that the chart allows, one between, and the newest that the validator knows.
VERSIONS = ["1.27", "1.31", "1.37"]
# Kinds that Kubernetes itself does not have.
FOREIGN = {"ServiceMonitor", "WorkflowTemplate"}
STOKE = os.environ["STOKE_BIN"]


def values_of(name):
    return yaml.safe_load((CHART / "examples" / f"{name}.yaml").read_text())


def render(values, name="stoke", namespace="stoke"):
    """The documents of a release, by (kind, name)."""
    rendered = helm.Chart.load(CHART).render(values, name=name, namespace=namespace)
    documents = [d for path, text in sorted(rendered.items()) if path.endswith(".yaml") for d in yaml.safe_load_all(text) if d]
    return {(d["kind"], d["metadata"]["name"]): d for d in documents}


def pods(documents):
    return [(key, d["spec"]["template"]) for key, d in documents.items() if d["kind"] in ("StatefulSet", "DaemonSet", "Deployment")]


def kustomize(folder):
    text = subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout
    return {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(text)}


def plain(document):
    """A document of the chart without what marks it as Helm's."""
    document = copy.deepcopy(document)
    labels = document["metadata"].get("labels", {})
    labels.pop("helm.sh/chart", None)
    labels.pop("app.kubernetes.io/managed-by", None)
    for key in [k for k in document["metadata"].get("annotations", {}) if k.startswith("helm.sh/")]:
        del document["metadata"]["annotations"][key]
    if not document["metadata"].get("annotations", True):
        del document["metadata"]["annotations"]
    document["metadata"].pop("namespace", None)
    return document


def generated():
    """What stands in the folders of Kustomize, by file: the chart's defaults without pools, and a pool for each overlay."""
    header = "# Written by `tests/deploy/kubernetes.sh --write` from the Helm chart. Do not edit.\n"
    pool_kinds = lambda d: "stoke/pool" in d["metadata"].get("labels", {})
    dump = lambda documents: header + yaml.safe_dump_all([plain(d) for d in documents], sort_keys=False, width=150)
    files = {"base/stoke.yaml": dump([d for d in render({}).values() if not pool_kinds(d)])}
    for overlay in OVERLAYS:
        values = yaml.safe_load((KUBERNETES / "kustomize/overlays" / overlay / "values.yaml").read_text())
        files[f"overlays/{overlay}/pool.yaml"] = dump([d for d in render(values).values() if pool_kinds(d)])
    return files


class Chart(unittest.TestCase):
    def test_lint_is_clean(self):
        for name in [None, "cpu", "nvidia", "dev"]:
            report = helm.lint(CHART, values_of(name) if name else {}, strict=True)
            bad = [m for m in report["messages"] if m["severity"] >= 2]
            self.assertEqual((bad, report["errors"]), ([], []), name)

    def test_every_document_is_one_of_kubernetes(self):
        for name in [None, "cpu", "nvidia", "dev"]:
            documents = render(values_of(name) if name else {})
            self.assertGreater(len(documents), 10)
            for document in documents.values():
                validate(self, document)
        with self.assertRaises(kubernetes_validate.ValidationError):
            broken = copy.deepcopy(documents[("Service", "stoke-nodes")])
            broken["spec"]["selektor"] = {}
            kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)

    def test_a_release_of_another_name_and_namespace_has_its_own_names(self):
        documents = render(ONE_POOL, name="blue", namespace="ml")
        self.assertIn(("StatefulSet", "blue-stoke-coordinator"), documents)
        config = documents[("ConfigMap", "blue-stoke-coordinator")]["data"]["stoke.toml"]
        self.assertIn('"blue-stoke-coordinator.ml.svc:7878"', config)
        self.assertNotIn("stoke-coordinator.stoke", json.dumps(list(documents.values())))

    def test_pods_keep_the_restricted_standard(self):
        for name in ["cpu", "nvidia", "dev"]:
            for key, pod in pods(render(values_of(name))):
                restricted(self, key, pod["spec"])

    def test_bad_values_are_refused(self):
        bad = [
            {"unknown": 1},
            {"image": {"tagg": "x"}},
            {"image": {"digest": "sha256:short"}},
            {"pools": {"Bad_Name": {}}},
            {"pools": {"coordinator": {}}},
            {"pools": {"cpu": {"replicas": -1}}},
            {"pools": {"cpu": {"memory": "8GB"}}},
            {"pools": {"cpu": {"gpus": "1"}}},
            {"pools": {"cpu": {"kind": "Deployment"}}},
            {"pools": {"cpu": {"maxUnavailable": 0}}},
            {"checkpoints": {"uri": "/mnt"}},
            {"checkpoints": {"uri": "file:///checkpoints", "claim": {"create": False}}},
            {"coordinator": {"replicas": 2}},
            {"coordinator": {"otlp": "tempo:4317"}},
            {"coordinator": {"external": {"enabled": True}}},
            {"coordinator": {"external": {"enabled": True, "address": "a.example.org:7878"}}},
            {"gateway": {"enabled": True}},
            {"networkPolicy": {"enabled": "yes"}},
        ]
        for values in bad:
            with self.assertRaises(helm.HelmError, msg=str(values)):
                render(values)

    def test_traces_go_to_a_collector_that_is_named_and_the_way_to_it_is_open(self):
        for otlp in ["", "http://tempo.monitoring:4318"]:
            documents = render({"coordinator": {"otlp": otlp}})
            config = documents[("ConfigMap", "stoke-coordinator")]["data"]["stoke.toml"]
            self.assertEqual(f'otlp = "{otlp}"' in config, bool(otlp))
            egress = documents[("NetworkPolicy", "stoke-coordinator")]["spec"]["egress"]
            self.assertEqual({"ports": [{"protocol": "TCP", "port": 4318}]} in egress, bool(otlp))

    def test_only_the_needed_ports_are_open(self):
        documents = render(values_of("nvidia"))
        services = {name: [(p["protocol"], p["port"]) for p in d["spec"].get("ports", [])] for (kind, name), d in documents.items() if kind == "Service"}
        self.assertEqual(
            services,
            {
                "stoke-coordinator": [("UDP", 7878), ("TCP", 9090)],
                "stoke-coordinator-external": [("UDP", 7878)],
                "stoke-nodes": [],
                "stoke-gateway": [("TCP", 8400)],
            },
        )
        self.assertEqual(documents[("Service", "stoke-coordinator-external")]["spec"]["loadBalancerSourceRanges"], ["203.0.113.0/24"])
        coordinator = documents[("NetworkPolicy", "stoke-coordinator")]["spec"]
        self.assertEqual([rule["ports"] for rule in coordinator["ingress"]], [[{"protocol": "UDP", "port": 7878}]])
        self.assertIn({"ipBlock": {"cidr": "203.0.113.0/24"}}, coordinator["ingress"][0]["from"])
        nodes = documents[("NetworkPolicy", "stoke-nodes")]["spec"]
        self.assertEqual(nodes["policyTypes"], ["Ingress", "Egress"])
        self.assertEqual([(p["protocol"], p["port"]) for rule in nodes["ingress"] for p in rule["ports"]], [("UDP", 1024), ("TCP", 1024), ("TCP", 8400)])
        # Between nodes, and in both directions: UDP for ranks, TCP for the commands of jobs with [exec].
        node = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "stoke", "app.kubernetes.io/instance": "stoke", "app.kubernetes.io/component": "node"}}}
        free = [{"protocol": protocol, "port": 1024, "endPort": 65535} for protocol in ("UDP", "TCP")]
        self.assertEqual(nodes["podSelector"], node["podSelector"])
        self.assertEqual([rule for rule in nodes["ingress"] if rule["ports"][0]["port"] == 1024], [{"from": [node], "ports": free}])
        self.assertEqual([rule for rule in nodes["egress"] if rule["ports"][0]["port"] == 1024], [{"to": [node], "ports": free}])
        for rule in coordinator["ingress"] + nodes["ingress"]:
            self.assertTrue(rule["from"], "a rule without peers lets everybody in")
        closed = render(ONE_POOL)
        self.assertNotIn(("Service", "stoke-gateway"), closed)
        self.assertEqual(len(closed[("NetworkPolicy", "stoke-nodes")]["spec"]["ingress"]), 1)
        self.assertEqual(len(render(values_of("cpu"))[("NetworkPolicy", "stoke-coordinator")]["spec"]["ingress"]), 2)

    def test_gpu_pools_ask_for_gpus_and_others_do_not(self):
        pod = render(values_of("nvidia"))[("DaemonSet", "stoke-gpu")]["spec"]["template"]["spec"]
        node = pod["containers"][0]
        self.assertEqual(node["resources"]["limits"]["nvidia.com/gpu"], "1")
        self.assertEqual((pod["runtimeClassName"], pod["nodeSelector"], pod["tolerations"][0]["key"]), ("nvidia", {"nvidia.com/gpu.present": "true"}, "nvidia.com/gpu"))
        self.assertTrue(node["image"].startswith("registry.example.org/stoke-cuda@sha256:"))
        self.assertEqual(node["resources"]["limits"]["memory"], f"{(48 + 8) * 1024 + 512}Mi")
        self.assertIn("--label=gpu=l4", node["args"])
        for _, pod in pods(render(values_of("cpu"))):
            self.assertNotIn("nvidia.com/gpu", json.dumps(pod))

    def test_rights_are_pods_and_one_secret(self):
        documents = render(ONE_POOL)
        roles = [d for (kind, _), d in documents.items() if kind in ("Role", "ClusterRole")]
        self.assertEqual(
            [d["rules"] for d in roles],
            [[
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]},
                {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["stoke-join"], "verbs": ["get", "patch"]},
            ]],
        )
        self.assertNotIn("data", documents[("Secret", "stoke-join")])
        mounts = {c["name"]: [m["name"] for m in c["volumeMounts"]] for c in documents[("StatefulSet", "stoke-coordinator")]["spec"]["template"]["spec"]["containers"]}
        self.assertIn("account", mounts["join-tokens"])
        self.assertNotIn("account", mounts["coordinator"])

    def test_a_pod_that_ends_has_time_to_be_drained(self):
        documents = render({"pools": {"cpu": {"drainSeconds": 300}}})
        pod = documents[("StatefulSet", "stoke-cpu")]["spec"]["template"]["spec"]
        self.assertEqual(pod["terminationGracePeriodSeconds"], 330)
        self.assertEqual(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"], ["stoke-ranks-gone", "300"])
        sidecar = documents[("StatefulSet", "stoke-coordinator")]["spec"]["template"]["spec"]["containers"][1]
        self.assertIn({"name": "STOKE_DRAIN_DEADLINE", "value": "300s"}, sidecar["env"])

    def test_settings_are_such_that_the_coordinator_takes_them(self):
        for name in ["cpu", "nvidia"]:
            config = render(values_of(name))[("ConfigMap", "stoke-coordinator")]["data"]["stoke.toml"]
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "stoke.toml"
                file.write_text(config.replace("/var/lib/stoke", folder).replace("0.0.0.0:7878", "127.0.0.1:0").replace("0.0.0.0:9090", "127.0.0.1:0"))
                run = subprocess.Popen([STOKE, "coordinator", "--config", file], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                try:
                    self.assertIn("coordinator listens", run.stdout.readline())
                finally:
                    run.terminate()
                    self.assertEqual(run.wait(20), 0)
                    run.stdout.close()


class Overlays(unittest.TestCase):
    def test_files_are_what_the_chart_gives(self):
        for name, text in generated().items():
            self.assertEqual((KUBERNETES / "kustomize" / name).read_text(), text, f"{name}: run tests/deploy/kubernetes.sh --write")

    def test_every_document_is_one_of_kubernetes_and_restricted(self):
        for overlay in OVERLAYS:
            documents = kustomize(KUBERNETES / "kustomize/overlays" / overlay)
            for document in documents.values():
                validate(self, document)
            for key, pod in pods(documents):
                restricted(self, key, pod["spec"])
            self.assertEqual(documents[("Namespace", "stoke")]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"], "restricted")
            self.assertEqual({d["metadata"].get("namespace", "stoke") for d in documents.values()}, {"stoke"})

    def test_each_overlay_has_its_pool_and_image(self):
        cpu = kustomize(KUBERNETES / "kustomize/overlays/cpu")
        self.assertEqual(cpu[("StatefulSet", "stoke-cpu")]["spec"]["replicas"], 4)
        gpu = kustomize(KUBERNETES / "kustomize/overlays/nvidia")
        node = gpu[("DaemonSet", "stoke-gpu")]["spec"]["template"]["spec"]["containers"][0]
        self.assertEqual((node["image"], node["resources"]["limits"]["nvidia.com/gpu"]), ("registry.example.org/stoke-cuda:0.1.0", "1"))
        dev = kustomize(KUBERNETES / "kustomize/overlays/dev")
        self.assertEqual(dev[("PersistentVolumeClaim", "stoke-checkpoints")]["spec"]["accessModes"], ["ReadWriteOnce"])
        images = {c["image"] for _, pod in pods(dev) for c in pod["spec"]["containers"]}
        self.assertEqual(images, {"stoke:dev"})
        for documents in (cpu, gpu, dev):
            self.assertEqual(len([1 for kind, _ in documents if kind == "PodDisruptionBudget"]), 1)


class Tokens(unittest.TestCase):
    """The script of the coordinator's pod, against a server that speaks as much of Kubernetes as it asks for."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.api = self.enterContext(ApiServer(self.folder))
        self.processes = []
        self.addCleanup(self.stop)
        self.cluster = self.folder / "cluster"
        coordinator = self.start([STOKE, "coordinator", "--dir", self.cluster, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True)
        self.address = coordinator.stdout.readline().split()[-1]
        bin_folder = self.folder / "bin"
        bin_folder.mkdir()
        (bin_folder / "stoke").symlink_to(STOKE)
        self.environment = {
            **os.environ,
            "PATH": f"{bin_folder}:{KUBERNETES / 'image'}:{os.environ['PATH']}",
            "STOKE_CLUSTER": str(self.cluster),
            "STOKE_PODS": "app.kubernetes.io/instance=stoke,app.kubernetes.io/component=node",
            "STOKE_NODE_PREFIX": "stoke-",
            "STOKE_SECRET": "stoke-join",
            "STOKE_DRAIN_DEADLINE": "5s",
            "STOKE_SERVICE_ACCOUNT": str(self.folder / "account"),
            "STOKE_WORK": str(self.folder / "work"),
            "KUBERNETES_SERVICE_HOST": "localhost",
            "KUBERNETES_SERVICE_PORT": str(self.api.port),
        }
        self.script = self.start(["stoke-join-tokens"], env=self.environment)

    def start(self, command, **options):
        log = open(self.folder / f"log-{len(self.processes)}", "wb")
        self.addCleanup(log.close)
        self.processes.append(subprocess.Popen(command, stderr=log, start_new_session=True, **options))
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

    def nodes(self):
        out = subprocess.run([STOKE, "--cluster", self.cluster, "--json", "nodes"], check=True, capture_output=True, text=True).stdout
        return sorted((n["name"], n["state"]) for n in json.loads(out)["nodes"])

    def until(self, what, condition, seconds=120):
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(p.read_text() for p in sorted(self.folder.glob("log-*")))
                self.fail(f"{what}: not within {seconds} s; nodes {self.nodes()}, secret {self.api.secret}\n{logs}")
            time.sleep(0.1)

    def agent(self, pod, folder):
        """What the pod of a node runs; the kubelet's part is to write the Secret's keys as files."""
        token = self.folder / f"mounted-{pod}"
        self.until(f"token of {pod}", lambda: pod in self.api.secret)
        token.write_bytes(base64.b64decode(self.api.secret[pod]))
        command = ["stoke-join", token, self.folder / folder, "--coordinator", self.address, "--name", pod, "--gateway", "none", "--cpus", "1"]
        return self.start(command, env=self.environment)

    def test_pods_get_tokens_of_their_own_and_nodes_of_pods_that_are_gone_go(self):
        self.api.put("stoke-cpu-0", "u0")
        self.api.put("stoke-cpu-1", "u1")
        first = self.agent("stoke-cpu-0", "n0")
        self.agent("stoke-cpu-1", "n1")
        self.assertNotEqual(self.api.secret["stoke-cpu-0"], self.api.secret["stoke-cpu-1"])
        self.until("both are up", lambda: self.nodes() == [("stoke-cpu-0", "up"), ("stoke-cpu-1", "up")])
        for pod in ("stoke-cpu-0", "stoke-cpu-1"):
            self.api.put(pod, f"u{pod[-1]}", ready=True)
        self.until("no token is left", lambda: not self.api.secret)
        # A pod that is deleted is drained before its agent ends; then another pod of the name comes, and its node takes the old one's place.
        self.api.put("stoke-cpu-0", "u0", ready=True, deleted=True)
        self.until("it is drained", lambda: ("stoke-cpu-0", "drained") in self.nodes())
        first.terminate()
        self.assertEqual(first.wait(20), 0)
        self.api.delete("stoke-cpu-0")
        self.api.put("stoke-cpu-0", "u2")
        self.agent("stoke-cpu-0", "n2")
        self.api.put("stoke-cpu-0", "u2", ready=True)
        self.until("the new one is there", lambda: ("stoke-cpu-0", "up") in self.nodes())
        # Any event is a reason to look again, as the end of a watch is.
        self.until("the old one is removed", lambda: (self.api.touch(), sorted(self.nodes()) == [("stoke-cpu-0", "up"), ("stoke-cpu-1", "up")])[1])
        self.assertIsNone(self.script.poll())
        self.assertEqual(self.api.refused, [])
        self.script.terminate()
        self.assertEqual(self.script.wait(20), 0)


class ApiServer:
    """Pods and one Secret over HTTPS: list, watch, get and merge-patch, for one bearer token. Anything else is noted as refused."""

    def __init__(self, folder):
        account = folder / "account"
        account.mkdir()
        (account / "token").write_text("secret-of-the-account")
        (account / "namespace").write_text("stoke")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1", "-subj", "/CN=localhost",
                        "-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", account / "ca.crt"], check=True, capture_output=True)
        self.pods, self.secret, self.refused, self.version = {}, {}, [], 1
        self.changed = threading.Condition()
        self.closing = False
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                api.answer(self, None)

            def do_PATCH(self):
                api.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(account / "ca.crt", folder / "key.pem")
        self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.server.shutdown()
        self.server.server_close()

    def put(self, name, uid, ready=False, deleted=False):
        metadata = {"name": name, "uid": uid, **({"deletionTimestamp": "2026-01-01T00:00:00Z"} if deleted else {})}
        self.change(lambda: self.pods.update({name: {"metadata": metadata, "status": {"conditions": [{"type": "Ready", "status": str(ready)}]}}}))

    def delete(self, name):
        self.change(lambda: self.pods.pop(name))

    def touch(self):
        self.change(lambda: None)

    def change(self, how):
        with self.changed:
            how()
            self.version += 1
            self.changed.notify_all()

    def answer(self, request, body):
        path, _, query = request.path.partition("?")
        known = {"/api/v1/namespaces/stoke/pods": "pods", "/api/v1/namespaces/stoke/secrets/stoke-join": "secret"}.get(path)
        query = urllib.parse.parse_qs(query)
        selected = query.get("labelSelector") == ["app.kubernetes.io/instance=stoke,app.kubernetes.io/component=node"]
        allowed = request.headers["Authorization"] == "Bearer secret-of-the-account" and (known == "secret" or known == "pods" and selected and body is None)
        if not allowed:
            self.refused.append((request.command, request.path))
            request.send_error(403)
            return
        if "watch" in query:
            self.watch(request, int(query["resourceVersion"][0]))
            return
        with self.changed:
            if body is not None:
                # RFC 7396: null takes a key away.
                for key, value in body["data"].items():
                    self.secret.pop(key, None) if value is None else self.secret.update({key: value})
            document = {"data": self.secret} if known == "secret" else {"metadata": {"resourceVersion": str(self.version)}, "items": list(self.pods.values())}
            text = json.dumps(document).encode()
        request.send_response(200)
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def watch(self, request, seen):
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.version > seen or self.closing)
                    if self.closing:
                        return
                    seen = self.version
                request.wfile.write(b'{"type":"MODIFIED"}\n')
                request.wfile.flush()
        except OSError:
            pass


class Argo(unittest.TestCase):
    """The script of the workflow, with its parameters put in as Argo does, against a real cluster."""

    def setUp(self):
        documents = list(yaml.safe_load_all((KUBERNETES / "argo/train.yaml").read_text()))
        for document in documents:
            if document["kind"] not in FOREIGN:
                validate(self, document)
        self.template = documents[-1]
        self.templates = {t["name"]: t for t in self.template["spec"]["templates"]}

    def test_references_are_whole_and_pods_are_restricted(self):
        spec = self.template["spec"]
        self.assertIn(spec["entrypoint"], self.templates)
        self.assertIn(spec["onExit"], self.templates)
        parameters = {p["name"] for p in spec["arguments"]["parameters"]}
        for name in ("train", "cancel"):
            script = self.templates[name]["script"]
            for variable in script["env"]:
                for reference in [v.split("}}")[0] for v in variable["value"].split("{{")[1:]]:
                    self.assertIn(reference, {"workflow.uid", *(f"workflow.parameters.{p}" for p in parameters)})
            restricted(self, name, {"securityContext": spec["securityContext"], "containers": [script]})

    def test_a_workflow_trains_once_hands_on_its_result_and_cancels(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            cluster = folder / "local"
            subprocess.run([STOKE, "up", "--cluster", cluster, "--nodes", "1"], check=True, capture_output=True)
            try:
                token = subprocess.run([STOKE, "--cluster", cluster, "token", "create", "--role", "submitter"], check=True, capture_output=True, text=True).stdout
                address = json.loads(subprocess.run([STOKE, "--cluster", cluster, "up", "--json"], capture_output=True, text=True).stdout or "{}").get("address")
                address = address or self.address_of(cluster)
                subprocess.run([STOKE, "--cluster", folder / "credentials", "login", "--join", "-", "--coordinator", address], input=token, text=True, check=True, capture_output=True)
                (folder / "bin").mkdir()
                (folder / "bin/stoke").symlink_to(STOKE)
                spec = (ROOT / "jobs/specs/digits.toml").read_text().replace("../data", str(ROOT / "jobs/data"))
                parameters = {"spec": spec, "ranks": "1", "sets": "train.steps=5\ncheckpoint.every=5"}
                results = [self.run_script("train", folder / f"work{i}", folder, parameters, "uid-1") for i in range(2)]
                self.assertEqual(results[0], results[1], "the second pod gets the first one's job")
                self.assertEqual(results[0]["job"], "job-1")
                self.assertRegex(results[0]["weights"], "^[0-9a-f]{64}$")
                self.assertIn("step-00000005", results[0]["checkpoint"])
                # Eight ranks of four processors have no room: the job waits, and is cancelled.
                waits = {**parameters, "ranks": "8", "sets": "resources.cpus=4"}
                job = self.run_script("cancel", folder / "work3", folder, waits, "uid-2")["job"]
                state = subprocess.run([STOKE, "--cluster", cluster, "--json", "status", job], check=True, capture_output=True, text=True).stdout
                self.assertIn("cancelled", state)
                self.assertEqual(self.run_script("cancel", folder / "work4", folder, parameters, "uid-1")["job"], "job-1")
            finally:
                subprocess.run([STOKE, "down", "--cluster", cluster], check=True, capture_output=True)

    def address_of(self, cluster):
        for file in glob.glob(f"{cluster}/**/cluster.toml", recursive=True):
            for line in Path(file).read_text().splitlines():
                if "127.0.0.1:" in line:
                    return line.split('"')[1]
        self.fail("no address of the cluster")

    def run_script(self, name, work, folder, parameters, uid):
        script = self.templates[name]["script"]
        put_in = {"workflow.uid": uid, **{f"workflow.parameters.{k}": v for k, v in parameters.items()}}
        environment = {}
        for variable in script["env"]:
            value = variable["value"]
            for key, text in put_in.items():
                value = value.replace("{{" + key + "}}", text)
            environment[variable["name"]] = value
        environment |= {"WORK": str(work), "CREDENTIALS": str(folder / "credentials"), "PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(folder)}
        work.mkdir()
        run = subprocess.run(script["command"], input=script["source"], env=environment, capture_output=True, text=True, timeout=300)
        self.assertEqual(run.returncode, 0, run.stderr)
        return {p.name: p.read_text() for p in work.iterdir() if p.name in ("job", "checkpoint", "weights")}


def validate(test, document):
    if document["kind"] in FOREIGN:
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            test.fail(f"{document['kind']} {document['metadata']['name']}, Kubernetes {version}: {'/'.join(map(str, error.path))}: {error.message}")


def restricted(test, key, pod):
    """The rules of Kubernetes' restricted pod security standard, and a read-only root file system."""
    security = pod["securityContext"]
    test.assertTrue(security["runAsNonRoot"], key)
    test.assertGreater(security["runAsUser"], 0, key)
    test.assertEqual(security["seccompProfile"], {"type": "RuntimeDefault"}, key)
    test.assertFalse({"hostNetwork", "hostPID", "hostIPC"} & set(pod), key)
    for volume in pod.get("volumes", []):
        kinds = set(volume) - {"name"}
        test.assertLessEqual(kinds, {"configMap", "emptyDir", "projected", "secret", "persistentVolumeClaim", "downwardAPI", "csi", "ephemeral"}, key)
    for container in pod["containers"] + pod.get("initContainers", []):
        test.assertEqual(
            container["securityContext"],
            {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
            (key, container.get("name")),
        )
        test.assertIn("memory", container["resources"]["limits"], key)
        test.assertFalse(any("hostPort" in port for port in container.get("ports", [])), key)


def main():
    if sys.argv[1:] == ["--write"]:
        for name, text in generated().items():
            (KUBERNETES / "kustomize" / name).write_text(text)
            print(f"written: kubernetes/kustomize/{name}")
        return
    unittest.main(verbosity=2)


if __name__ == "__main__":
    main()
