"""A frozen front: cached features give the results of computing them in each step."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import small_run

from hovit.config.plan import Plan
from hovit.config.runs import Run, Weights
from hovit.config.schema import Recipe
from hovit.data.features import FrontFeatures
from hovit.data.loader import make_loader, to_input
from hovit.training import classification
from hovit.training.checkpoint import load_weights, save_weights
from hovit.training.classification import ClassificationTrainer, train
from hovit.training.trainer import Options, make_fabric
from hovit.utils.errors import HovitError
from hovit.utils.files import file_digest

FRONT = "resnet10t"


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    path = tmp_path / "front.safetensors"
    save_weights(path, timm.create_model(FRONT, num_classes=7))
    return path


def frozen_run(plan: Plan, weights_file: Path, model: str) -> Run:
    weights = Weights(sha256=file_digest(weights_file))
    return small_run(
        plan, "l_hovit.pets.deck", model=model, model_args={"front": FRONT}, weights=weights,
        recipe={"frozen_front": True},
    )  # fmt: skip


class EachStep(ClassificationTrainer):
    """Computes the features of each batch, in evaluation mode."""

    def model_input(self, batch: torch.Tensor) -> torch.Tensor:
        training = self.module.training
        self.module.eval()
        with torch.no_grad():
            features = self.module.front_features(to_input(batch, self.run.image_size))
        self.module.train(training)
        return features


@pytest.mark.parametrize("model", ["l_hovit", "front_linear"])
def test_cached_features_give_the_results_of_computing_each_step(
    plan: Plan, packed: Path, weights_file: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    run = frozen_run(plan, weights_file, model)
    options = Options(weights_file=weights_file)
    cached = train(run, make_fabric("32-true", "cpu"), packed, options)
    after = load_weights(packed / run.folder / "weights.safetensors")
    front = "front" if model == "l_hovit" else "backbone"
    given = load_weights(weights_file)
    kept = [key for key in given if not key.startswith("fc.")]
    assert kept
    for key in kept:
        assert torch.equal(after[f"{front}.{key}"], given[key]), key
    monkeypatch.setattr(classification, "FrontFeatures", lambda model, images, *_: images)
    slow = EachStep.run_to_record(run, make_fabric("32-true", "cpu"), packed, options)
    for name in ("loss", "top1", "val_top1"):
        assert cached.results[name] == pytest.approx(slow.results[name], abs=1e-5), name
    losses = [[epoch["train_loss"] for epoch in r.results["history"]] for r in (cached, slow)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][1] < losses[0][0]
    again = load_weights(packed / run.folder / "weights.safetensors")
    for key, tensor in after.items():
        torch.testing.assert_close(again[key], tensor, atol=1e-4, rtol=1e-4)


def test_features_are_those_of_each_image(plan: Plan, packed: Path, weights_file: Path) -> None:
    run = frozen_run(plan, weights_file, "front_linear")
    fabric = make_fabric("32-true", "cpu")
    trainer = ClassificationTrainer(run, fabric, packed, Options(weights_file=weights_file))
    features = trainer.images
    assert isinstance(features, FrontFeatures)
    pixels = classification.PackedImages(
        classification.open_images(run.pack, packed / run.pack.folder), fabric.device
    )
    assert len(features.images) == len(pixels)
    ((batch, labels),) = make_loader(features, [np.array([5, 1])], fabric.device)
    images, same = pixels.__getitems__([5, 1])
    assert torch.equal(labels, same)
    with torch.no_grad():
        one = trainer.module.eval().front_features(to_input(images, run.image_size))
    torch.testing.assert_close(batch, one, atol=1e-5, rtol=1e-5)
    trained = {n for n, p in trainer.module.named_parameters() if p.requires_grad}
    assert trained == {"backbone.fc.weight", "backbone.fc.bias"}


def test_a_model_without_a_front_is_refused(plan: Plan, packed: Path) -> None:
    run = small_run(plan, recipe={"frozen_front": True})
    with pytest.raises(HovitError, match="levit_deck has no front"):
        train(run, make_fabric("32-true", "cpu"), packed)


def test_a_frozen_front_excludes_augmentation(plan: Plan) -> None:
    recipe = plan.run("l_hovit.pets.deck").recipe.model_dump()
    assert "frozen_front" not in Recipe(**recipe).to_spec()
    assert Recipe(**recipe | {"frozen_front": True}).to_spec()["frozen_front"] is True
    with pytest.raises(ValueError, match="without augmentation"):
        Recipe(**recipe | {"frozen_front": True, "augment": "crop_flip"})
