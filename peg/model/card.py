"""The model card: what a model is, what it was trained on and how, and how it is used."""

from typing import Any, assert_never

from peg import config
from peg.model.encoder import Encoder

_BASE = "models/base"  # what the stage `base` makes of base.source
_POOLING_WORDS = {
    "cls": "its first row",
    "last": "its last real token's row",
    "mean": "its mean over the real tokens",
}
_CARD = """---
language: zh
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, retrieval, progressive-contrastive]
---

# {title}

A Chinese text-embedding model of {dimension} dimensions, trained by progressive contrastive learning.

| | |
|---|---|
| started from | `{encoder}` |
| data | {data} |
| training examples | {examples:,} |
| optimizer steps | {steps:,} of {planned_steps:,}; weights of step {best_step:,} |
| batch | {batch_size} queries, up to {num_negatives} hard negatives each; all passages of the batch are negatives |
| temperature | {temperature} |
| weighting | {weighting} |
| pooling | {pooling}, then unit length |
| prompts | query: `{query_prompt}`, passage: `{passage_prompt}` |
| longest text | {max_length} tokens |

## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/of/this/folder")
query = model.encode("{query_prompt}...")
passages = model.encode(["{passage_prompt}..."])
scores = passages @ query
```

With transformers alone: put the prompt before the text, take `AutoModel`'s `last_hidden_state`, {pooling_words}, and
divide by the length of the vector.

## Limits

Trained on the data above and no other: outside its domains expect less. The embeddings repeat whatever bias the
encoder and the data have.
"""


def model_card(recipe: config.Config, encoder: Encoder, summary: dict[str, Any], *, title: str, data: str) -> str:
    """Markdown for the model folder's README.md; the same for the same training."""
    train = recipe.train
    return _CARD.format(
        title=title,
        dimension=encoder.dimension,
        encoder=f"{recipe.base.source} ({recipe.base.num_layers or 'all'} layers)"
        if train.encoder == _BASE
        else train.encoder,
        data=data,
        batch_size=train.batch_size,
        num_negatives=train.num_negatives,
        temperature=train.temperature,
        weighting=_weighting_line(train.weighting),
        pooling=encoder.pooling,
        pooling_words=_POOLING_WORDS[encoder.pooling],
        query_prompt=encoder.prompts.query,
        passage_prompt=encoder.prompts.passage,
        max_length=encoder.max_length,
        **{key: summary[key] for key in ("examples", "steps", "planned_steps", "best_step")},
    )


def _weighting_line(weighting: config.Weighting) -> str:
    match weighting:
        case config.NoWeighting():
            return "none"
        case config.ProgressiveWeighting():
            return f"progressive: negatives {_ramp('a', weighting.negatives)}; queries {_ramp('b', weighting.queries)}"
        case config.TemperatureSchedule():
            return f"none; temperature over 1 + a, {_ramp('a', weighting.exponent)}"
        case config.FocalWeighting():
            return f"focal, gamma = {weighting.gamma}"
        case config.HardnessWeighting():
            return f"constant hardness, alpha = {weighting.alpha}"
        case _:
            assert_never(weighting)


def _ramp(name: str, ramp: config.Ramp) -> str:
    if ramp.shape == "constant" or ramp.start == ramp.end:
        return f"{name} = {ramp.start}"
    return f"{name} from {ramp.start} to {ramp.end}, {ramp.shape}"
