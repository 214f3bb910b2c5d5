"""Which embeddings there are."""

from typing import Literal, get_args

Encoder = Literal["wordllama", "minilm", "uae", "given"]
ENCODERS: tuple[Encoder, ...] = get_args(Encoder)
