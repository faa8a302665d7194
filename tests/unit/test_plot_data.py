"""The plot in docs/explain/routing.md shows the results in bench/results."""

from __future__ import annotations

import json
import subprocess
import sys

from repository import REPOSITORY

SCRIPT = REPOSITORY / "bench" / "plot_data.py"
DATA = REPOSITORY / "docs" / "explain" / "routing" / "plot.json"
STRATEGIES = ["LeastLoad", "PrefixHash", "PrefixCache"]


def test_the_plots_data_is_what_the_results_give():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_choice_in_the_plot_has_the_same_points_for_every_strategy():
    traffics = json.loads(DATA.read_text())["traffics"]
    assert len(traffics) > 1
    for traffic in traffics:
        for series in traffic["shares"].values():
            assert list(series) == STRATEGIES
            places = [[point["x"] for point in line] for line in series.values()]
            assert places[0] == sorted(set(places[0]))
            assert places == [places[0]] * len(STRATEGIES)
