"""The scoring server: HTTP in front of one ranker, its item store and its score cache."""
