"""Ray: where runs, clients and sweeps are placed. No other room imports it."""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported
