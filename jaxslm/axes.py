"""The axis legend: one letter, one meaning, everywhere in the package.

B rows in a batch        T tokens of a row          S key/value tokens     P prefix tokens
J items of a request     C compressed tokens        L layers               R requests in a forward pass
D model width            N query heads              K key/value heads      G query heads per KV head
H head width             F MLP width                V vocabulary           M tokens of all rows, packed flat

An array's name ends in its letters (`x_BTD`), einsum strings use them, and a trailing digit tells two axes of one
kind apart. Masks say what True keeps.
"""

from jaxtyping import Array, Bool, Float, Int

TokenIds = Int[Array, "B T"]
Valid = Bool[Array, "B T"]
Hidden = Float[Array, "B T D"]
LabelLogits = Float[Array, "B 2"]
"""Logits of (no, yes), in this order everywhere."""
