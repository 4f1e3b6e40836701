"""From item ids to vectors on the way to the ranker: nothing stale or damaged gets through."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxslm.errors import InputError
from jaxslm.items.record import CorruptRecord, RecordIdentity, StaleRecord, Vectors, unpack_vectors
from jaxslm.items.store import Store

Status = Literal["found", "not_found", "stale", "corrupt"]


@dataclass(frozen=True)
class Lookup:
    """Per id, in the order asked: its vectors, float32 [C, D], or None, and why.

    Attributes:
        status: "found"; "not_found"; "stale": made for another model or release; "corrupt": damaged.
    """

    vectors: list[Vectors | None]
    status: list[Status]

    @property
    def counts(self) -> dict[Status, int]:
        """How many ids have each status that occurs."""
        return dict(Counter(self.status))


class ItemVectors:
    """The vectors of a store's items for one model. Safe for threads."""

    def __init__(self, store: Store, identity: RecordIdentity) -> None:
        self.store = store
        self.identity = identity

    def get(self, ids: Sequence[str]) -> Lookup:
        """Returns the vectors of these items; ids may repeat. Raises StoreUnavailable if the store fails."""
        found = self.store.get(ids)
        answers = iter(unpack_vectors([data for data in found if data is not None], self.identity))
        vectors: list[Vectors | None] = []
        status: list[Status] = []
        for data in found:
            answer = None if data is None else next(answers)
            if answer is None:
                state: Status = "not_found"
            elif isinstance(answer, StaleRecord):
                state = "stale"
            elif isinstance(answer, CorruptRecord):
                state = "corrupt"
            else:
                state = "found"
            status.append(state)
            vectors.append(None if isinstance(answer, InputError) else answer)
        return Lookup(vectors, status)

    def check_store(self, sample: int = 100) -> None:
        """Refuses a store that cannot serve this model: call it before any work.

        Raises:
            InputError: the store is empty.
            StaleRecord or CorruptRecord: none of its first `sample` records can be used; the message is the first
                one's, with both hashes if it was made for another model.
            StoreUnavailable: the store fails.
        """
        ids = [item_id for item_id, _ in zip(self.store.ids(), range(sample), strict=False)]
        records = [data for data in self.store.get(ids) if data is not None]
        if not records:
            raise InputError(f"store {self.store.url}: holds no items; `jaxslm encode` fills it")
        answers = unpack_vectors(records, self.identity)
        problems = [answer for answer in answers if isinstance(answer, InputError)]
        if len(problems) == len(answers):
            raise type(problems[0])(f"store {self.store.url}: {problems[0]}")
