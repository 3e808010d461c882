"""Weights that people have load; what a pre-trained model starts from and learns."""
import math
import os

import numpy as np
import open_clip
import pytest
import torch

import train
from video_colbert import Config, InputError, VideoColBERT

SMALL_CLIP = dict(
    embed_dim=32, quick_gelu=True,
    vision_cfg=dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2))

@pytest.fixture
def small_clip(monkeypatch):
    """ViT-B-32-quickgelu in small, so that files are written quickly -> its state dict."""
    def config(name):
        return {**SMALL_CLIP, "vision_cfg": dict(SMALL_CLIP["vision_cfg"])}
    monkeypatch.setattr(open_clip, "get_model_config", config)
    return open_clip.CLIP(**SMALL_CLIP).state_dict()

def test_weights_are_loaded_from_a_file(tmp_path):
    """The encoders and the temporal layers hold what open_clip saved."""
    theirs, file = open_clip.create_model("ViT-S-32-alt"), str(tmp_path / "weights.pt")
    torch.save(theirs.state_dict(), file)
    model = VideoColBERT(Config(backbone="ViT-S-32-alt", pretrained=file))
    assert torch.equal(model.backbone.visual.conv1.weight, theirs.visual.conv1.weight)
    copied, source = model.temporal.blocks[3].mlp, theirs.transformer.resblocks[3].mlp
    assert torch.equal(copied.c_fc.weight, source.c_fc.weight)
    with pytest.raises(InputError, match="weights.pt' into ViT-S-16-alt"):
        VideoColBERT(Config(backbone="ViT-S-16-alt", pretrained=file))

class Archive(torch.nn.Module):
    """A module that only holds tensors, as a TorchScript archive does."""
    def forward(self, x):
        return x

def write_openai_archive(state, path):
    """Half precision and three buffers beside the weights, as in OpenAI's ViT-B-32.pt."""
    archive = Archive()
    for name, tensor in state.items():
        *modules, leaf = name.split(".")
        module = archive
        for part in modules:
            if not hasattr(module, part):
                module.add_module(part, Archive())
            module = getattr(module, part)
        module.register_parameter(leaf, torch.nn.Parameter(tensor.half(), requires_grad=False))
    for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        archive.register_buffer(name, torch.tensor(value))
    torch.jit.save(torch.jit.trace(archive, torch.ones(1)), path)

def backbone_state(path):
    state = VideoColBERT(Config(pretrained=str(path))).backbone.state_dict()
    return {name.removeprefix("text."): tensor for name, tensor in state.items()}

@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_archive_loads(small_clip, tmp_path):
    write_openai_archive(small_clip, tmp_path / "ViT-B-32.pt")
    state = backbone_state(tmp_path / "ViT-B-32.pt")
    for name, tensor in small_clip.items():
        if name != "logit_scale":
            assert torch.equal(state[name], tensor.half().float()), name

@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openais_archive_is_refused_without_quickgelu(small_clip, tmp_path, monkeypatch):
    """As the tag openai is."""
    config = {**SMALL_CLIP, "quick_gelu": False}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    write_openai_archive(small_clip, tmp_path / "ViT-B-32.pt")
    with pytest.raises(InputError, match="use QuickGELU: add -quickgelu to the name"):
        VideoColBERT(Config(backbone="ViT-B-32", pretrained=str(tmp_path / "ViT-B-32.pt")))
    torch.save(small_clip, tmp_path / "open_clip.pt")  # does not say what it needs
    VideoColBERT(Config(backbone="ViT-B-32", pretrained=str(tmp_path / "open_clip.pt")))

@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_open_clip_checkpoint_with_numpy_numbers_loads(small_clip, tmp_path, prefix):
    weights = {prefix + name: tensor for name, tensor in small_clip.items()}
    torch.save({"state_dict": weights, "epoch": np.int64(3), "best": np.float64(0.5),
                "name": "run"}, tmp_path / "epoch_3.pt")
    state = backbone_state(tmp_path / "epoch_3.pt")
    for name, tensor in small_clip.items():
        if name != "logit_scale":
            assert torch.equal(state[name], tensor), name

class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)

@pytest.mark.parametrize("content, message", [
    ({"text_model.embeddings.weight": torch.ones(1)}, "it has no visual.class_embedding"),
    ({"clip.visual.conv1.weight": torch.ones(1)}, "it has no visual.class_embedding"),
    ({"state_dict": Evil()}, "damaged, or no weights"), (b"hello", "damaged, or no weights"),
    ("cut", "damaged, or no weights"), (None, "No such file")])
def test_what_is_no_file_of_weights_is_one_short_line(
        small_clip, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if content == "cut":
        torch.save(small_clip, "whole.pt")
        content = (tmp_path / "whole.pt").read_bytes()[:-1000]
    if isinstance(content, bytes):
        (tmp_path / "a.pt").write_bytes(content)
    elif content:
        torch.save(content, "a.pt")
    message = f"cannot load 'a.pt' into .*{message}.*or a tag"
    with pytest.raises(InputError, match=message) as error:
        VideoColBERT(Config(pretrained="a.pt"))
    text = str(error.value)
    assert "\n" not in text and "\x1b" not in text and len(text) < 300
    assert not (tmp_path / "executed").exists()

@pytest.mark.parametrize("backbone", ["ViT-B-32-quickgelu", "ViT-B-16-SigLIP"])
def test_frame_positions_start_as_the_text_encoders(backbone):
    model = VideoColBERT(Config(backbone=backbone, pretrained=None, temporal_layers=1))
    positions = model.backbone.text.positional_embedding
    assert torch.equal(model.temporal.frame_positions, positions[:12])
    assert model.temporal.frame_positions.data_ptr() != positions.data_ptr()

def test_infonces_scale_of_a_pretrained_model_moves_slowly_and_not_above_ln_100(small_clip):
    """After 200 steps at 1e-3, from either side of its limit."""
    s = train.default_settings("msrvtt", None, "infonce")
    s = train.replace(s, pretrained="none", num_frames=2, num_tokens=8, lr_pretrained=1e-3)
    assert s.learn_scale and s.logit_scale == pytest.approx(math.log(100), abs=1e-4)
    frames = torch.randint(0, 256, (4, 2, 3, 32, 32), dtype=torch.uint8)
    ids = torch.randint(1, 400, (4, 8))
    mask, positives = torch.ones_like(ids, dtype=torch.bool), torch.eye(4, dtype=torch.bool)
    for start in (s.logit_scale, 3.0):
        torch.manual_seed(0)
        model = VideoColBERT(train.replace(s, logit_scale=start))
        optimizer = train.make_optimizer(model, s)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"]
        for _ in range(200):
            train.training_step(model, optimizer, scaler, s, ids, mask, frames, positives)
        end = model.logit_scale.item()
        assert end <= math.log(100) + 1e-6 and 0 < abs(end - start) <= 200 * 1e-3 * 1.01
