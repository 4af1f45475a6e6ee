"""What a test starts finds this package; and `pytest --nbval notebooks/` runs without further flags: from this folder,
from notebooks/, and with -n 2 --dist loadscope."""

import os
from pathlib import Path

ROOT = str(Path(__file__).parent)


def pytest_configure(config):
    paths = [ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)  # pytest's does not reach a kernel
    if getattr(config.option, "nbval", False) or getattr(config.option, "nbval_lax", False):
        config.option.nbval_current_env = True  # the kernel of this environment, whatever a notebook's is called
        config.option.nbval_cell_timeout = min(config.option.nbval_cell_timeout, 300)  # seconds; 2000 hides a hang
        if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several kernels on the same cores wait for each other
            os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # a notebook: warnings hold paths, and name no result
        collector.skip_compare += ("stderr",)
