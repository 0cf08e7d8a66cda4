"""The Helm chart as Kubernetes would get it: valid, one control, probes apart, nobody root, no node blocked."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer.main
import yaml

from control.cli import app
from control.config import RunConfig, flat_paths, flatten
from control.config_sources import load_config
from spheres.cli import make_parser
from tests.chart.conftest import CHART, RELEASE, Documents, Helm, read, tool, write

pytestmark = [pytest.mark.chart, pytest.mark.timeout(120)]

Render = Callable[..., Documents]
Document = dict[str, Any]

CASES = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))


def of(documents: Documents, kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def one(documents: Documents, *kinds: str) -> Document:
    (found,) = [document for document in documents if document["kind"] in kinds]
    return found


def workloads(documents: Documents) -> list[Document]:
    return [document for document in documents if document["kind"] in ("Deployment", "StatefulSet", "Job")]


def pods(documents: Documents) -> Iterator[tuple[str, Document]]:
    """Yield name and Pod, of workloads the template."""
    for document in documents:
        if document["kind"] == "Pod":
            yield document["metadata"]["name"], document
        elif document in workloads(documents):
            yield document["metadata"]["name"], document["spec"]["template"]


def nodes(documents: Documents) -> list[tuple[str, Document, Document]]:
    """Return component, Pod and container of control and of spheres."""
    found = [(pod["metadata"]["labels"]["app.kubernetes.io/component"], pod) for _, pod in pods(documents)]
    return [(kind, pod, pod["spec"]["containers"][0]) for kind, pod in found if kind != "test"]


def fits(selector: dict[str, str], pod: Document) -> bool:
    return selector.items() <= pod["metadata"]["labels"].items()


def filled(text: object, variables: dict[str, str]) -> str:
    """Put variables into a text as Kubernetes does; those that are not known are an error here."""
    assert isinstance(text, str), text
    return re.sub(r"\$\$|\$\((\w+)\)", lambda match: variables[match[1]] if match[1] else "$", text)


def environ(container: Document, address: str = "10.1.2.3") -> dict[str, str]:
    """Return its variables; those that Kubernetes fills in as they would be."""
    of_the_pod = {"spec.nodeName": "node-7", "status.podIP": address}
    found: dict[str, str] = {}
    for entry in container["env"]:
        if "value" in entry:
            text = filled(entry["value"], found)
        else:
            text = of_the_pod.get(entry["valueFrom"]["fieldRef"]["fieldPath"], "")
        assert entry["name"] not in found
        found[entry["name"]] = text
    return found


# ---- valid


@pytest.mark.parametrize("values", CASES)
def test_helm_finds_nothing_to_say(values: str, helm: Helm) -> None:
    done = helm("lint", "--strict", "--quiet", CHART, "--values", CHART / "ci" / f"{values}.yaml")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("values", CASES)
def test_what_is_rendered_is_valid(values: str, render: Render) -> None:
    documents = render(values)
    for document in documents:
        kubernetes_validate.validate(document, "1.35", strict=True)
        kubernetes_validate.validate(document, "1.29", strict=True)
    ids = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(ids) == len(set(ids))


def test_a_kubernetes_that_is_too_old_is_refused_before_anything_is_made(helm: Helm) -> None:
    """The oldest one that the chart takes is the oldest one that everything above is valid for."""
    assert helm("template", RELEASE, CHART, "--kube-version", "1.29.0").returncode == 0
    done = helm("template", RELEASE, CHART, "--kube-version", "1.28.9")
    assert done.returncode != 0
    assert "requires kubeVersion: >=1.29.0-0" in done.stderr


def test_a_field_that_kubernetes_does_not_know_is_found(render: Render) -> None:
    document = json.loads(json.dumps(one(render(), "StatefulSet")))
    document["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenessprobe"):
        kubernetes_validate.validate(document, "1.35", strict=True)


@pytest.mark.parametrize("values", CASES)
def test_kubectl_reads_it(values: str, render: Render, tmp_path: Path) -> None:
    documents = render(values)
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(documents))
    (tmp_path / "kustomization.yaml").write_text("resources: [all.yaml]\nnamespace: training\n")
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list(yaml.safe_load_all(done.stdout))) == len(documents)


@pytest.mark.parametrize("values", CASES)
def test_notes_say_how_to_see_the_run(values: str, helm: Helm) -> None:
    done = helm("install", "--dry-run=client", RELEASE, CHART, "--values", CHART / "ci" / f"{values}.yaml")
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:\n")[2]
    control = "digits-control" if values == "everything" else "rel-armillary-control"
    kind = "job" if values == "job" else "statefulset"
    assert f"exec {kind}/{control} -- control-cli status" in notes
    assert f"port-forward service/{control} 7070\n" in notes
    assert ("Nothing is encrypted" in notes) == (values not in ("network-policy", "everything"))


# ---- who is whose


@pytest.mark.parametrize("values", CASES)
def test_there_is_one_control_and_it_keeps_its_volume(values: str, render: Render) -> None:
    documents = render(values)
    control = one(documents, "StatefulSet", "Job")
    spec = control["spec"]
    if control["kind"] == "Job":
        assert (spec["completions"], spec["parallelism"], spec["podReplacementPolicy"]) == (1, 1, "Failed")
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
    else:
        assert spec["replicas"] == 1
        assert spec["serviceName"] in [service["metadata"]["name"] for service in of(documents, "Service")]
    (container,) = spec["template"]["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["runs"] == "/runs"
    claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
    volumes = [volume["name"] for volume in spec["template"]["spec"]["volumes"]]
    assert ("runs" in volumes) != ("runs" in claims)
    assert mounts.keys() <= {*volumes, *claims}


def test_the_volume_outlives_the_release_unless_it_is_told_not_to(render: Render) -> None:
    policy = "persistentVolumeClaimRetentionPolicy"
    assert one(render(), "StatefulSet")["spec"][policy]["whenDeleted"] == "Retain"
    deleted = render("default", "checkpoints.whenDeleted=Delete")
    assert one(deleted, "StatefulSet")["spec"][policy]["whenDeleted"] == "Delete"
    keep = {"helm.sh/resource-policy": "keep"}
    assert one(render("default", "control.kind=Job"), "PersistentVolumeClaim")["metadata"]["annotations"] == keep
    claim = one(render("job"), "PersistentVolumeClaim")
    assert "annotations" not in claim["metadata"]
    assert claim["spec"]["storageClassName"] == "fast"
    assert of(render("default", "control.kind=Job", "checkpoints.existingClaim=mine"), "PersistentVolumeClaim") == []


@pytest.mark.parametrize("values", CASES)
def test_selectors_take_their_own_pods_and_no_others(values: str, render: Render) -> None:
    documents = render(values)
    templates = dict(pods(documents))
    for workload in workloads(documents):
        if workload["kind"] == "Job":
            continue
        selector = workload["spec"]["selector"]["matchLabels"]
        assert [name for name, pod in templates.items() if fits(selector, pod)] == [workload["metadata"]["name"]]
        # what may change with a release may not be in a selector, which may not
        allowed = {f"app.kubernetes.io/{key}" for key in ("name", "instance", "component")}
        assert selector.keys() <= {*allowed, "topology.kubernetes.io/zone"}
    for service in of(documents, "Service"):
        kind = "sphere" if service["metadata"]["name"].endswith("-spheres") else "control"
        chosen = [pod for pod in templates.values() if fits(service["spec"]["selector"], pod)]
        assert {pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in chosen} == {kind}
        (port,) = service["spec"]["ports"]
        assert port["port"] == {"control": 7070, "sphere": 7071}[kind]
        for pod in chosen:
            named = {p["name"]: p["containerPort"] for p in pod["spec"]["containers"][0]["ports"]}
            assert named[port["targetPort"]] == port["port"]


def test_two_releases_do_not_meet(render: Render, helm: Helm) -> None:
    other = list(yaml.safe_load_all(helm("template", "second", CHART).stdout))
    first = render()
    for (_, pod), workload in itertools.product(pods(other), workloads(first)):
        assert not fits(workload["spec"]["selector"]["matchLabels"], pod)
    assert {d["metadata"]["name"] for d in other}.isdisjoint(d["metadata"]["name"] for d in first)


def test_names_of_a_long_release_are_short_enough(helm: Helm) -> None:
    done = helm("template", "r" * 53, CHART, "--set", "zones={eu-central-1a}")
    documents = list(yaml.safe_load_all(done.stdout))
    for document in documents:
        # 52 for a StatefulSet: a label has its name and a hash
        assert len(document["metadata"]["name"]) <= (52 if document["kind"] == "StatefulSet" else 63)
        kubernetes_validate.validate(document, "1.35", strict=True)


def test_headless_services_name_who_is_not_ready(render: Render) -> None:
    for service in of(render(), "Service"):
        headless = service["metadata"]["name"] != "rel-armillary-control"
        assert (service["spec"].get("clusterIP") == "None") == headless
        assert service["spec"].get("publishNotReadyAddresses", False) == headless


# ---- what runs in a Pod


@pytest.mark.parametrize("values", CASES)
def test_liveness_and_readiness_are_two_questions(values: str, render: Render) -> None:
    for kind, _, container in nodes(render(values)):
        port = {"control": 7070, "sphere": 7071}[kind]
        assert container["livenessProbe"]["grpc"] == {"port": port, "service": ""}
        assert container["startupProbe"]["grpc"] == {"port": port, "service": ""}
        assert container["readinessProbe"]["grpc"] == {"port": port, "service": "ready"}
        assert f"--listen=0.0.0.0:{port}" in container["args"]
        # busy is not dead: a minute without an answer is
        assert container["livenessProbe"]["periodSeconds"] * container["livenessProbe"]["failureThreshold"] >= 60


@pytest.mark.parametrize("values", CASES)
def test_nobody_is_root_or_writes_to_the_image(values: str, render: Render) -> None:
    for _, pod in pods(render(values)):
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= container["resources"].keys()
            if container["name"] != "health":
                assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_control_is_started_with_the_same_words_for_a_first_start_and_a_restart(render: Render) -> None:
    for values, held in (("default", "true"), ("job", None)):
        ((_, _, container),) = [node for node in nodes(render(values)) if node[0] == "control"]
        command = typer.main.get_command(app).commands["start"]
        context = command.make_context("start", container["args"][1:], resilient_parsing=False)
        assert context.params["resume"] == "auto"
        assert container["command"] + container["args"][:1] == ["control-cli", "start"]
        assert environ(container).get("ARMILLARY_HOLD") == held
        assert environ(container)["ARMILLARY_RUN_DIR"] == "/runs/run"


OF_A_LAUNCHER = ("ARMILLARY_LAUNCHER", "ARMILLARY_KUBERNETES_DEPLOYMENT")


@pytest.mark.parametrize("values", CASES)
def test_control_understands_its_variables(values: str, render: Render) -> None:
    ((_, _, container),) = [node for node in nodes(render(values)) if node[0] == "control"]
    known = environ(container)
    if "launcher" not in flat_paths():  # a control that has no launchers
        known = {key: value for key, value in known.items() if key not in OF_A_LAUNCHER}
    config, _ = load_config({"listen": "0.0.0.0:7070", "insecure": True}, known)
    if values == "everything":
        assert (config.task, config.steps, config.learning_rate) == ("line:Line", 1_000_000, 0.05)
        assert config.task_options == {"hidden": "64", "scale": "0.5"}
        assert config.optimizer.nesterov
        assert config.checkpoint_every is not None
        assert [group.pattern for group in config.optimizer.parameter_groups] == ["*.bias"]
        assert str(config.run_dir) == "/runs/second"
    elif values != "launcher":
        assert config.spheres == 0


def test_a_run_goes_on_with_another_launcher(render: Render) -> None:
    """What was said of the launcher before is in the run's own directory, and goes on where nobody says another."""

    def control(values: str, saved: dict[str, Any] | None = None) -> RunConfig:
        ((_, _, container),) = [node for node in nodes(render(values)) if node[0] == "control"]
        return load_config({"listen": "0.0.0.0:7070", "insecure": True}, environ(container), None, saved)[0]

    launched = control("launcher")
    assert (launched.launcher, launched.spheres) == ("kubernetes", 6)
    without = control("default", flatten(launched))
    assert (without.launcher, without.spheres) == ("local", 0)
    again = control("launcher", flatten(without))
    assert (again.launcher, again.spheres) == ("kubernetes", 6)


