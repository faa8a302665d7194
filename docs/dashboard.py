"""Draw the chart's Grafana dashboard, in docs/how-to/monitoring, from a real Prometheus.

    python docs/dashboard.py --prometheus /usr/bin/prometheus

Starts `kubeai local` with two Models on the mock engine and keys, lets Prometheus scrape it and the
engines, and sends chats whose number rises and falls. Then it evaluates the panels' own queries
and draws them with matplotlib (the extra `plots`): the lines are Prometheus', the frame is not
Grafana's. Takes MINUTES and needs the port 9090.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import matplotlib as mpl
import yaml
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

mpl.use("Agg")
REPOSITORY = Path(__file__).parent.parent
DASHBOARD = REPOSITORY / "charts/kubeai/files/grafana-dashboard.json"
FOLDER = REPOSITORY / "docs/how-to/monitoring"
PICTURES = {"requests": ["Requests", "Routing"], "engines-and-keys": ["vLLM", "API keys"]}
PROMETHEUS = "http://127.0.0.1:9090"
MINUTES = 6
STEP_S = 5
RATE_INTERVAL = "30s"
READY_TIMEOUT_S = 180
LINES_MAX = 8
LEGEND_MAX = 6  # lines
Line = tuple[str, list[float], list[float]]  # name, minutes, values
# The most concurrent clients of each Model, from the first minute to the last.
CLIENTS = {"chat": [4, 30, 90, 90, 30, 8], "coder": [0, 12, 24, 40, 24, 6]}
UNITS = {"s": "s", "percentunit": "%", "bytes": "MiB"}
SCALES = {"percentunit": 100.0, "bytes": 2.0**-20}
STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "svg.fonttype": "none",
    "svg.hashsalt": "kubeai",
    "font.family": "sans-serif",
}


# -- what is measured ------------------------------------------------------------------------------


def manifest(name: str) -> dict[str, Any]:
    """A Model on the mock engine, with up to three replicas."""
    args = ["--startup-delay=3s", "--prefill-tokens-per-second=8000"]
    spec = {
        "features": ["TextGeneration"],
        "url": f"hf://example/{name}",
        "engine": "VLLM",
        "image": "kubeai/mock-engine",
        "args": [*args, "--decode-tokens-per-second=50", "--max-batch=32"],
        "maxReplicas": 3,
        "targetRequests": 16,
        "scaleDownDelaySeconds": 30,
        "loadBalancing": {"strategy": "PrefixHash"},
    }
    return {
        "apiVersion": "kubeai.org/v1",
        "kind": "Model",
        "metadata": {"name": name},
        "spec": spec,
    }


@contextlib.contextmanager
def running(folder: Path, name: str, *command: str, env: dict[str, str]) -> Iterator[None]:
    """Run a program, which ends with the context."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def get(url: str) -> bytes:
    """The body of a response."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return bytes(response.read())


def until(what: str, true: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):
            if true():
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {READY_TIMEOUT_S} s: {what}")
        time.sleep(0.1)


def scrape_config(folder: Path) -> None:
    """Scrape KubeAI, and the engines' pods by a list that :func:`follow_pods` keeps."""
    labels = {"pod": "kubeai-0", "namespace": "kubeai"}
    static = {"targets": ["127.0.0.1:8080"], "labels": labels}
    jobs = [
        {"job_name": "kubeai", "static_configs": [static]},
        {"job_name": "engines", "file_sd_configs": [{"files": [str(folder / "pods.json")]}]},
    ]
    config = {"global": {"scrape_interval": f"{STEP_S}s"}, "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "pods.json").write_text("[]")


async def follow_pods(folder: Path, env: dict[str, str]) -> None:
    """Keep the list of the engines' pods up to date."""
    command = ["kubectl", "get", "pods", "-o", "json"]
    while True:
        done = await asyncio.to_thread(subprocess.run, command, env=env, capture_output=True)
        pods = json.loads(done.stdout or b'{"items": []}')["items"]
        found = [
            {
                "targets": [f"{pod['status']['podIP']}:8000"],
                "labels": {"pod": pod["metadata"]["name"]},
            }
            for pod in pods
            if pod["status"].get("podIP")
        ]
        (folder / "pods.new").write_text(json.dumps(found))
        (folder / "pods.new").rename(folder / "pods.json")
        await asyncio.sleep(STEP_S)


async def chat(session: aiohttp.ClientSession, model: str, number: int, minute_s: float) -> None:
    """A client that has conversations while its minutes last."""
    begun = time.monotonic()
    document = f"Document {number % 12}. " * 60
    while (minute := int((time.monotonic() - begun) / minute_s)) < MINUTES:
        if number >= CLIENTS[model][minute]:
            await asyncio.sleep(1)
            continue
        question = f"{document} Question {secrets.token_hex(4)}"
        body = {
            "model": model,
            "stream": True,
            "max_tokens": 60,
            "messages": [{"role": "user", "content": question}],
        }
        with contextlib.suppress(aiohttp.ClientError):
            async with session.post("/openai/v1/chat/completions", json=body) as response:
                await response.read()
        await asyncio.sleep(0.5)


async def send_load(keys: list[str], folder: Path, env: dict[str, str], minute_s: float) -> None:
    """Send chats for :data:`MINUTES`, by clients that take turns with the keys."""
    pods = asyncio.create_task(follow_pods(folder, env))
    async with contextlib.AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(
                aiohttp.ClientSession(
                    "http://127.0.0.1:8000",
                    headers={"Authorization": f"Bearer {key}"},
                    connector=aiohttp.TCPConnector(limit=0),
                )
            )
            for key in keys
        ]
        await asyncio.gather(
            *(
                chat(sessions[number % len(sessions)], model, number, minute_s)
                for model, clients in CLIENTS.items()
                for number in range(max(clients))
            )
        )
    pods.cancel()


