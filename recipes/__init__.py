"""Experiments as data: a YAML file, the planner that turns it into content-addressed cells, and the runner."""

from pathlib import Path

LAB_DEMO = Path(__file__).parent / "lab" / "demo.yaml"
