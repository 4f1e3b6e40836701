"""A teacher that reads the student's batches: any ranker with the same tokenizer and prompt."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxslm.checkpoint import Checkpoint, load_checkpoint
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.head import label_rows
from jaxslm.train.step import Batch, ItemStates, gather, item_states


@dataclass(frozen=True)
class Teacher:
    """A teacher and where it runs. Its parameters go through the step's arguments, not into the compiled program."""

    params: Params
    decoder: Decoder
    label_token_ids: tuple[int, int]
    mesh: Mesh

    def states(self, params: Params, batch: Batch, *, every: bool = False) -> tuple[ItemStates, Array]:
        """Returns (`item_states` of a batch, head rows of (no, yes) [2, D])."""
        gathered = gather(params, self.decoder.dtype, self.mesh)
        states = item_states(self.decoder, gathered, batch, self.mesh, every=every)
        return states, label_rows(params, self.label_token_ids)


def load_teacher(path: Path, student: Checkpoint, dtype: jnp.dtype, mesh: Mesh, *, hidden: bool) -> Teacher:
    """Returns the teacher of a checkpoint, whole on every device.

    Args:
        student: what it teaches; its manifest holds the prompt of the training run.
        hidden: whether hidden states are compared, which needs equal widths.

    Raises:
        InputError: it reads other token ids than the student, or its states have another width.
    """
    checkpoint = load_checkpoint(path, NamedSharding(mesh, P()))
    ours, theirs = student.manifest, checkpoint.manifest
    same_text = checkpoint.prompt.sha256 == student.prompt.sha256
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256 or not same_text:
        raise InputError(
            f"teacher {path}: has another tokenizer or prompt than the student; score the lists with `jaxslm score`"
            " and set data.teacher_requests and data.teacher_scores"
        )
    if hidden and theirs.ranker.model.width != ours.ranker.model.width:
        raise InputError(
            f"teacher {path}: losses.hidden needs states of the student's width {ours.ranker.model.width},"
            f" the teacher's have {theirs.ranker.model.width}"
        )
    decoder = Decoder(theirs.ranker.model, dtype)
    return Teacher(checkpoint.params, decoder, theirs.ranker.label_token_ids, mesh)
