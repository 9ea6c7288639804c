"""Deployment files, as far as they can be held without a Docker engine: what they name exists in the code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from prometheus_client import Gauge, generate_latest
from prometheus_client.metrics import MetricWrapperBase
from typer.main import get_command

from streams import contracts, metrics
from streams import settings as settings_module
from streams.cli import app
from streams.settings import Settings
from tests import reference

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("gpl-streams:")}
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/gpl.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
SCRAPES = {
    scrape["job_name"]: scrape
    for scrape in yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
}


@pytest.fixture
def image_settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The configuration inside the containers, before a service's environment."""
    for name in [name for name in os.environ if name.startswith("GPL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GPL_CONFIG", "")  # `load` sets it; so it is put back afterwards
    return settings_module.load(ROOT / "deploy/gpl.toml")


# --- compose ---


@pytest.mark.parametrize("name", OURS)
def test_commands_are_command_lines_of_gpl(name: str) -> None:
    command: Any = get_command(app)
    words = [str(word) for word in OURS[name]["command"]]
    while hasattr(command, "commands"):
        assert words, f"{name}: the command line ends at the group {command.name}"
        assert words[0] in command.commands, f"{name}: gpl has no {' '.join(OURS[name]['command'])}"
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words)  # raises a usage error for arguments that it does not take


def test_every_role_has_a_service() -> None:
    commands = [" ".join(service["command"]) for service in OURS.values()]
    assert len(set(commands)) == len(commands)
    assert {"worker profiles", "worker anchors", "worker labels", "train", "serve", "topics create"} <= set(commands)


def test_dependencies_volumes_and_files_exist() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            condition = how["condition"]
            assert other in SERVICES, f"{name} depends on {other}"
            if condition == "service_healthy":
                assert "healthcheck" in SERVICES[other], f"{name} waits for the health of {other}, which has no check"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert source == "./data" or (ROOT / source).exists(), f"{name} mounts {source}"
            else:
                assert source in COMPOSE["volumes"], f"{name} mounts {source}"


def test_images_are_pinned_and_ports_stay_on_this_machine() -> None:
    for name, service in SERVICES.items():
        tag = service["image"].rpartition(":")[2]
        assert tag == "local" or re.search(r"\d+\.\d+", tag), f"{name}: image {service['image']}"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port} is open to the network"
        assert name in {"topics", "fit"} or service["restart"] == "unless-stopped"
        assert name in {"topics", "fit"} or "healthcheck" in service, f"{name} has no health check"


def test_the_configuration_in_the_image_fits_the_services(image_settings: Settings) -> None:
    assert image_settings.kafka.bootstrap_servers == "kafka:9092"
    assert image_settings.index.kind == "server"
    assert image_settings.index.url.removeprefix("http://").split(":")[0] in SERVICES
    written = (
        image_settings.artefacts,
        image_settings.space.cache,
        image_settings.trainer.checkpoints,
        image_settings.trainer.models,
    )
    assert {path.parts[0] for path in written} == {"runs"}, "only runs/ is a volume"
    for name in ("profiles", "anchors", "labels", "trainer"):
        assert f":{image_settings.metrics.port}/health" in OURS[name]["healthcheck"]["test"][-1]
    assert f":{image_settings.serve.port}/health" in OURS["scorer"]["healthcheck"]["test"][-1]


