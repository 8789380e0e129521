"""timm's interface over the registry: what timm's tests ask of its own models.

After timm's tests/test_models.py (github.com/huggingface/pytorch-image-models).
"""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from test_model_export import CHEAP, MODULES, SMALL, inputs, small
from timm.models._manipulate import group_parameters
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn


def each(*excluded: str) -> list[Any]:
    """All registered models; those that repeat a structure are left to `make test-all`."""
    names = [name for name in MODULES if name not in excluded]
    return [n if n in CHEAP else pytest.param(n, marks=pytest.mark.exhaustive) for n in names]


NAMES = each()
IMAGE_MODELS = each("attention_layer")
FIXED_WINDOWS = timm.list_models("flatten_*", module="swin")
TRAINABLE = each("attention_layer", "deployed")  # a deployed model is for inference


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def images(model: nn.Module, name: str, channels: int = 3, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    x = inputs(model, name, batch)[0]
    return torch.randn(batch, channels, *x.shape[2:])


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", TRAINABLE)
@torch.no_grad()
def test_in_chans(name, channels):
    model = timm.create_model(name, num_classes=5, in_chans=channels, **sizes(name)).eval()
    assert model(images(model, name, channels)).shape == (2, 5)


def sizes(name: str) -> dict[str, Any]:
    return SMALL.get(name) or SMALL[MODULES[name]]


@pytest.mark.parametrize("name", IMAGE_MODELS)
@torch.no_grad()
def test_num_classes_pooling_and_classifier(name):
    model = small(name)
    x = images(model, name)
    assert model.num_classes == 5
    assert model(x).shape == (2, 5)
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    assert all(isinstance(head, nn.Module) for head in heads)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    pooled = model(x)
    assert pooled.shape == (2, model.num_features)
    assert torch.equal(pooled, model.forward_head(model.forward_features(x), pre_logits=True))
    if name != "deployed":
        assert small(name, num_classes=0)(x).shape == pooled.shape
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IMAGE_MODELS)
@torch.no_grad()
def test_reset_classifier_keeps_dtype_and_device(name, dtype):
    model = small(name).to(dtype)
    model.reset_classifier(3)
    out = model(images(model, name).to(dtype))
    assert out.dtype == dtype
    assert out.shape == (2, 3)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model = model.to("meta")
    model.reset_classifier(4)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", TRAINABLE)
