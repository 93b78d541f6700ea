import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor

from peg.adapters.sentence_transformers import ProgressiveLoss
from peg.config import HardnessWeighting, NoWeighting, ProgressiveWeighting, Ramp, Weighting
from peg.errors import StageError
from tests.conftest import make_encoder, make_texts
from tests.model.naive import naive_loss

N = 5
PLAIN = NoWeighting(kind="none")
RISING = Ramp(shape="linear", start=-0.3, end=0.5)
PROGRESSIVE = ProgressiveWeighting(kind="progressive", negatives=RISING, queries=RISING)


@pytest.fixture
def model(encoder_folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(encoder_folder), device="cpu").double().train()


def loss_of(model: SentenceTransformer, weighting: Weighting = PLAIN, **changes: Any) -> ProgressiveLoss:
    knobs = {"temperature": 0.1, "num_steps": 3, "mini_batch_tokens": None, "margin": None, "score_block": 20}
    return ProgressiveLoss(model, weighting=weighting, **{**knobs, **changes})


def columns(model: SentenceTransformer, *texts: list[str]) -> list[dict[str, Any]]:
    return [dict(model.tokenize(column)) for column in texts]


def texts_of(count: int, *, seed: int) -> list[list[str]]:
    texts = make_texts(count * N, seed=seed)
    return [texts[start : start + N] for start in range(0, len(texts), N)]


def step(model: SentenceTransformer, loss: torch.nn.Module, features: list[dict[str, Any]]) -> tuple[float, Tensor]:
    model.zero_grad()
    value = loss(features, None)
    value.backward()
    grads = [parameter.grad.reshape(-1) for parameter in model.parameters() if parameter.grad is not None]
    return float(value.detach()), torch.cat(grads)


@pytest.mark.parametrize("mini_batch_tokens", [None, 40])
def test_without_weighting_it_is_the_librarys_own_loss(
    model: SentenceTransformer, mini_batch_tokens: int | None
) -> None:
    texts = texts_of(4, seed=1)
    own = MultipleNegativesRankingLoss(model, scale=10.0)
    expected, expected_grad = step(model, own, columns(model, *texts))
    found, grad = step(model, loss_of(model, mini_batch_tokens=mini_batch_tokens), columns(model, *texts))
    assert found == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(grad, expected_grad, atol=1e-9, rtol=1e-7)


