"""The item store behind the routes: ids become vectors, and items become records."""

from collections.abc import Sequence

from jaxslm.compress.catalogue import Summary, encode_catalogue
from jaxslm.compress.encoder import ItemEncoder
from jaxslm.data_files import Item
from jaxslm.items.lookup import ItemVectors, Lookup, Status
from jaxslm.items.record import StorageDtype
from jaxslm.items.store import Store
from jaxslm.serve.metrics import Metrics


class Catalogue:
    """Items of one store for one encoder. Safe for threads. Every method raises StoreUnavailable if the store fails."""

    def __init__(self, store: Store, encoder: ItemEncoder, dtype: StorageDtype, metrics: Metrics) -> None:
        self.encoder = encoder
        self._store, self._dtype, self._metrics = store, dtype, metrics
        self._vectors = ItemVectors(store, encoder.identity)

    def lookup(self, ids: Sequence[str]) -> Lookup:
        """Returns the vectors of these ids, and why some have none."""
        found = self._vectors.get(ids)
        for status, number in found.counts.items():
            self._metrics.lookups.labels(status).inc(number)
        return found

    def put(self, items: Sequence[Item], k: int) -> Summary:
        """Encodes items into k vectors each and stores those that the store does not have yet; says what was done."""
        return encode_catalogue(self.encoder, items, {k: self._store}, dtype=self._dtype)

    def delete(self, ids: Sequence[str]) -> int:
        """Drops what is stored under these ids; returns how many there were."""
        return self._store.delete(ids)

    def sample(self, number: int) -> dict[Status, int]:
        """Returns how many of the first `number` records of the store have each status: what a reload did to them."""
        ids = [item_id for item_id, _ in zip(self._store.ids(), range(number), strict=False)]
        return self._vectors.get(ids).counts