@torch.no_grad()
def test_features_only(name):
    args = {"schedule": ""} if name.startswith("skipvit") else {}
    full = small(name, **args)
    x = images(full, name)
    _, wanted = full.forward_intermediates(x)
    for indices in ((0, 1), (1,), (-1,)):
        model = small(name, **args, features_only=True, out_indices=indices)
        found = model(x)
        assert len(found) == len(indices)
        for channels, reduction, features in zip(
            model.feature_info.channels(), model.feature_info.reduction(), found, strict=True
        ):
            nchw = features if features.shape[1] == channels else features.permute(0, 3, 1, 2)
            assert nchw.shape[:2] == (2, channels)
            if not name.startswith("l_"):
                assert nchw.shape[2] == -(-x.shape[2] // reduction)
        if not name.startswith("l_"):  # their generated image depends on the test's small ResNet
            for i, features in zip(indices, found, strict=True):
                same = wanted[i]
                if features.shape != same.shape:
                    features = features.permute(0, 3, 1, 2)
                torch.testing.assert_close(features, same)


@pytest.mark.parametrize("name", TRAINABLE)
@torch.no_grad()
def test_forward_intermediates(name):
    model = small(name, **({"schedule": ""} if name.startswith("skipvit") else {}))
    x = images(model, name)
    last, features = model.forward_intermediates(x)
    assert all(f.ndim == 4 for f in features)
    torch.testing.assert_close(last, model.forward_features(x))
    only = model.forward_intermediates(x, indices=[0], intermediates_only=True, stop_early=True)
    assert len(only) == 1
    assert torch.equal(only[0], features[0])
    with pytest.raises(AssertionError, match="Output"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradient_checkpointing_keeps_loss_and_gradients(name):
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, **sizes(name)).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(2)  # dropout and stochastic depth
        loss = model(images(model, name)).square().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        assert (plain is None) == (checkpointed is None)
        assert plain is None or torch.equal(plain, checkpointed)


@pytest.mark.parametrize("name", [*TRAINABLE, "attention_layer"])
def test_groups_and_weight_decay(name):
    model = small(name)
    names = {n for n, _ in model.named_parameters()}
    # timm's ViT also names optional tokens that this model may not have.
    optional = {"dist_token", "reg_token"} if isinstance(model, VisionTransformer) else set()
    assert model.no_weight_decay() <= names | optional
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(n for group in groups.values() for n in group) == sorted(names)
        assert len(groups) >= min(2, len(names))
    if names:  # dot-product attention has no parameters
        assert create_optimizer_v2(model, "adamw", 1e-3, 0.05, layer_decay=0.9)


@pytest.mark.parametrize("name", each("attention_layer", "deployed", *FIXED_WINDOWS))
@torch.no_grad()
def test_set_input_size_where_it_exists(name):
    model = small(name)
    if not hasattr(model, "set_input_size"):
        assert MODULES[name] in ("levit_deck", "hovit", "launcher", "efficientvit", "front")
        x = images(model, name)  # these take any size as they are
        assert model(torch.cat([x, x], dim=3)).shape == (2, 5)
        return
    size = 2 * sizes(name)["img_size"]
    model.set_input_size((size, size))
    assert model(torch.randn(2, 3, size, size)).shape == (2, 5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_copies_pickles_and_memory_formats(name):
    model = small(name)
    x = inputs(model, name, 2)
    expected = model(*x)
    assert torch.equal(copy.deepcopy(model)(*x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(*x), expected)
    if name != "attention_layer":
        model = model.to(memory_format=torch.channels_last)
        out = model(x[0].contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_dtype_and_device_arguments(name):
    args = sizes(name)
    model = timm.create_model(name, dtype=torch.float64, num_classes=5, **args).eval()
    assert {p.dtype for p in model.parameters()} <= {torch.float64}
    assert model(*(x.double() for x in inputs(model, name, 2))).dtype == torch.float64
    if name != "deployed":  # folding needs values
        meta = timm.create_model(name, device="meta", num_classes=5, **args)
        assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
        with torch.device("meta"):
            born = timm.create_model(name, num_classes=5, **args).eval()
            assert born(*inputs(born, name, 2)).is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, dtype):
    model = small(name)
    x = inputs(model, name, 2)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert model(*x).isfinite().all()
    if name not in ("attention_layer", "deployed"):
        model.train()
        with torch.autocast("cpu", dtype):
            loss = model(*x).float().square().mean()
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_jit_trace(name):
    model = small(name)
    traced = torch.jit.trace(model, inputs(model, name, 2), check_trace=False)
    x = inputs(model, name, 2)
    torch.testing.assert_close(traced(*x), model(*x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TRAINABLE)
def test_cfg_names_existing_layers(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.default_cfg
    classifier = cfg["classifier"]
    for layer in classifier if isinstance(classifier, tuple) else (classifier,):
        assert f"{layer}.weight" in model.state_dict()
    assert f"{cfg['first_conv']}.weight" in model.state_dict()


def test_what_a_model_cannot_do_is_refused_as_in_timm():
    layer = small("attention_layer")
    with pytest.raises(RuntimeError, match="features_only not implemented"):
        small("attention_layer", features_only=True)
    with pytest.raises(RuntimeError, match="not implemented for AttentionLayer"):
        layer.reset_classifier(5)
    with pytest.raises(RuntimeError, match="not implemented for AttentionLayer"):
        layer.forward_intermediates(torch.zeros(1))
    with pytest.raises(AssertionError, match="gradient checkpointing not supported"):
        layer.set_grad_checkpointing()
    with pytest.raises(RuntimeError, match="features_only not implemented"):
        small("deployed", features_only=True)
    with pytest.raises(RuntimeError, match="features_only not implemented"):
        small("skipvit_tiny_patch16_224", features_only=True)
    with pytest.raises(RuntimeError, match="features_only not implemented"):
        small("skipvit_tiny_patch16_224").forward_intermediates(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="name the model to deploy"):
        timm.create_model("deployed")
