#!/usr/bin/env python3
"""Checks the files under deploy/ with the tools that know their formats.

    python3 deploy/tests/check.py                       # what the machine has tools for
    python3 deploy/tests/check.py monitoring compose    # only these
    python3 deploy/tests/check.py --metrics SCRAPE...   # names from answers of /metrics, not from source

The last line is "N passed, N failed, N skipped"; the exit code is 0 if nothing failed. A tool that is
missing makes a check skipped, and the line says what to install.

| check | needs | what it shows |
| --- | --- | --- |
| monitoring | promtool (Debian: prometheus) | the scrape configuration, the alert rules and their tests; each expression of the dashboard parses; rules and dashboard name only metrics that exist |
| compose | docker-compose 1.29 or compose v2 | each compose file is accepted, with and without its profiles |
| kubernetes | Python packages kubernetes-validate and PyYAML | each manifest fits the schema of each Kubernetes version named here, strictly; what belongs together does: labels, ports, names, shards |
| systemd | systemd-analyze (Debian: systemd) | the units are valid |
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"

# The oldest version with what the manifests use (StatefulSet ordinals), and newer ones.
KUBERNETES_VERSIONS = ["1.31", "1.33"]


class Skip(Exception):
    """The check cannot be made on this machine."""


def tool(name, package):
    path = shutil.which(name)
    if path is None:
        raise Skip(f"needs {name} (Debian: {package})")
    return path


def run(*command, cwd=ROOT, env=None):
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    if result.returncode != 0:
        words = " ".join(str(word) for word in command)
        raise AssertionError(f"{words}\n{result.stdout}{result.stderr}".rstrip())
    return result.stdout


# --- monitoring ---------------------------------------------------------------------------------

# Words of PromQL that are no metric. Functions and aggregations are told by their parenthesis.
PROMQL_WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless",
                "bool", "offset", "inf", "nan"}
# What Prometheus makes itself.
PROMETHEUS_METRICS = {"up", "ALERTS"}


def metrics_in(expression):
    """The names of the metrics that a PromQL expression reads."""
    text = re.sub(r'"(?:[^"\\]|\\.)*"', "", expression)
    text = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", text)
    text = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", text)
    names = re.findall(r"(?<![\w.:$])([A-Za-z_:][\w:]*)\b(?!\s*\()", text)
    return {name for name in names if name.lower() not in PROMQL_WORDS}


def metrics_in_source():
    """The names that the code registers: `counter!("name"`, `gauge!(..`, `histogram!(..`."""
    names = set()
    for file in ROOT.glob("crates/*/src/**/*.rs"):
        text = file.read_text().split("#[cfg(test)]\nmod tests {")[0]
        for kind, name in re.findall(r'\b(counter|gauge|histogram)!\(\s*"(\w+)"', text):
            names.add(name)
            if kind == "histogram":
                names.update(name + suffix for suffix in ("_bucket", "_sum", "_count"))
    return names


def metrics_in_scrapes(files):
    names = set()
    for file in files:
        for line in pathlib.Path(file).read_text().splitlines():
            if match := re.match(r"([A-Za-z_:][\w:]*)[{ ]", line):
                names.add(match.group(1))
    return names


def dashboard_expressions(dashboard):
    """Where each expression stands, and the expression with Grafana's variables filled in."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match, f"variable {variable['name']}: {variable['query']}"
            yield f"variable {variable['name']}", f"group by ({match.group(2)}) ({match.group(1)})"


def filled_in(expression):
    expression = expression.replace("$__rate_interval", "1m")
    expression = re.sub(r"\$(shard|node)\b", ".*", expression)
    assert "$" not in expression, f"unknown variable: {expression}"
    return expression


