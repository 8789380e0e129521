"""`pretrained=True`: weights of this machine, or a message that says how to get them."""

import pytest
import timm
import torch
from safetensors.torch import save_file

import hovit.models

SMALL = {"hovit": 64, "levit_deck": 64, "skipvit_tiny_patch16_224": 224, "l_hovit": 64}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOVIT_WEIGHTS", str(tmp_path))
    return tmp_path


def stored(folder, name, num_classes=5):
    """A model whose weights lie in the folder."""
    model = timm.create_model(name, num_classes=num_classes).eval()
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    return model


@pytest.mark.parametrize("name", ["hovit", "skipvit_tiny_patch16_224"])
def test_weights_of_the_folder_are_loaded(name, folder):
    expected = stored(folder, name)
    model = timm.create_model(name, pretrained=True, num_classes=5).eval()
    x = torch.randn(2, 3, SMALL[name], SMALL[name])
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))


def test_another_number_of_classes_keeps_the_new_classifier(folder):
    expected = stored(folder, "hovit").state_dict()
    found = timm.create_model("hovit", pretrained=True, num_classes=7).state_dict()
    heads = ("head.linear", "head_dist.linear")
    same = [k for k in expected if not k.startswith(heads)]
    assert len(same) == len(expected) - 4
    assert all(torch.equal(found[k], expected[k]) for k in same)
    assert found["head.linear.weight"].shape[0] == 7


def test_weights_can_be_given_by_path(tmp_path, monkeypatch):
    monkeypatch.delenv("HOVIT_WEIGHTS", raising=False)
    expected = stored(tmp_path, "hovit")
    overlay = {"file": str(tmp_path / "hovit.safetensors"), "num_classes": 5}
    model = timm.create_model(
        "hovit", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay
    )
    assert torch.equal(model.head.linear.weight, expected.head.linear.weight)


@pytest.mark.parametrize("name", [*SMALL, "mhsa_deit_tiny", "swin_tiny_patch2_window4_32"])
def test_without_weights_the_message_says_how_to_get_them(name, folder):
    with pytest.raises(RuntimeError, match=f"{name}: no pretrained weights .*hovit train"):
        timm.create_model(name, pretrained=True)


def test_the_hub_is_asked_for_weights_of_the_authors(folder):
    cfg = timm.get_pretrained_cfg("efficientvit_paper_m0")
    assert cfg.has_weights
    assert hovit.models.build._local_weights("efficientvit_paper_m0") == {}
