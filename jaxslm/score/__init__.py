"""Scoring of requests with a loaded ranker."""