@pytest.mark.parametrize("name", OURS)
def test_environment_of_services_is_known_to_the_settings(
    name: str, image_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in OURS[name]["environment"].items():
        section, _, key = variable.removeprefix("GPL_").lower().partition("__")
        assert key in type(getattr(image_settings, section)).model_fields, f"{name}: {variable} is no setting"
        monkeypatch.setenv(variable, str(value))
    assert settings_module.load(ROOT / "deploy/gpl.toml").kafka.bootstrap_servers in OURS[name]["environment"].values()


# --- image ---


def docker_copies() -> list[str]:
    lines = re.findall(r"^COPY (?!--from)(.+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_the_image_copies_what_exists_and_is_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = docker_copies()
    assert {"gpl", "streams", "pyproject.toml", "constraints.txt"} <= set(copies)
    for source in copies:
        assert (ROOT / source).exists(), f"COPY {source}"
        assert source in allowed, f"COPY {source}: .dockerignore leaves it out"
    force_included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(force_included["force-include"]) <= set(copies), "the wheel is built from these"


def test_the_image_has_the_extras_that_are_asked_for() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text()
    said = re.search(r'^ARG EXTRAS="(.+)"$', dockerfile, re.MULTILINE)
    assert said is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"serve", "minilm"} <= set(said[1].split()) <= set(known)
    assert COMPOSE["x-gpl"]["build"]["args"]["EXTRAS"] == f"${{EXTRAS:-{said[1]}}}"
    # As the shell of the image expands it.
    options = re.search(r"\$\(printf .+?\)", dockerfile)
    assert options is not None
    shell = subprocess.run(["sh", "-c", f"echo {options[0]}"], env={"EXTRAS": "serve lora"}, capture_output=True)
    assert shell.stdout.split() == b"--extra serve --extra lora".split()


def test_the_image_does_not_run_as_root_and_pins_what_make_pins() -> None:
    dockerfile, makefile = ((ROOT / name).read_text() for name in ("deploy/Dockerfile", "Makefile"))
    assert re.findall(r"^USER (\d+)", dockerfile, re.MULTILINE)[-1] != "0"
    dockers = re.search(r"ARG UV_VERSION=(\S+)", dockerfile)
    makes = re.search(r"UV_VERSION := (\S+)", makefile)
    assert dockers is not None
    assert makes is not None
    assert dockers[1] == makes[1]
    # The user of the image cannot keep compiled modules; without them each start compiles torch.
    assert "UV_COMPILE_BYTECODE=1" in dockerfile.partition("uv pip install")[0]


def test_constraints_pin_exact_versions_and_name_no_index() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 50
    assert [line for line in pins if not re.match(r"^[A-Za-z0-9._-]+==[^ ]+( ; .+)?$", line)] == []
    pinned = {re.split(r"==", line)[0].lower() for line in pins}
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[<>=\[]", line)[0].lower() for line in wanted} <= pinned


# --- Prometheus and Grafana ---


def declared() -> dict[str, str]:
    """Names that a scrape can hold, with their type."""
    names = {"up": "gauge"}
    names |= dict(re.findall(r"^# TYPE (process_\w+) (\w+)$", generate_latest().decode(), re.MULTILINE))
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            for family in metric.describe():
                suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
                names |= {family.name + suffix: family.type for suffix in suffixes}
    return names


def names(metric: MetricWrapperBase) -> list[str]:
    return [family.name + ("_total" if family.type == "counter" else "") for family in metric.describe()]


def label_names(metric: str) -> set[str]:
    base = re.sub(r"_(total|bucket|sum|count)$", "", metric)
    found = next(m for m in vars(metrics).values() if isinstance(m, MetricWrapperBase) and m._name in (base, metric))
    return {*found._labelnames, "le", "instance", "job", "role"}


def expressions() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_expressions_name_declared_metrics_and_labels(where: str, expression: str) -> None:
    known, recorded = declared(), {rule["record"] for rule in RULES if "record" in rule}
    for name in re.findall(r"\b(?:gpl|process)_\w+", expression):
        assert name in known, f"{where}: {name} is not declared in streams/metrics.py"
    for name in re.findall(r"\bgpl:[\w:]+", expression):
        assert name in recorded, f"{where}: no rule records {name}"
    for name, selector in re.findall(r"\b(gpl_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]~?", selector)) <= label_names(name), f"{where}: labels of {name}"
    for name in re.findall(r"\b(?:rate|increase)\((gpl_\w+)", expression):
        assert known[name] != "gauge", f"{where}: rate of the gauge {name}"


def test_the_dashboard_shows_most_of_what_is_measured() -> None:
    text = json.dumps([expression for _, expression in expressions()])
    unseen = {name for name in declared() if name.startswith("gpl_") and not re.search(rf"{name}\b", text)}
    assert {name for name in unseen if not name.endswith(("_sum", "_count"))} == set()
    panels = [panel["gridPos"] | {"id": panel["id"]} for panel in DASHBOARD["panels"]]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["x"] + panel["w"] <= 24 for panel in panels)


def test_alerts_say_what_happened_and_how_urgent_it_is() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule["labels"]["severity"] in {"page", "warn"}, rule["alert"]
        assert rule["annotations"]["summary"], rule["alert"]


def test_nobody_is_told_to_start_a_second_trainer() -> None:
    alerts = {rule["alert"]: rule for rule in RULES if "alert" in rule}
    for name, rule in alerts.items():
        if "Start another process of the role," in rule["annotations"].get("description", ""):
            chosen = re.findall(r"gpl:consumer_lag:sum(\{[^}]*\})?", rule["expr"])
            assert chosen and set(chosen) == {'{role!="trainer"}'}, name
    lag, trainers = alerts["GplConsumerLag"], alerts["GplTrainerLag"]
    assert trainers["expr"] == lag["expr"].replace('role!="trainer"', 'role="trainer"')
    assert "--ranks" in trainers["annotations"]["description"]