@pytest.mark.parametrize("values", CASES)
def test_spheres_understand_their_words_and_say_where_they_are(
    values: str, render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = render(values)
    service = next(s for s in of(documents, "Service") if s["metadata"]["name"].endswith("-control"))
    for kind, _, container in nodes(documents):
        if kind != "sphere":
            continue
        variables = environ(container)
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            options = make_parser().parse_args([filled(word, variables) for word in container["args"]])
        assert options.control == f"{service['metadata']['name']}:7070"
        # a launcher knows Pods by their host names
        host = "" if values == "launcher" else "node-7"
        assert (options.advertise, options.host, options.insecure) == ("10.1.2.3:7071", host, True)
        assert options.orphan_timeout >= 60
        assert options.hold  # whoever ends is started again, ever more rarely


def test_addresses_of_ipv6_are_in_brackets(render: Render, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, _, container in nodes(render("default", "ipFamily=IPv6")):
        variables = environ(container, "fd00::7")
        if kind == "control":
            command = typer.main.get_command(app).commands["start"]
            flags = command.make_context("start", container["args"][1:], resilient_parsing=False).params
            config, _ = load_config({"listen": flags["listen"], "insecure": flags["insecure"]}, variables)
            assert config.listen == "[::]:7070"
            continue
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        options = make_parser().parse_args([filled(word, variables) for word in container["args"]])
        assert (options.listen, options.advertise) == ("[::]:7071", "[fd00::7]:7071")


def test_a_zone_is_a_deployment_whose_spheres_say_it(render: Render) -> None:
    deployments = of(render("zones"), "Deployment")
    assert [deployment["metadata"]["name"].partition("-sphere-")[2] for deployment in deployments] == [
        "eu-central-1a",
        "eu-central-1b",
    ]
    for deployment in deployments:
        zone = deployment["metadata"]["name"].partition("-sphere-")[2]
        pod = deployment["spec"]["template"]
        assert environ(pod["spec"]["containers"][0])["ARMILLARY_ZONE"] == zone
        assert pod["spec"]["nodeSelector"] == {"kubernetes.io/arch": "amd64", "topology.kubernetes.io/zone": zone}
        assert deployment["spec"]["replicas"] == 3


def test_without_zones_a_sphere_takes_that_of_its_pod(render: Render) -> None:
    container = one(render(), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    (zone,) = [entry for entry in container["env"] if entry["name"] == "ARMILLARY_ZONE"]
    assert zone["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['topology.kubernetes.io/zone']"


def test_there_is_time_for_a_drain_and_for_a_last_checkpoint(render: Render) -> None:
    for kind, pod, _ in nodes(render()):
        assert pod["spec"]["terminationGracePeriodSeconds"] >= {"control": 120, "sphere": 60}[kind]


def test_settings_of_pods_reach_them(render: Render) -> None:
    for kind, pod, container in nodes(render("everything")):
        spec = pod["spec"]
        assert pod["metadata"]["annotations"]["example.org/team"] == "vision"
        assert pod["metadata"]["labels"]["example.org/cost"] == "42"
        assert spec["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
        assert spec["tolerations"] == [{"key": "spot", "operator": "Exists"}]
        assert "nodeAffinity" in spec["affinity"]
        (constraint,) = spec["topologySpreadConstraints"]
        assert constraint["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == kind
        assert spec["priorityClassName"] == "training"
        assert spec["serviceAccountName"] == "mine"
        assert spec["imagePullSecrets"] == [{"name": "registry"}]
        assert environ(container)["OTHER"] == "1"
        assert environ(container)["PYTHONPATH"] == "/task"
        assert {"data", "tmp", "task"} <= {volume["name"] for volume in spec["volumes"]}
        assert {"/data", "/tmp", "/task"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
        assert container["image"].startswith("registry.example/armillary@sha256:")
    assert of(render("everything"), "ServiceAccount") == []
    assert set(one(render("everything"), "ConfigMap")["data"]) == {"line.py"}


def test_other_task_files_are_other_pods(render: Render) -> None:
    def annotations(*sets: str) -> dict[str, object]:
        return {name: pod["metadata"].get("annotations") for name, pod in pods(render("everything", *sets))}

    first, second = annotations(), annotations("taskFiles.b=text")
    changed = [name for name in first if first[name] != second[name]]
    assert changed == ["digits-sphere", "digits-control"]


# ---- how many, and what may go


@pytest.mark.parametrize("values", ["autoscaling", "launcher", "everything"])
def test_who_else_scales_is_not_overruled_by_an_upgrade(values: str, render: Render) -> None:
    documents = render(values)
    assert all("replicas" not in deployment["spec"] for deployment in of(documents, "Deployment"))
    targets = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in of(documents, "HorizontalPodAutoscaler")}
    names = {deployment["metadata"]["name"] for deployment in of(documents, "Deployment")}
    assert targets == (set() if values == "launcher" else names)


def test_autoscaling_is_off_by_default(render: Render) -> None:
    assert of(render(), "HorizontalPodAutoscaler") == []
    assert one(render(), "Deployment")["spec"]["replicas"] == 4


@pytest.mark.parametrize("values", CASES)
def test_a_node_can_always_be_drained(values: str, render: Render) -> None:
    documents = render(values)
    (budget,) = of(documents, "PodDisruptionBudget")
    assert "minAvailable" not in budget["spec"]
    assert budget["spec"]["maxUnavailable"] not in (0, "0%")
    kinds = {kind for kind, pod, _ in nodes(documents) if fits(budget["spec"]["selector"]["matchLabels"], pod)}
    assert kinds == {"sphere"}
    assert of(render("default", "podDisruptionBudget.enabled=false"), "PodDisruptionBudget") == []


def test_only_a_control_that_scales_has_a_token_and_rights(render: Render) -> None:
    for values in CASES:
        documents = render(values)
        for kind, pod, _ in nodes(documents):
            wanted = values == "launcher" and kind == "control"
            assert pod["spec"]["automountServiceAccountToken"] is wanted
        assert bool(of(documents, "Role")) == (values == "launcher")
    documents = render("launcher")
    rules = one(documents, "Role")["rules"]
    (deployment,) = of(documents, "Deployment")
    assert rules == [
        {
            "apiGroups": ["apps"],
            "resources": ["deployments/scale"],
            "resourceNames": [deployment["metadata"]["name"]],
            "verbs": ["get", "patch"],
        },
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "patch"]},
    ]
    ((_, pod, container),) = [node for node in nodes(documents) if node[0] == "control"]
    (subject,) = one(documents, "RoleBinding")["subjects"]
    assert subject["name"] == pod["spec"]["serviceAccountName"]
    assert subject["name"] != deployment["spec"]["template"]["spec"]["serviceAccountName"]
    variables = environ(container)
    assert variables["ARMILLARY_LAUNCHER"] == "kubernetes"
    assert variables["ARMILLARY_KUBERNETES_DEPLOYMENT"] == deployment["metadata"]["name"]
    assert variables["ARMILLARY_SPHERES"] == "6"


def test_a_policy_lets_in_this_release_alone(render: Render) -> None:
    assert of(render(), "NetworkPolicy") == []
    documents = render("network-policy")
    policies = of(documents, "NetworkPolicy")
    assert len(policies) == 2
    for policy in policies:
        spec = policy["spec"]
        kind = spec["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        assert spec["policyTypes"] == ["Ingress"]
        (rule,) = spec["ingress"]
        assert rule["ports"] == [{"protocol": "TCP", "port": {"control": 7070, "sphere": 7071}[kind]}]
        release, *others = rule["from"]
        assert all(fits(release["podSelector"]["matchLabels"], pod) for _, pod in pods(documents))
        assert release["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == RELEASE
        assert len(others) == (1 if kind == "control" else 0)


# ---- texts stay texts, and numbers whole


#: what YAML takes for something else, or for an end, where it is not quoted
TEXTS = [
    "true", "no", "~", "null", "0123", "1e3", "0x1F", "1_000", "1:30", ".5", ".inf", "2001-01-01", "-", "?",
    "a: b", "a #b", "#", "- a", "'", '"', "it's", "{a}", "{{ .Values }}", "[a", "a,b", "*a", "&a", "!a", "|", ">", "%a",
    "@a", "`a", "\\n", "\\", " a ", "a\n", "a\n\n", "\n a", "  a\nb", "a\n \nb", "a\r\nb\r\n", "\ta", "---\na: b",
    "ü", "日本", "\u2028", "\ufeff", "😀", "<&>", "$(ARMILLARY_TASK)", "$$a", "$", "",
]  # fmt: skip
#: what Helm's toYaml fails at, and says nothing, or folds
CONTROLS = ["\x7f", "\x80", "\x85", "\ufffe"]


@pytest.fixture
def render_values(helm: Helm, tmp_path: Path) -> Callable[..., Documents]:
    """Return what the chart makes of values of a file, in which numbers are others than those of --set."""

    def rendered(values: Document, *words: str, release: str = RELEASE) -> Documents:
        (tmp_path / "values.yaml").write_text(write(values))
        done = helm("template", release, CHART, "--values", tmp_path / "values.yaml", *words)
        assert done.returncode == 0, done.stderr
        documents = read(done.stdout)
        for document in documents:
            kubernetes_validate.validate(document, "1.35", strict=True)
        return documents

    return rendered


def test_texts_of_all_kinds_arrive_as_they_are(render_values: Callable[..., Documents]) -> None:
    some = {f"k{number}": text for number, text in enumerate(TEXTS)}
    settings = {
        "podAnnotations": some,
        "podLabels": some,
        "nodeSelector": some,
        "tolerations": [{"key": "k", "value": text} for text in TEXTS],
        "extraEnv": [{"name": name, "value": text} for name, text in some.items()],
        "serviceAccount": {"create": True, "annotations": some},
    }
    files = some | {f"c{number}": text for number, text in enumerate(CONTROLS)}
    documents = render_values(
        {
            "control": settings,
            "spheres": settings,
            "taskFiles": files,
            "imagePullSecrets": [{"name": text} for text in TEXTS if text],
            "config": {"task_options": files},
        }
    )
    for kind, pod, container in nodes(documents):
        spec, metadata = pod["spec"], pod["metadata"]
        assert some.items() <= metadata["annotations"].items()
        assert some.items() <= metadata["labels"].items()
        assert spec["nodeSelector"] == some
        assert [toleration["value"] for toleration in spec["tolerations"]] == TEXTS
        assert {entry["name"]: entry.get("value") for entry in container["env"]}.items() >= some.items()
        assert [secret["name"] for secret in spec["imagePullSecrets"]] == [text for text in TEXTS if text]
        if kind == "control":
            del container["env"][-len(some) :]
            config, _ = load_config({"listen": "0.0.0.0:7070", "insecure": True}, environ(container))
            assert config.task_options == files
    for account in of(documents, "ServiceAccount"):
        assert account["metadata"]["annotations"] == some
    assert one(documents, "ConfigMap")["data"] == files


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_a_text_stands_where_it_is_put(text: str, render_values: Callable[..., Documents]) -> None:
    settings = {"priorityClassName": text, "serviceAccount": {"create": False, "name": text}}
    values = {
        "control": settings,
        "spheres": settings,
        "image": {"repository": text, "tag": text},
        "config": {"checkpoint_url": text, "init_from": text},
    }
    first = render_values(values | {"checkpoints": {"storageClass": text}})
    second = render_values(values | {"checkpoints": {"existingClaim": text}})
    for kind, pod, container in [*nodes(first), *nodes(second)]:
        assert (pod["spec"]["priorityClassName"], pod["spec"]["serviceAccountName"]) == (text, text)
        assert container["image"] == f"{text}:{text}"
        if kind == "control":
            variables = environ(container)
            assert (variables["ARMILLARY_CHECKPOINT_URL"], variables["ARMILLARY_INIT_FROM"]) == (text, text)
    (template,) = one(first, "StatefulSet")["spec"]["volumeClaimTemplates"]
    assert template["spec"]["storageClassName"] == text
    (runs, *_) = one(second, "StatefulSet")["spec"]["template"]["spec"]["volumes"]
    assert runs["persistentVolumeClaim"]["claimName"] == text


@pytest.mark.parametrize("name", ["true", "null", "123", "0x1", "1e3", "2001-01-01"])
def test_a_release_may_have_any_name(name: str, render_values: Callable[..., Documents]) -> None:
    values = {"nameOverride": name, "zones": ["1", "2"], "run": name, "networkPolicy": {"enabled": True}}
    values["topologySpreadConstraints"] = [{"maxSkew": 1, "topologyKey": "k", "whenUnsatisfiable": "DoNotSchedule"}]
    values["spheres"] = {"topologySpreadConstraints": values.pop("topologySpreadConstraints")}
    zones = render_values(values, "--namespace", name, release=name)
    scaled = render_values({"launcher": "kubernetes"}, "--namespace", name, release=name)
    for document in zones + scaled:
        assert document["metadata"]["labels"]["app.kubernetes.io/instance"] == name
    assert one(scaled, "RoleBinding")["subjects"][0]["namespace"] == name
    for policy in of(zones, "NetworkPolicy"):
        assert set(policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"].values()) == {name}


def test_large_numbers_are_whole(render_values: Callable[..., Documents], helm: Helm, tmp_path: Path) -> None:
    many = 2_000_000
    settings = {
        "terminationGracePeriodSeconds": many,
        "startupSeconds": 2 * many,
        "resources": {"requests": {"memory": many}},
        "tolerations": [{"key": "k", "operator": "Exists", "tolerationSeconds": many}],
    }
    options = {"big": many, "layers": [many, 64], "note": "a,b", "rate": 1e-7, "flag": True, "nothing": None}
    values = {
        "control": settings | {"kind": "Job", "backoffLimit": many},
        "spheres": settings | {"replicas": many},
        "checkpoints": {"size": many},
        "podDisruptionBudget": {"maxUnavailable": many},
        "podSecurityContext": {"runAsUser": many},
        "config": {"steps": many, "batch_size": many, "seed": (1 << 53) - 1, "learning_rate": 1e-7,
                   "eval_every": None, "keep_every": many, "task_options": options},
    }  # fmt: skip
    documents = render_values(values)
    assert one(documents, "Job")["spec"]["backoffLimit"] == many
    assert one(documents, "Deployment")["spec"]["replicas"] == many
    assert one(documents, "PodDisruptionBudget")["spec"]["maxUnavailable"] == many
    assert one(documents, "PersistentVolumeClaim")["spec"]["resources"]["requests"]["storage"] == str(many)
    for kind, pod, container in nodes(documents):
        assert pod["spec"]["terminationGracePeriodSeconds"] == many
        assert pod["spec"]["securityContext"]["runAsUser"] == many
        assert pod["spec"]["tolerations"][0]["tolerationSeconds"] == many
        assert container["startupProbe"]["failureThreshold"] == many
        assert container["resources"]["requests"]["memory"] == many
        if kind == "control":
            config, _ = load_config({"listen": "0.0.0.0:7070", "insecure": True}, environ(container))
            assert (config.steps, config.batch_size, config.keep_every, config.seed) == (many, many, many, 2**53 - 1)
            assert config.learning_rate == 1e-7
            assert config.task_options == {
                "big": "2000000", "layers": "[2000000, 64]", "note": "a,b", "rate": "1e-07", "flag": "true",
                "nothing": "none",
            }  # fmt: skip

    scaling = {"enabled": True, "minReplicas": many, "maxReplicas": many, "targetCPUUtilizationPercentage": many}
    scaler = one(render_values({"autoscaling": scaling}), "HorizontalPodAutoscaler")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (many, many)
    assert scaler["metrics"][0]["resource"]["target"]["averageUtilization"] == many
    launched = render_values({"launcher": "kubernetes", "spheres": {"replicas": many}})
    ((_, _, container),) = [node for node in nodes(launched) if node[0] == "control"]
    assert environ(container)["ARMILLARY_SPHERES"] == str(many)
    for more in ({}, {"autoscaling": scaling}):
        (tmp_path / "notes.yaml").write_text(json.dumps(values | more))
        done = helm("install", "--dry-run=client", RELEASE, CHART, "--values", tmp_path / "notes.yaml")
        assert "2000000 spheres" in done.stdout.partition("NOTES:\n")[2], done.stderr


def test_control_characters_are_refused_where_helm_would_write_nothing(helm: Helm, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(write({"control": {"podAnnotations": {"a": "\x7f", "b": "c"}}}))
    done = helm("template", RELEASE, CHART, "--values", tmp_path / "values.yaml")
    assert "a value has a control character, for which Helm would write nothing at all" in done.stderr


def test_numbers_that_are_taken_away_are_kubernetes_own(render_values: Callable[..., Documents]) -> None:
    nothing = {"terminationGracePeriodSeconds": None, "podLabels": None, "podAnnotations": None}
    control, spheres = {"kind": "Job", "backoffLimit": None} | nothing, {"replicas": None} | nothing
    documents = render_values({"control": control, "spheres": spheres})
    assert one(documents, "Job")["spec"]["backoffLimit"] is None
    assert one(documents, "Deployment")["spec"]["replicas"] is None
    assert {pod["spec"]["terminationGracePeriodSeconds"] for _, pod, _ in nodes(documents)} == {None}


@pytest.mark.parametrize("config", [{"seed": 1 << 53}, {"task_options": {"a": 1, "b": -(1 << 60)}}])
def test_numbers_that_helm_would_round_are_refused(config: Document, helm: Helm, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(json.dumps({"config": config}))
    done = helm("template", RELEASE, CHART, "--values", tmp_path / "values.yaml")
    key = "seed" if "seed" in config else "task_options.b"
    assert f"config.{key}: Helm rounds numbers of this size: put it in quotes" in done.stderr


# ---- values that cannot be


WRONG = {
    "config.lr=0.1": "at '/config': additional properties 'lr' not allowed",
    "config.spheres=3": "at '/config': additional properties 'spheres' not allowed",
    "spheres.replicas=-1": "at '/spheres/replicas': minimum: got -1, want 0",
    "spheres.replicas=many": "at '/spheres/replicas': got string, want integer",
    "spheres.orphanTimeout=5": "at '/spheres/orphanTimeout': got number, want string",
    "sphere.replicas=3": "additional properties 'sphere' not allowed",
    "control.replicas=2": "at '/control': additional properties 'replicas' not allowed",
    "control.kind=Deployment": "at '/control/kind': value must be one of 'StatefulSet', 'Job'",
    "podDisruptionBudget.maxUnavailable=0": "maxUnavailable': minimum: got 0, want 1",
    "podDisruptionBudget.maxUnavailable=0%": "maxUnavailable': '0%' does not match pattern",
    "launcher=ray": "at '/launcher': value must be one of 'none', 'kubernetes'",
    "ipFamily=ipv6": "at '/ipFamily': value must be one of 'IPv4', 'IPv6'",
    "control.extraEnv[0].name=A,control.extraEnv[0].value=1": "at '/control/extraEnv/0/value': got number, want string",
    "logFormat=xml": "at '/logFormat': value must be one of 'text', 'json'",
    "image.digest=abc": "at '/image/digest': 'abc' does not match pattern",
    "image.repository=": "at '/image/repository': minLength: got 0, want 1",
    "nameOverride=a: b": "at '/nameOverride': 'a: b' does not match pattern",
    "fullnameOverride=a #b": "at '/fullnameOverride': 'a #b' does not match pattern",
    r"spheres.podLabels.app\.kubernetes\.io/name=x": "spheres.podLabels: app.kubernetes.io/name is the chart's",
    r"control.podLabels.app\.kubernetes\.io/part-of=x": "control.podLabels: app.kubernetes.io/part-of is the chart's",
    r"zones={a},spheres.podLabels.topology\.kubernetes\.io/zone=b": "topology.kubernetes.io/zone is the chart's",
    r"taskFiles.a=x,control.podAnnotations.checksum/task=x": "control.podAnnotations: checksum/task is the chart's",
    "zones={a,a}": "at '/zones': items at 0 and 1 are equal",
    "zones={Zone A}": "at '/zones/0': 'Zone A' does not match pattern",
    "run=../other": "at '/run': '../other' does not match pattern",
    "task=a b": "at '/task': 'a b' does not match pattern",
    "checkpoints.size=much": "at '/checkpoints/size': 'much' does not match pattern",
    "launcher=kubernetes,autoscaling.enabled=true": "would both scale the spheres: choose one",
    "launcher=kubernetes,zones={a}": "launcher: kubernetes scales one Deployment, and zones make one for each zone",
    "config.epochs=1,config.steps=2": "config: give either epochs or steps, not both",
    "autoscaling.enabled=true,autoscaling.minReplicas=20": r"autoscaling.minReplicas (20) is above",
}


@pytest.mark.parametrize("values", WRONG)
def test_values_that_cannot_be_are_refused_with_a_reason(values: str, helm: Helm) -> None:
    done = helm("template", RELEASE, CHART, "--set", values)
    assert done.returncode != 0
    assert WRONG[values] in done.stderr
