"""Evaluation: BM25 candidates, ranking metrics with intervals, paired significance, calibration, TREC files.

Import the modules themselves (`from jaxslm.evaluate.rerank import evaluate_ranker`): this package loads nothing
by itself. Nothing here imports `jaxslm.train`.
"""