# -- what is drawn ---------------------------------------------------------------------------------


def lines_of(target: dict[str, Any], start: float, end: float) -> list[Line]:
    """The series of a query that are not 0 throughout."""
    query = target["expr"].replace("$__rate_interval", RATE_INTERVAL).replace("$model", ".*")
    options = {"query": query, "start": f"{start}", "end": f"{end}", "step": f"{STEP_S}"}
    answer = json.loads(get(f"{PROMETHEUS}/api/v1/query_range?{urllib.parse.urlencode(options)}"))
    found = []
    for series in answer["data"]["result"]:
        labels = series["metric"]
        fill = lambda match, labels=labels: labels.get(match[1], "")  # noqa: E731
        name = re.sub(r"\{\{\s*(\w+)\s*\}\}", fill, target.get("legendFormat", ""))
        values = [(float(at), float(value)) for at, value in series["values"]]
        if any(value > 0 for _, value in values):
            found.append((name, [(at - start) / 60 for at, _ in values], [v for _, v in values]))
    return sorted(found, key=lambda line: line[0])[:LINES_MAX]


def draw_panel(axes: Axes, panel: dict[str, Any], lines: list[Line], minutes: float) -> None:
    """One panel, with its title, unit and lines."""
    defaults = panel["fieldConfig"]["defaults"]
    unit = defaults.get("unit", "short")
    stacked = defaults["custom"].get("stacking", {}).get("mode") == "normal"
    scale = SCALES.get(unit, 1.0)
    below: dict[float, float] = {}
    for name, times, values in lines:
        scaled = [value * scale for value in values]
        if not stacked:
            axes.plot(times, scaled, label=name, linewidth=1.2)
            continue
        bottom = [below.get(at, 0.0) for at in times]
        top = [low + value for low, value in zip(bottom, scaled, strict=True)]
        axes.fill_between(times, bottom, top, label=name, alpha=0.6, linewidth=0.8)
        below.update(zip(times, top, strict=True))
    title = panel["title"] + (f" ({UNITS[unit]})" if unit in UNITS else "")
    axes.set_title(title, loc="left")
    axes.set_xlim(0, minutes)
    axes.set_ylim(bottom=0)
    if len(lines) <= LEGEND_MAX:
        legend = axes.legend(loc="upper left", fontsize=6.5, frameon=False)
        legend.set_in_layout(False)


def draw(name: str, rows: list[str], start: float, end: float) -> None:
    """A picture with the panels of these rows of the dashboard, but for those without data."""
    row, panels = "", []
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        elif row in rows:
            lines = [line for target in panel["targets"] for line in lines_of(target, start, end)]
            if lines:
                panels.append((panel, lines))
    with plt.rc_context(STYLE):
        count = -(-len(panels) // 3)
        figure, axes = plt.subplots(count, 3, figsize=(11, 2.3 * count), squeeze=False)
        for each, (panel, lines) in zip(axes.flat, panels, strict=False):
            draw_panel(each, panel, lines, (end - start) / 60)
        for each in list(axes.flat)[len(panels) :]:
            each.set_visible(False)
        for each in axes[-1]:
            each.set_xlabel("minutes")
        figure.tight_layout()
        FOLDER.mkdir(exist_ok=True)
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prometheus", default="prometheus", help="the program")
    parser.add_argument("--minute", type=float, default=60.0, help="length of a minute, in s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text, contextlib.ExitStack() as stack:
        folder = Path(text)
        binaries = Path(sys.executable).parent
        env = {
            "HOME": text,
            "PATH": f"{binaries}:/usr/local/bin:/usr/bin:/bin",
            "KUBECONFIG": str(folder / "data/kubeconfig"),
        }
        (folder / "models").mkdir()
        for name in CLIENTS:
            (folder / "models" / f"{name}.yaml").write_text(yaml.safe_dump(manifest(name)))
        (folder / "config.yaml").write_text("metricsAddr: 127.0.0.1:8080\n")
        scrape_config(folder)
        local = ("kubeai", "local", "models", "--require-keys", "--data-dir", str(folder / "data"))
        stack.enter_context(
            running(folder, "kubeai", *local, "--config", str(folder / "config.yaml"), env=env)
        )
        until("KubeAI is ready", lambda: bool(get("http://127.0.0.1:8000/readyz")))
        prometheus = (options.prometheus, f"--config.file={folder / 'prometheus.yml'}")
        stack.enter_context(running(folder, "prometheus", *prometheus, env=env))
        until("Prometheus is ready", lambda: bool(get(f"{PROMETHEUS}/-/ready")))
        keys = [
            subprocess.check_output(
                ["kubeai", "key", "create", name, "--tenant", tenant], env=env, text=True
            ).strip()
            for name, tenant in (("web", "acme"), ("batch", "acme"), ("agents", "globex"))
        ]
        start = time.time()
        asyncio.run(send_load(keys, folder, env, options.minute))
        end = time.time()
        for name, rows in PICTURES.items():
            draw(name, rows, start, end)


if __name__ == "__main__":
    main()