def test_a_process_that_is_started_again_and_again_is_told_of(image_settings: Settings) -> None:
    (rule,) = (rule for rule in RULES if "changes(process_start_time_seconds" in rule["expr"])
    jobs = re.search(r'job=~"([^"]+)"', rule["expr"])
    assert jobs is not None and set(jobs[1].split("|")) <= set(SCRAPES)
    # Standing still is over before an alert of the heartbeat fires, where the process then ends.
    (stalled,) = (rule for rule in RULES if rule.get("alert") == "GplLoopStalled")
    assert image_settings.metrics.exit_when_stalled and rule["alert"] in stalled["annotations"]["description"]


def test_the_alertmanager_to_be_named_is_where_prometheus_reads_it() -> None:
    text = (ROOT / "deploy/prometheus/prometheus.yml").read_text()
    stub = re.search(r"^# alerting:\n(#   .*\n)+", text, re.MULTILINE)
    assert stub is not None
    named = yaml.safe_load(stub[0].replace("# ", "", 1).replace("\n# ", "\n"))
    assert named["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]


def test_alerts_see_the_first_of_a_kind() -> None:
    volumes = {"gpl_events_total"}  # never a matter of one
    for rule in RULES:
        for name in re.findall(r"increase\((gpl_\w+)", rule["expr"] if "alert" in rule else ""):
            metric = next(m for m in vars(metrics).values() if isinstance(m, MetricWrapperBase) and name in names(m))
            begins_at_0 = not metric._labelnames or bool(metric._metrics)
            assert begins_at_0 or name in volumes or f"{name} unless {name} offset" in rule["expr"], rule["alert"]


def test_counters_that_begin_at_0_have_the_values_that_the_code_counts() -> None:
    from streams.trainer.gate import RULES as REFUSALS  # brings torch

    reasons = get_args(get_type_hints(contracts.AnchorRequest)["reason"])
    outcomes = get_args(get_type_hints(contracts.Label)["outcome"])
    for counter, values in (
        (metrics.ANCHOR_REQUESTS, reasons),
        (metrics.ANCHORS_REFRESHED, reasons),
        (metrics.REQUESTS_CLOSED, outcomes),
        (metrics.PUBLICATIONS_REFUSED, REFUSALS),
    ):
        assert {value for (value,) in counter._metrics} == set(values), counter


def test_panels_draw_what_every_process_exports_only_where_it_means_something() -> None:
    """A gauge without labels is 0 in the processes that never set it."""
    gauges = [m._name for m in vars(metrics).values() if isinstance(m, Gauge) and not m._labelnames]
    for panel in DASHBOARD["panels"]:
        for expression in (target["expr"] for target in panel.get("targets", [])):
            for name in re.findall(rf"\b(?:{'|'.join(gauges)})\b", expression):
                chosen = rf"{name}(\{{role| > 0)|\b(sum|max)\({name}\)"
                assert re.search(chosen, expression), f"{panel['title']}: {expression}"


def test_feedback_that_two_roles_read_is_counted_once() -> None:
    for where, expression in expressions():
        for selector in re.findall(r"gpl_events_total(\{[^}]*\})?", expression):
            once = "role" in selector or 'topic="recalls"' in selector or "by (role" in expression
            assert once, f"{where}: {expression}"


def test_models_in_rules_are_those_of_the_trainer() -> None:
    from streams.trainer.trainer import MAIN, SHADOW  # brings torch; the rest of this file does without

    named = {model for _, text in expressions() for model in re.findall(r'gpl_progressive\{[^}]*model="(\w+)"', text)}
    assert named == {MAIN, SHADOW}


def test_prometheus_scrapes_every_process(image_settings: Settings) -> None:
    scraped = {
        name: sd["port"]
        for scrape in SCRAPES.values()
        for sd in scrape.get("dns_sd_configs", [])
        for name in sd["names"]
    }
    assert scraped == {
        **dict.fromkeys(("profiles", "anchors", "labels", "trainer"), image_settings.metrics.port),
        "scorer": image_settings.serve.port,
    }
    assert set(scraped) <= set(SERVICES)


# --- reference pages ---


@pytest.mark.parametrize("path", reference.PAGES)
def test_reference_pages_say_what_the_code_says(path: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == reference.PAGES[path](), "python -m tests.reference"


def test_every_metric_stands_on_its_page() -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    every = [m for m in vars(metrics).values() if isinstance(m, MetricWrapperBase)]
    assert page.count("\n| `gpl_") == len(every) and all(f"`{names(m)[0]}`" in page for m in every)