def check_monitoring(arguments):
    promtool = tool("promtool", "prometheus")
    prometheus = DEPLOY / "prometheus"
    run(promtool, "check", "config", "prometheus.yml", cwd=prometheus)
    run(promtool, "check", "rules", "alerts.yml", cwd=prometheus)
    run(promtool, "test", "rules", "alerts_test.yml", cwd=prometheus)
    rules = (prometheus / "alerts.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    tests = (prometheus / "alerts_test.yml").read_text()
    # Some tests name a family of alerts by a pattern.
    patterns = re.findall(r'alertname(?:: |=~?")([\w.*]+)', tests)
    patterns += re.findall(r'alertname="(\w+)"', tests)
    for alert in alerts:
        assert any(re.fullmatch(p, alert) for p in patterns), f"alerts_test.yml does not test {alert}"

    uses = []
    for expression in re.findall(r"expr: (?:>-\n((?: {10,}.*\n)+)|(.*)\n)", rules):
        uses.append(("alerts.yml", " ".join("".join(expression).split())))
    for file in sorted((DEPLOY / "grafana/dashboards").glob("*.json")):
        dashboard = json.loads(file.read_text())
        identifiers = [panel["id"] for panel in dashboard["panels"]]
        assert len(identifiers) == len(set(identifiers)), f"{file.name}: a panel's id repeats"
        uses += [(f"{file.name}: {place}", filled_in(expression))
                 for place, expression in dashboard_expressions(dashboard)]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as made:
        recorded = [{"record": f"dashboard:{number}", "expr": expression}
                    for number, (_, expression) in enumerate(uses)]
        json.dump({"groups": [{"name": "dashboard", "rules": recorded}]}, made)
        made.flush()
        run(promtool, "check", "rules", "--lint=none", made.name)

    exported = metrics_in_scrapes(arguments.metrics) if arguments.metrics else metrics_in_source()
    wanted = set(re.findall(r"^(\w+)", (DEPLOY / "tests/wanted_metrics.txt").read_text(), re.M))
    assert not wanted & exported, f"exported, so no longer wanted: {sorted(wanted & exported)}"
    histograms = {name + suffix for name in wanted for suffix in ("_bucket", "_sum", "_count")}
    known = exported | wanted | histograms | PROMETHEUS_METRICS
    for place, expression in uses:
        unknown = metrics_in(expression) - known
        assert not unknown, f"{place} names {sorted(unknown)}, which nobody exports"
    print(f"{len(alerts)} alerts, {len(uses)} expressions; wanted still: {len(wanted)} metrics")


# --- compose ------------------------------------------------------------------------------------


def check_compose(_arguments):
    commands = []
    if shutil.which("docker-compose"):
        commands.append(["docker-compose"])
    if shutil.which("docker") and subprocess.run(
            ["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        commands.append(["docker", "compose"])
    if not commands:
        raise Skip("needs docker-compose, or docker with compose v2")
    offline = ["-f", "compose.yaml", "-f", "deploy/compose.offline.yaml"]
    for command in commands:
        run(*command, "config", "--quiet")
        run(*command, "--profile", "dashboard", "config", "--quiet")
        run(*command, *offline, "config", "--quiet")
    print(f"accepted by {' and by '.join(' '.join(command) for command in commands)}")


# --- kubernetes ---------------------------------------------------------------------------------


def selects(selector, labels):
    return selector.items() <= labels.items()


def check_kubernetes(_arguments):
    try:
        import kubernetes_validate
        import yaml
    except ImportError as missing:
        raise Skip(f"needs the Python package {missing.name}") from missing
    folder = DEPLOY / "kubernetes"
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    files = {file.name for file in folder.glob("*.yaml")} - {"kustomization.yaml"}
    optional = set(kustomization.get("metadata", {}).get("annotations", {})
                   .get("cinderblock/not-applied", "").split())
    assert files == set(kustomization["resources"]) | optional, "kustomization.yaml names other files"
    objects = []
    for name in sorted(files):
        for document in yaml.safe_load_all((folder / name).read_text()):
            custom = "." in document["apiVersion"].split("/")[0] and "k8s.io" not in document["apiVersion"]
            for version in [] if custom else KUBERNETES_VERSIONS:
                kubernetes_validate.validate(document, version, strict=True)
            objects.append(document)

    of_kind = lambda *kinds: [o for o in objects if o["kind"] in kinds]
    name_of = lambda o: o["metadata"]["name"]
    workloads = of_kind("StatefulSet", "Deployment")
    template = lambda w: w["spec"]["template"]
    services = {name_of(s): s for s in of_kind("Service")}
    for workload in workloads:
        where, labels = name_of(workload), template(workload)["metadata"]["labels"]
        assert selects(workload["spec"]["selector"]["matchLabels"], labels), where
        pod = template(workload)["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"], where
        for container in pod["containers"]:
            limits = container["securityContext"]
            assert limits["capabilities"]["drop"] == ["ALL"], where
            assert limits["readOnlyRootFilesystem"] and not limits["allowPrivilegeEscalation"], where
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), where
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                assert container[probe]["httpGet"]["port"] in ports, where
            mounts = {m["name"] for m in container.get("volumeMounts", [])}
            claims = {name_of(c) for c in workload["spec"].get("volumeClaimTemplates", [])}
            assert mounts == claims | {v["name"] for v in pod.get("volumes", [])}, where
        budgets = [b for b in of_kind("PodDisruptionBudget")
                   if selects(b["spec"]["selector"]["matchLabels"], labels)]
        assert len(budgets) == 1, f"{where}: {len(budgets)} disruption budgets"
    for name, service in services.items():
        behind = [w for w in workloads
                  if selects(service["spec"]["selector"], template(w)["metadata"]["labels"])]
        assert behind, f"service {name} selects nothing"
        for port in service["spec"]["ports"]:
            for workload in behind:
                offered = {p["name"] for p in template(workload)["spec"]["containers"][0]["ports"]}
                assert port["targetPort"] in offered, f"service {name}, port {port['targetPort']}"

    # Each name in NBD_SHARDS is that of a pod, with the service that gives it an address.
    config = next(o for o in of_kind("ConfigMap") if name_of(o) == "cinderblock")["data"]
    shards = json.loads(config["NBD_SHARDS"])
    pods = []
    for workload in of_kind("StatefulSet"):
        spec, governing = workload["spec"], workload["spec"]["serviceName"]
        headless = services[governing]["spec"]
        assert headless["clusterIP"] == "None" and headless["publishNotReadyAddresses"], governing
        first = spec["ordinals"]["start"]
        names = [f"{name_of(workload)}-{n}.{governing}" for n in range(first, first + spec["replicas"])]
        pods.append(names)
        environment = template(workload)["spec"]["containers"][0]["env"]
        node = next(e["value"] for e in environment if e["name"] == "NBD_NODE")
        assert node == f"$(POD_NAME).{governing}", f"{name_of(workload)}: NBD_NODE is {node}"
    assert shards == pods, f"NBD_SHARDS is {shards}, the pods are {pods}"
    print(f"{len(objects)} objects fit Kubernetes {', '.join(KUBERNETES_VERSIONS)}")


# --- systemd ------------------------------------------------------------------------------------


def check_systemd(_arguments):
    analyze = tool("systemd-analyze", "systemd")
    units = sorted((DEPLOY / "systemd").glob("*.service"))
    assert units, "no units"
    with tempfile.TemporaryDirectory() as made:
        # It wants the programs to be there, and instances of templates to have a name.
        for unit in units:
            text = unit.read_text().replace("/usr/bin/nbd", f"{made}/nbd")
            name = unit.name.replace("@.", "@nbd-1-1.")
            (pathlib.Path(made) / name).write_text(text)
        for program in ("nbd-replica", "nbd-lb", "nbd-control"):
            path = pathlib.Path(made) / program
            path.write_text("#!/bin/sh\n")
            path.chmod(0o755)
        names = [unit.name.replace("@.", "@nbd-1-1.") for unit in units]
        result = subprocess.run([analyze, "verify", "--man=no", *names], cwd=made,
                                capture_output=True, text=True, timeout=120, check=False)
        # Other units of the machine have faults of their own.
        ours = [line for line in (result.stdout + result.stderr).splitlines() if "nbd-" in line]
        assert not ours, "\n".join(ours)
    print(f"{len(units)} units are valid")


CHECKS = {
    "monitoring": check_monitoring,
    "compose": check_compose,
    "kubernetes": check_kubernetes,
    "systemd": check_systemd,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--metrics", nargs="+", metavar="SCRAPE", help="answers of /metrics")
    arguments = parser.parse_args()
    if unknown := set(arguments.checks) - CHECKS.keys():
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for name in arguments.checks or CHECKS:
        print(f"{name}: ", end="", flush=True)
        try:
            CHECKS[name](arguments)
            counts["passed"] += 1
        except Skip as reason:
            print(f"SKIPPED: {reason}")
            counts["skipped"] += 1
        except Exception as error:  # whatever is wrong with a file is a failure of its check
            print(f"FAILED: {type(error).__name__}: {error}")
            counts["failed"] += 1
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
