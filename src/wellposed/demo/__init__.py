"""The run of all rooms and its page."""

from wellposed.demo.run import run_demo
from wellposed.demo.settings import DemoSettings

__all__ = ["DemoSettings", "run_demo"]