def test_hardness_is_the_librarys_own(model: SentenceTransformer) -> None:
    if "hardness_mode" not in inspect.signature(MultipleNegativesRankingLoss).parameters:
        pytest.skip("this sentence-transformers has no hardness_mode")
    texts = texts_of(3, seed=2)
    own = MultipleNegativesRankingLoss(model, scale=10.0, hardness_mode="all_negatives", hardness_strength=5.0)
    expected, expected_grad = step(model, own, columns(model, *texts))
    found, grad = step(model, loss_of(model, HardnessWeighting(kind="hardness", alpha=5.0)), columns(model, *texts))
    assert found == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(grad, expected_grad, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("mini_batch_tokens", [None, 40])
def test_a_text_that_occurs_twice_is_one_column_and_no_negative_of_its_query(
    model: SentenceTransformer, mini_batch_tokens: int | None
) -> None:
    queries, positives, negatives = texts_of(3, seed=3)
    queries[3] = queries[0]  # so each other's positives are no negatives
    negatives[1] = positives[2]
    loss = loss_of(model, PROGRESSIVE, mini_batch_tokens=mini_batch_tokens)
    found, grad = step(model, loss, columns(model, queries, positives, negatives))

    def embed(texts: list[str]) -> Tensor:
        return model(columns(model, texts)[0])["sentence_embedding"]

    distinct = [*positives, *(text for text in negatives if text not in positives)]
    assert len(distinct) == 2 * N - 1
    model.zero_grad()
    own, masked = torch.arange(N), [(0, 3), (3, 0)]
    expected = naive_loss(embed(queries), embed(distinct), own, masked, temperature=0.1, a=-0.3, b=-0.3)
    expected.backward()
    assert found == pytest.approx(expected.item(), abs=1e-10)
    expected_grad = torch.cat([one.grad.reshape(-1) for one in model.parameters() if one.grad is not None])
    torch.testing.assert_close(grad, expected_grad, atol=1e-9, rtol=1e-7)


def test_the_weighting_moves_with_every_call_that_has_gradients(model: SentenceTransformer) -> None:
    features = columns(model, *texts_of(3, seed=4))
    harder = ProgressiveWeighting(
        kind="progressive", negatives=RISING, queries=Ramp(shape="constant", start=0.0, end=0.0)
    )
    loss = loss_of(model, harder)
    with torch.no_grad():
        values = [float(loss(features))]
    values += [float(loss(features).detach()) for _ in range(4)]
    assert values[0] == values[1] < values[2] < values[3] == values[4]


@pytest.mark.parametrize("mini_batch_tokens", [None, 40])
def test_the_gradient_is_scaled_by_what_the_loss_is_scaled_by(
    model: SentenceTransformer, mini_batch_tokens: int | None
) -> None:
    features = columns(model, *texts_of(2, seed=5))
    loss = loss_of(model, mini_batch_tokens=mini_batch_tokens)
    _, grad = step(model, loss, features)
    _, scaled = step(model, lambda *inputs: loss(*inputs) / 4, features)  # type: ignore[arg-type]
    torch.testing.assert_close(scaled * 4, grad)


def test_dropout_is_replayed_and_the_callers_random_numbers_go_on(tmp_path: Path) -> None:
    make_encoder(dropout=0.2).save(tmp_path / "dropout")
    model = SentenceTransformer(str(tmp_path / "dropout"), device="cpu").train()
    loss = loss_of(model, mini_batch_tokens=40)
    features = columns(model, *texts_of(2, seed=6))
    values = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        value = loss(features)
        expected = torch.rand(3)
        value.backward()  # would stop at dropout that is not the forward pass's
        torch.manual_seed(seed)
        values.append(float(loss(features).detach()))
        assert values[-1] == float(value.detach())
        assert torch.equal(torch.rand(3), expected)
    assert values[0] == values[2] != values[1]


def test_a_model_that_cannot_be_replayed_is_stopped(model: SentenceTransformer) -> None:
    generator = np.random.default_rng(0)
    model[0].register_forward_hook(
        lambda *args: {**args[2], "token_embeddings": args[2]["token_embeddings"] + generator.normal()}
    )
    with pytest.raises(StageError, match="second pass differs"):
        step(model, loss_of(model, mini_batch_tokens=40), columns(model, *texts_of(2, seed=7)))


def test_what_cannot_be_computed_is_refused(model: SentenceTransformer) -> None:
    features = columns(model, *texts_of(2, seed=8))
    with pytest.raises(ValueError, match="found 1 column"):
        loss_of(model)(features[:1])
    with pytest.raises(ValueError, match="how far training is"):
        loss_of(model, num_steps=None)(features)
    with pytest.raises(ValueError, match="no input_ids"):
        loss_of(model)([features[0], {"pixel_values": torch.ones(N, 3)}])


@pytest.mark.parametrize("mini_batch_tokens", [None, 100])
def test_the_librarys_trainer_trains_with_it(
    encoder_folder: Path, tmp_path: Path, mini_batch_tokens: int | None
) -> None:
    pytest.importorskip("accelerate", reason="sentence-transformers' trainer needs it")
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    model = SentenceTransformer(str(encoder_folder), device="cpu")
    anchors, positives, negatives = make_texts(40, seed=9), make_texts(40, seed=10), make_texts(40, seed=11)
    pairs = Dataset.from_dict({"anchor": anchors, "positive": positives, "negative": negatives})
    loss = loss_of(model, PROGRESSIVE, num_steps=None, mini_batch_tokens=mini_batch_tokens)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=4,
        per_device_train_batch_size=10,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=pairs, loss=loss, callbacks=[loss.callback()]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]
    assert loss.progress == 1.0
