"""Build script. All metadata is in pyproject.toml; a pure-Python install needs no compiler."""

from setuptools import setup

setup()
