"""Write rliable.json: what rliable says of a fixed matrix of scores, for test_stats.py.

rliable does not import beside pandas 3, so it lives in an environment of its own:

    python3.11 -m venv rliable_env && rliable_env/bin/pip install "pandas<3" rliable
    rliable_env/bin/python tests/golden/make_rliable.py
"""

import datetime
import importlib.metadata
import json
import pathlib

import numpy as np
from rliable import library, metrics

AGGREGATES = {
    "mean": metrics.aggregate_mean,
    "median": metrics.aggregate_median,
    "iqm": metrics.aggregate_iqm,
    "optimality_gap": metrics.aggregate_optimality_gap,
}
REPLICATES = {"aggregates": 20_000, "profile": 20_000, "improvement": 5_000}


def estimate(scores, function, replicates):
    # rliable 1.2.0 draws from the global generator whatever random_state it is given
    np.random.seed(0)
    points, intervals = library.get_interval_estimates(
        {"it": scores}, lambda *args: np.atleast_1d(function(*args)), reps=replicates
    )
    low, high = intervals["it"]
    return {"point": points["it"].tolist(), "low": low.tolist(), "high": high.tolist()}


def main():
    rng = np.random.default_rng(0)
    # one decimal, so that runs tie within and across the algorithms
    tasks = rng.uniform(0.2, 1.2, size=5)
    x = np.round(rng.normal(tasks + 0.1, 0.4, size=(10, 5)), 1)
    y = np.round(rng.normal(tasks, 0.3, size=(8, 5)), 1)
    thresholds = np.linspace(-0.25, 2.0, 10)

    golden = {
        "date": datetime.date.today().isoformat(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("rliable", "pandas", "arch", "numpy", "scipy")
        },
        "replicates": REPLICATES,
        "x": x.tolist(),
        "y": y.tolist(),
        "thresholds": thresholds.tolist(),
    }
    for algorithm, scores in (("x", x), ("y", y)):
        golden[f"aggregates_{algorithm}"] = {
            name: estimate(scores, function, REPLICATES["aggregates"])
            for name, function in AGGREGATES.items()
        }
    golden["profile_x"] = estimate(
        x, lambda scores: library.score_distributions(scores, thresholds), REPLICATES["profile"]
    )
    golden["improvement"] = estimate(
        (x, y), metrics.probability_of_improvement, REPLICATES["improvement"]
    )
    path = pathlib.Path(__file__).with_name("rliable.json")
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
