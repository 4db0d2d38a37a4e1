"""Everything that runs on Ray: runs, clients and sweeps. No other folder imports Ray."""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported
