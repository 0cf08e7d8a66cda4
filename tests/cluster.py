"""A Kubernetes API server as far as the launcher speaks to it, over real HTTPS; its Pods are sphere processes."""

from __future__ import annotations

import contextlib
import json
import secrets
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

NAMESPACE, DEPLOYMENT, TOKEN = "train", "armillary-sphere", "a-token"
SCALE = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{DEPLOYMENT}/scale"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods/"
#: what Kubernetes makes names of
LETTERS = "bcdfghjklmnpqrstvwxz2456789"
COST = "controller.kubernetes.io/pod-deletion-cost"


class Cluster:
    """Mutable state, under a lock: the Deployment's replicas and version, the Pods, and what was asked."""

    def __init__(self, folder: Path, replicas: int = 0) -> None:
        self.account = folder / "account"
        self.account.mkdir()
        key, certificate = folder / "key.pem", self.account / "ca.crt"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=kubernetes",
             "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate],
            check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        (self.account / "namespace").write_text(NAMESPACE)
        (self.account / "token").write_text(TOKEN + "\n")
        self.lock = threading.RLock()
        self.version, self.replicas = 1, replicas
        #: Pod -> deletion cost
        self.pods: dict[str, int] = {}
        self.asked: list[str] = []
        #: verb and resource that the Role leaves out
        self.forbidden: set[str] = set()
        #: changes by others that come between the next reads and writes
        self.meddlers = 0
        #: address of control, once spheres are to run
        self.control = ""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._over = threading.Event()
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer()

            def do_PATCH(self) -> None:
                self._answer()

            def _answer(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
                with cluster.lock:
                    code, answer = cluster.handle(self.command, self.path, dict(self.headers), body)
                data = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self._threads = [threading.Thread(target=self.server.serve_forever), threading.Thread(target=self._kubelet)]
        for thread in self._threads:
            thread.start()

    def set_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this process one of its Pods."""
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(self.server.server_port))
        monkeypatch.setattr("control.launcher_kubernetes._ACCOUNT", self.account)

    def close(self) -> None:
        self._over.set()
        self.server.shutdown()
        self.server.server_close()
        for thread in self._threads:
            thread.join(10)
        for process in self._processes.values():
            process.kill()
            process.wait()

    # ---- the API

    def handle(self, method: str, path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, Any]]:
        self.asked.append(f"{method} {path}")
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return _status(401, "Unauthorized")
        resource = "deployments/scale" if path.endswith("/scale") else "pods"
        if f"{method} {resource}" in self.forbidden:
            return _status(403, f'User "system:serviceaccount:train:default" cannot {method.lower()} {resource}')
        if method == "PATCH" and headers.get("Content-Type") != "application/merge-patch+json":
            return _status(415, "the body of the request was in an unknown format")
        if path == SCALE:
            return self._scale(body) if method == "PATCH" else (200, self._scale_object())
        pod = path.removeprefix(PODS)
        if not path.startswith(PODS) or pod not in self.pods:
            return _status(404, f"{path} not found")
        if method == "PATCH":
            self.pods[pod] = int(body["metadata"]["annotations"][COST])
        return 200, {"metadata": {"name": pod, "annotations": {COST: str(self.pods[pod])}}}

    def _scale_object(self) -> dict[str, Any]:
        # as the real one: a number that is 0 is left out
        spec = {"replicas": self.replicas} if self.replicas else {}
        found = {"kind": "Scale", "metadata": {"resourceVersion": str(self.version)}, "spec": spec}
        if self.meddlers:
            self.meddlers -= 1
            self.version, self.replicas = self.version + 1, self.replicas + 1
        return found

    def _scale(self, body: Any) -> tuple[int, dict[str, Any]]:
        if body["metadata"]["resourceVersion"] != str(self.version):
            return _status(409, "the object has been modified")
        self.version, self.replicas = self.version + 1, body["spec"]["replicas"]
        self.reconcile()
        return 200, self._scale_object()

    def reconcile(self) -> None:
        """Have as many Pods as there should be: the dearest stay."""
        while len(self.pods) < self.replicas:
            self.pods[f"{DEPLOYMENT}-5d9c7b6f4-{''.join(secrets.choice(LETTERS) for _ in range(5))}"] = 0
        while len(self.pods) > self.replicas:
            del self.pods[min(self.pods, key=lambda pod: self.pods[pod])]

    # ---- the Pods

    def _kubelet(self) -> None:
        """Start the process of each Pod, again where it has ended, and end those whose Pod is gone."""
        while not self._over.wait(0.05):
            with self.lock:
                pods, control = set(self.pods), self.control
            for pod in pods if control else ():
                if pod not in self._processes or self._processes[pod].poll() is not None:
                    command = ["start", "--control", control, "--host", pod, "--orphan-timeout", "10s"]
                    self._processes[pod] = subprocess.Popen(
                        [sys.executable, "-m", "spheres", *command],
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        start_new_session=True,
                    )
            for pod in self._processes.keys() - pods:
                with contextlib.suppress(ProcessLookupError):
                    self._processes[pod].terminate()


def _status(code: int, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "status": "Failure", "message": message, "code": code}
