"""The launcher ``kubernetes``: the spheres are a Deployment in control's own namespace; this one scales it.

That Pods are placed, started again and moved is Kubernetes' work. The few calls that are needed go to the API server
over HTTPS with what every Pod has for that: the token and the certificate of its service account.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from control.config import RunConfig
from control.lives import RunFacts, Started
from spheres.errors import ArmillaryError, ConfigError, UnreachableError
from spheres.exposure import is_loopback

__all__ = ["ApiServer", "KubernetesSpheres", "kubernetes_launcher"]

log = logging.getLogger(__name__)

#: what Kubernetes mounts into every Pod that may talk to the API server
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: seconds for one call
_CALL_SECONDS = 10.0
#: tries of a change that others make at the same time
_TRIES = 5
#: of Pods: the lower, the sooner it goes when the Deployment shrinks; who is not marked counts as 0
_COST = "controller.kubernetes.io/pod-deletion-cost"
#: of the parts of a Pod's name that Kubernetes makes: no vowels, so that they are no words
_LETTER = "[bcdfghjklmnpqrstvwxz2456789]"
#: characters of a Pod's name before its own five; a longer name is cut
_BASE_LENGTH = 58


def kubernetes_launcher(config: RunConfig) -> Callable[[RunFacts], KubernetesSpheres]:
    """Return what makes the launcher. Raises ConfigError outside of a Pod, or where Pods could not reach control."""
    assert config.kubernetes_deployment is not None
    if is_loopback(config.listen.rpartition(":")[0]):
        raise ConfigError(
            f"control listens on {config.listen}, which no other Pod can reach: "
            "give --listen 0.0.0.0:7070 and --insecure"
        )
    api = ApiServer(_ACCOUNT)
    return lambda facts: KubernetesSpheres(api, config.kubernetes_deployment or "")


class ApiServer:
    """The API server as a Pod sees it. Keeps nothing but where it is: tokens are renewed while Pods live."""

    def __init__(self, account: Path) -> None:
        """Raises ConfigError where this is no Pod with a service account."""
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
        try:
            self.namespace = (account / "namespace").read_text(encoding="utf-8").strip()
            self._tls = ssl.create_default_context(cafile=str(account / "ca.crt"))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"the launcher kubernetes works in a Pod that has a service account's token and certificate "
                f"(automountServiceAccountToken); {account}: {error.strerror or error}"
            ) from None
        # since Python 3.13 certificates must name their key's issuer; those of many clusters do not
        self._tls.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if not host or not port:
            raise ConfigError("the launcher kubernetes works in a Pod: KUBERNETES_SERVICE_HOST and _PORT are not set")
        self._account, self._url = account, f"https://{f'[{host}]' if ':' in host else host}:{port}"
        handler = urllib.request.HTTPSHandler(context=self._tls)
        # a proxy of the environment is for the web, not for the cluster's own server
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), handler)

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """Return the answer's JSON.

        Raises ConfigError where the call is not allowed or its object not there, _ConflictError, UnreachableError.
        """
        return await asyncio.to_thread(self._call, method, path, body)

    def _call(self, method: str, path: str, body: object) -> Any:
        try:
            token = (self._account / "token").read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"the service account's token cannot be read: {error.strerror}") from None
        request = urllib.request.Request(
            self._url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={
                "Authorization": f"Bearer {token}",
                "Accept": "application/json",
                "Content-Type": "application/merge-patch+json",
            },
        )
        try:
            with self._opener.open(request, timeout=_CALL_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                said = _message(error.read())
            raise _meant(error.code, method, path, said) from None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise UnreachableError(f"the API server at {self._url} cannot be asked: {reason}") from None
        except ValueError as error:
            raise ArmillaryError(
                f"the API server at {self._url} answered {method} {path} with no JSON: {error}"
            ) from None


class _ConflictError(ArmillaryError):
    """Somebody else has changed the object since it was read."""


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def _meant(code: int, method: str, path: str, said: str) -> ArmillaryError:
    """Return the error that an HTTP status means, with what to do."""
    words = path.split("/")
    # .../namespaces/NAMESPACE/RESOURCE/NAME[/SUBRESOURCE]
    namespace, resource, name, *sub = words[words.index("namespaces") + 1 :]
    full, verb = "/".join([resource, *sub]), method.lower()
    if code == 401:
        return ConfigError(f"the API server does not know this Pod's service account ({said or 'unauthorized'})")
    if code == 403:
        return ConfigError(
            f"this Pod's service account may not {verb} {full} in namespace {namespace}: its Role needs "
            f"get and patch on {full} (docs/operations.md, Kubernetes) ({said or 'forbidden'})"
        )
    if code == 404:
        return ConfigError(f"there is no {full} {name!r} in namespace {namespace}; see kubectl get {resource}")
    if code == 409:
        return _ConflictError(f"{full} {name} was changed meanwhile")
    return ArmillaryError(
        f"the API server refused {verb} {full} {name} with status {code}: {said or 'no reason given'}"
    )


def _pods_of(deployment: str) -> re.Pattern[str]:
    """Return what names of its Pods match whole: the Deployment's, a hash of its template, five of the Pod's own.

    Pods of ``a-sphere-gpu`` are none of ``a-sphere``. Of names that are cut, the dash goes first, then the hash.
    """
    start = f"{deployment}-"[:_BASE_LENGTH]
    return re.compile(rf"{re.escape(start)}({_LETTER}+-|{_LETTER}{{{_BASE_LENGTH - len(start)}}}){_LETTER}{{5}}")


class KubernetesSpheres:
    """Mutable state: changes that are under way. How many Pods there should be is known to the Deployment alone."""

    def __init__(self, api: ApiServer, deployment: str) -> None:
        self._api, self._deployment, self._own = api, deployment, _pods_of(deployment)
        self._replicas = 0
        # one change at a time: each reads what it changes
        self._turn = asyncio.Lock()
        # Pods that are told to leave; a word said twice lowers the number once
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._over = False

    @property
    def living(self) -> int:
        """Replicas that were asked for when last looked at."""
        return self._replicas

    @property
    def all_aside(self) -> bool:
        return False

    def aside(self) -> list[tuple[str, str]]:
        """Return nobody: which Pods keep failing is to be seen with kubectl get pods."""
        return []

    async def begin(self, count: int, *, came_back: bool) -> None:
        """See that the Deployment has ``count`` replicas or more; it is never shrunk at the start of a run."""
        await self._scale(lambda now: max(now, count))

    async def start(self, count: int) -> list[Started]:
        """Raise the number of replicas. Raises ConfigError, UnreachableError."""
        before, after = await self._scale(lambda now: now + count)
        return [Started(f"{self._deployment} replica {number}") for number in range(before + 1, after + 1)]

    def joined(self, host: str, pid: int) -> None:
        """Nothing to note: Kubernetes keeps its own books."""

    def dismiss(self, host: str, pid: int, *, at_once: bool) -> bool:
        """A Pod's host name is its name. That Pod goes first, and the Deployment shrinks by one."""
        if not self._own.fullmatch(host) or self._over:
            return False
        if host not in self._leaving:
            self._leaving[host] = asyncio.create_task(self._let_go(host))
        return True

    async def _let_go(self, pod: str) -> None:
        """Mark a Pod and shrink the Deployment. The sphere was told by the tree; SIGTERM comes after that."""
        path = f"/api/v1/namespaces/{self._api.namespace}/pods/{urllib.parse.quote(pod)}"
        try:
            await self._api.call("PATCH", path, {"metadata": {"annotations": {_COST: "-1000"}}})
            await self._scale(lambda now: max(0, now - 1))
        except ArmillaryError as error:
            log.error("Pod %s was told to leave, and Kubernetes will start it again: %s", pod, error)
            del self._leaving[pod]

    async def _scale(self, change: Callable[[int], int]) -> tuple[int, int]:
        """Change the number of replicas; return it before and after."""
        path = (
            f"/apis/apps/v1/namespaces/{self._api.namespace}/deployments/{urllib.parse.quote(self._deployment)}/scale"
        )
        async with self._turn:
            for last in (*[False] * (_TRIES - 1), True):
                found = await self._api.call("GET", path)
                before = int(found.get("spec", {}).get("replicas", 0))
                after = change(before)
                patch = {
                    # refused where the number has changed meanwhile, by an autoscaler or by hand
                    "metadata": {"resourceVersion": found["metadata"]["resourceVersion"]},
                    "spec": {"replicas": after},
                }
                try:
                    if after != before:
                        await self._api.call("PATCH", path, patch)
                except _ConflictError:
                    if last:
                        raise
                    continue
                self._replicas = after
                if after != before:
                    log.info("Deployment %s: %d replicas, %d before", self._deployment, after, before)
                return before, after
        raise AssertionError("the last try returns or raises")

    def expect_end(self) -> None:
        """The run is over: nothing changes here any more. The Pods stay, as many as they are: the Deployment's."""
        self._over = True

    def kill(self) -> None:
        """Nothing that could be done at once."""
        self.expect_end()

    async def aclose(self) -> None:
        """Finish the changes that are under way."""
        self.expect_end()
        if self._leaving:
            await asyncio.wait(self._leaving.values(), timeout=_CALL_SECONDS)
        for task in self._leaving.values():
            task.cancel()
        await asyncio.gather(*self._leaving.values(), return_exceptions=True)
