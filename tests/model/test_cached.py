import numpy as np
import pytest
import torch

from peg.errors import StageError
from peg.model.cached import LocalTexts, StepSettings, accumulate_gradients
from peg.model.distributed import Alone
from peg.model.encoder import Encoder
from peg.model.losses import Columns
from peg.model.microbatch import pad_ids
from peg.model.objective import Targets, info_nce
from peg.model.weighting import progressive
from tests.conftest import make_encoder, make_texts
from tests.model.naive import naive_loss

N, M = 6, 14
POSITIVE = torch.tensor([0, 3, 3, 7, 9, 13])
MASKED = [(1, 5), (4, 0)]


def settings(**changes: object) -> StepSettings:
    values: dict[str, object] = {
        "objective": info_nce(temperature=0.1, weights=progressive(a=0.4, b=0.3, temperature=0.1), score_block=4 * M),
        "micro_batch_tokens": 64,
        "keep_activations_tokens": 0,
        "precision": "fp32",
        "dropout_seed": 5,
    }
    return StepSettings(**{**values, **changes})  # type: ignore[arg-type]


def texts(encoder: Encoder) -> LocalTexts:
    ids = encoder.tokenize(make_texts(N, seed=1), kind="query")
    ids += encoder.tokenize(make_texts(M, seed=2), kind="passage")
    rows = torch.tensor(MASKED).T.contiguous()
    return LocalTexts(
        ids=[np.asarray(one) for one in ids],
        query_rank=torch.zeros(N, dtype=torch.int64),
        targets=Targets("retrieval", Columns(POSITIVE, rows[0], rows[1]), None, None, None),
    )


def gradient(encoder: Encoder) -> torch.Tensor:
    return torch.cat([parameter.grad.reshape(-1) for parameter in encoder.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_cached_gradient_is_the_plain_gradient(pooling: str) -> None:
    encoder = make_encoder(pooling=pooling).double().train()
    local = texts(encoder)
    loss, _ = accumulate_gradients(encoder, local, settings(), Alone())
    found = gradient(encoder)
    encoder.zero_grad()
    rows = encoder(*pad_ids(local.ids, pad_id=1, device=torch.device("cpu")))
    expected = naive_loss(rows[:N], rows[N:], POSITIVE, MASKED, temperature=0.1, a=0.4, b=0.3)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-10)
    torch.testing.assert_close(found, gradient(encoder), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("keep", [0, 100, 10_000])
def test_kept_activations_change_nothing_even_with_dropout(keep: int) -> None:
    found = {}
    for budget in (0, keep):
        encoder = make_encoder(dropout=0.2).train()
        accumulate_gradients(encoder, texts(encoder), settings(keep_activations_tokens=budget), Alone())
        found[budget] = gradient(encoder)
    assert torch.equal(found[0], found[keep])


def test_dropout_is_replayed_and_differs_between_seeds() -> None:
    losses = []
    for seed in (5, 5, 6):
        encoder = make_encoder(dropout=0.2).train()
        losses.append(accumulate_gradients(encoder, texts(encoder), settings(dropout_seed=seed), Alone())[0])
    assert losses[0] == losses[1] != losses[2]


def test_a_second_pass_that_differs_is_stopped() -> None:
    encoder = make_encoder().train()
    embeddings = encoder.backbone.embeddings
    embeddings.register_forward_hook(lambda *args: args[2] + 0.1 * np.random.default_rng().normal())
    with pytest.raises(StageError, match="second pass differs"):
        accumulate_gradients(encoder, texts(encoder), settings(), Alone())


def test_the_callers_random_numbers_stay_as_they_were() -> None:
    encoder = make_encoder(dropout=0.2).train()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    accumulate_gradients(encoder, texts(encoder), settings(), Alone())
    assert torch.equal(torch.rand(3), expected)
