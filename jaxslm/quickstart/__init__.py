"""`jaxslm quickstart`: the whole pipeline on real postings, at the size of a laptop, each stage in words."""

from jaxslm.quickstart.pipeline import run as run
