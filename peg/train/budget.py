"""How many tokens a micro-batch has: what the recipe says, or what the GPU was found to hold."""

import numpy as np
import torch

from peg.config import Train
from peg.model.cached import autocast
from peg.model.encoder import Encoder
from peg.model.microbatch import auto_token_budget

_CPU_TOKENS = 1024  # docs/LOG.md: 512 to 4,096 differ by little on two cores, and memory grows with them
_START, _LIMIT = 2048, 1 << 20


def micro_batch_tokens(encoder: Encoder, config: Train) -> int:
    """Tokens of a micro-batch on this rank; 'auto' tries growing ones on the GPU, with texts of the longest kind."""
    if config.micro_batch_tokens != "auto":
        return config.micro_batch_tokens
    if encoder.device.type != "cuda":
        return _CPU_TOKENS
    length = max(config.query_max_length, config.passage_max_length)

    def step(tokens: int) -> None:
        texts = np.full((-(-tokens // length), length), encoder.pad_id, dtype=np.int64)
        texts[:] = np.arange(length) % len(encoder.tokenizer)
        with autocast(config.precision, encoder.device):
            rows_BD = encoder.embed(list(texts))
        rows_BD.sum().backward()  # type: ignore[no-untyped-call]
        encoder.zero_grad(set_to_none=True)

    # AdamW's two moments and a running mean are made at the first step: the trial leaves their place free
    later = [torch.empty_like(one) for one in encoder.parameters() if one.requires_grad for _ in range(3)]
    budget = auto_token_budget(step, start=max(_START, length), limit=_LIMIT)
    del later
    return budget
