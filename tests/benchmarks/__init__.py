"""Long experiments that print tables; run one with `python -m tests.benchmarks.NAME`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported
