"""The item store: items as records of embedding tokens, under their ids, in LMDB or Valkey."""
