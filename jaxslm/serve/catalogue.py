"""The item store behind the routes: ids become vectors, and items become records."""

from collections.abc import Callable, Collection, Sequence

from jaxslm.compress.catalogue import Summary, encode_catalogue
from jaxslm.compress.encoder import ItemEncoder
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.items.lookup import ItemVectors, Lookup, Status
from jaxslm.items.record import StorageDtype
from jaxslm.items.store import Store
from jaxslm.serve.metrics import Metrics


class Catalogue:
    """Items of one store for one encoder. Safe for threads. Every method raises StoreUnavailable if the store fails.

    Attributes:
        ks: how many vectors an item may have here, in rising order.
    """

    def __init__(
        self, store: Store, encoder: ItemEncoder, dtype: StorageDtype, metrics: Metrics, compiled: Collection[int]
    ) -> None:
        """Args: compiled: the numbers of vectors that the ranker's shapes take; an item of others is never scored.

        Raises:
            InputError: none of them is one that the encoder makes.
        """
        self.encoder = encoder
        self.ks = sorted(set(encoder.ks) & set(compiled))
        if not self.ks:
            made = ", ".join(map(str, encoder.ks))
            raise InputError(f"buckets: none takes vectors of this compressor (k = {made}), which the store holds")
        self._store, self._dtype, self._metrics = store, dtype, metrics
        self._vectors = ItemVectors(store, encoder.identity)

    def lookup(self, ids: Sequence[str]) -> Lookup:
        """Returns the vectors of these ids, and why some have none."""
        found = self._vectors.get(ids)
        for status, number in found.counts.items():
            self._metrics.lookups.labels(status).inc(number)
        return found

    def put(self, items: Sequence[Item], k: int, on_progress: Callable[[Summary], None]) -> Summary:
        """Encodes items into k vectors each and stores those that the store does not have yet; says what was done.

        Args:
            on_progress: is called after each pass of the encoder; what it raises ends the encoding.
        """
        return encode_catalogue(self.encoder, items, {k: self._store}, dtype=self._dtype, on_progress=on_progress)

    def delete(self, ids: Sequence[str]) -> int:
        """Drops what is stored under these ids; returns how many there were."""
        return self._store.delete(ids)

    def sample(self, number: int) -> dict[Status, int]:
        """Returns how many of the first `number` records of the store have each status: what a reload did to them."""
        ids = [item_id for item_id, _ in zip(self._store.ids(), range(number), strict=False)]
        return self._vectors.get(ids).counts
