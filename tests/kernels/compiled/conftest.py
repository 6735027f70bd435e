"""Triton kernels compiled for GPUs that are not there. Not collected where they are interpreted."""

import importlib.util
import os

if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser):
    parser.addoption("--renew", action="store_true", help="write benchmarks/resources.md anew")
