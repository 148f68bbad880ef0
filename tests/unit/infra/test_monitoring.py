"""infra/prometheus and infra/grafana: they query metrics that exist, and alerts name the remedy."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.infra.promql import evaluate, legend_labels, read, samples_of
from support.paths import ROOT

from esper.cli.metrics import catalogue
from esper.metrics import Kind, MetricSpec

PROMETHEUS, GRAFANA = ROOT / "infra" / "prometheus", ROOT / "infra" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
SUFFIXES = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
SERIES: dict[str, MetricSpec] = {
    f"{spec.name}{suffix}": spec
    for specs in catalogue().values()
    for spec in specs
    for suffix in SUFFIXES.get(spec.kind, ("",))
}
FROM_PROMETHEUS = {"job", "instance"}
FOREIGN = {"up": set[str](), "process_resident_memory_bytes": set[str](), "process_cpu_seconds_total": set[str]()}


def load(name: str) -> Any:
    return yaml.safe_load((PROMETHEUS / name).read_text())


def alerts() -> list[dict[str, Any]]:
    return [rule for group in load("alerts.yml")["groups"] for rule in group["rules"]]


def panels(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["panels"])


def targets() -> Iterator[tuple[str, str, str]]:
    """(place, expression, legend) of every query of every dashboard."""
    for path in DASHBOARDS:
        for panel in panels(path):
            for target in panel.get("targets", ()):
                yield f"{path.stem}: {panel['title']}", target["expr"], target["legendFormat"]
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
                assert match is not None, variable
                yield f"{path.stem}: ${variable['name']}", f"sum by ({match[2]}) ({match[1]})", ""


QUERIES = [*targets(), *((a["alert"], a["expr"], " ".join(a["annotations"].values())) for a in alerts())]


@pytest.mark.parametrize(("where", "expression", "legend"), QUERIES, ids=[q[0] for q in QUERIES])
def test_query_uses_existing_metrics_and_labels(where: str, expression: str, legend: str) -> None:
    reading = read(expression)
    known = set(FROM_PROMETHEUS)
    assert reading.selectors
    for name, matchers, function in reading.selectors:
        assert name in SERIES or name in FOREIGN, f"no process serves {name}"
        labels = set(SERIES[name].labels) if name in SERIES else FOREIGN[name]
        if name.endswith("_bucket"):
            labels = labels | {"le"}
        assert matchers.keys() <= labels | FROM_PROMETHEUS, f"{name} has no label {matchers.keys() - labels}"
        known |= labels
        is_counted = name == "process_cpu_seconds_total" or (name in SERIES and SERIES[name].kind is not Kind.GAUGE)
        assert (function in ("rate", "increase")) == is_counted or function is None, f"{function}() of {name}"
    assert set(reading.grouped) <= known
    assert set(legend_labels(legend)) <= (set(reading.grouped) or known), (
        "the legend uses a label that the result does not have"
    )
    assert "vector(" not in expression, "a missing value must not be shown as 0"


def test_queried_jobs_are_scraped() -> None:
    jobs = {config["job_name"] for config in load("prometheus.yml")["scrape_configs"]}
    for _where, expression, _legend in QUERIES:
        for _name, matchers, _function in read(expression).selectors:
            assert any(re.fullmatch(matchers.get("job", ".*"), job) for job in jobs), expression


def test_every_process_is_scraped_on_its_documented_port() -> None:
    text = (ROOT / "docs" / "deployment" / "monitoring.md").read_text()
    documented = dict(re.findall(r"^\| (\w+) \| .*metrics_port.*\| (\d+) \|$", text, re.M))
    assert documented.keys() == {"worker", "urza", "tamiyo", "trainer"}
    configs = {c["job_name"]: json.dumps(c) for c in load("prometheus.yml")["scrape_configs"]}
    configs["esper-trainer"] += (PROMETHEUS / "trainers" / "compose.yml").read_text()
    for process, port in documented.items():
        assert port in configs[f"esper-{process}"]


@pytest.mark.parametrize("alert", alerts(), ids=[a["alert"] for a in alerts()])
def test_alert_has_severity_annotations_and_runbook(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert len(alert["annotations"]["summary"]) > 10
    assert len(alert["annotations"]["description"]) > 60
    page, _, anchor = alert["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.M)
    assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
    assert anchor == alert["alert"].lower()


def test_every_alert_has_a_test() -> None:
    tests = [t for block in load("alerts.test.yml")["tests"] for t in block["alert_rule_test"]]
    assert {t["alertname"] for t in tests if t["exp_alerts"]} == {a["alert"] for a in alerts()}
    assert len({a["alert"] for a in alerts()}) == len(alerts())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
@pytest.mark.parametrize(
    "command",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint=all", "alerts.yml"),
        ("test", "rules", "alerts.test.yml"),
    ],
)
def test_promtool_accepts_configuration(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_evaluate_matches_prometheus() -> None:
    scraped = 'a{t="x"} 1\na{t="y"} 0\nb{t="x"} 5\nb{t="y"} 7\n'
    samples = samples_of(scraped, job="j")
    x, y = frozenset({("t", "x"), ("job", "j")}), frozenset({("t", "y"), ("job", "j")})
    assert evaluate("a == 1", samples) == {x: 1}
    assert evaluate("a == bool 0", samples) == {x: 0, y: 1}
    assert evaluate("b > 4 unless a == 1", samples) == {y: 7}
    assert evaluate("sum(b)", samples) == {frozenset(): 12}
    assert evaluate("max by (job) (b) > 6", samples) == {frozenset({("job", "j")}): 7}
    assert evaluate('b{t=~"x|z"}', samples) == {x: 5}
    assert evaluate('b{t!="x"} or a', samples) == {x: 1, y: 7}
    assert evaluate("nothing", samples) == {}
    with pytest.raises(NotImplementedError):
        evaluate("rate(a[5m])", samples)


@pytest.mark.parametrize("path", DASHBOARDS, ids=[p.stem for p in DASHBOARDS])
def test_dashboard_is_valid(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == path.stem
    assert board["schemaVersion"] >= 39
    assert board["title"].startswith("Esper: ")
    names = {v["name"]: v["type"] for v in board["templating"]["list"]}
    assert names.pop("datasource") == "datasource"
    ids = [p["id"] for p in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        box = panel["gridPos"]
        assert box["x"] >= 0
        assert box["x"] + box["w"] <= 24
        assert box["w"] > 0
        assert box["h"] > 0
        if panel["type"] == "row":
            continue
        assert panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["noValue"] == "No data"
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [t["refId"] for t in panel["targets"]] == [chr(65 + n) for n in range(len(panel["targets"]))]
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*names, "__rate_interval"}
    for one, other in combinations([p["gridPos"] for p in board["panels"]], 2):
        is_side_by_side = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert is_side_by_side or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]


def test_dashboards_have_unique_names() -> None:
    boards = [json.loads(p.read_text()) for p in DASHBOARDS]
    assert {b["uid"] for b in boards} == {"esper-overview", "esper-worker", "esper-api", "esper-trainers"}
    assert len({b["title"] for b in boards}) == len(boards)


def test_grafana_provisioning_finds_prometheus_and_dashboards() -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())
    assert sources["apiVersion"] == 1
    (source,) = sources["datasources"]
    assert (source["type"], source["access"], source["isDefault"]) == ("prometheus", "proxy", True)
    providers = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "esper.yml").read_text())
    assert providers["apiVersion"] == 1
    (provider,) = providers["providers"]
    stack = yaml.safe_load((ROOT / "infra" / "stack.yml").read_text())
    mounts = {v.split(":")[1]: v.split(":")[0] for v in stack["services"]["grafana"]["volumes"] if v.startswith(".")}
    assert mounts[provider["options"]["path"]] == "./grafana/dashboards"
    assert mounts["/etc/grafana/provisioning"] == "./grafana/provisioning"
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in stack["services"]
