"""Each test states the claim it checks. `pytest` needs no GPU, no network, no weights and no dataset."""
import dataclasses
import faulthandler
import functools
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from PIL import Image
from torch.nn.functional import logsigmoid, normalize
from torch.utils._python_dispatch import TorchDispatchMode

import train
import video_colbert
from video_colbert import (Config, VideoColBERT, VideoIndex, as_multivector, draw_interactions, info_nce_loss, interactions,
                           mean_max_sim, reciprocal_rank_fusion, retrieval_metrics, sample_frames, sigmoid_loss, video_to_text)


def unit(*shape, dtype=torch.float32):
    return normalize(torch.randn(*shape, dtype=dtype), dim=-1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return VideoColBERT(Config(backbone="tiny", num_frames=6)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# MeanMaxSim (equations 3 and 4)

def loop(Q, V, mask):
    """Equation 3, written out, in float64."""
    out = torch.zeros(len(Q), len(V), dtype=torch.float64)
    for a, b in itertools.product(range(len(Q)), range(len(V))):
        best = [max(float(q.double() @ v.double()) for v in V[b]) for q, m in zip(Q[a], mask[a]) if m]
        out[a, b] = sum(best) / len(best)
    return out


def naive(Q, V, mask=None):
    best = torch.einsum("amd,bnd->abmn", Q, V).max(-1).values                # (A, B, M)
    mask = torch.ones_like(Q[..., 0]) if mask is None else mask.to(Q.dtype)
    return (best * mask[:, None]).sum(-1) / mask.sum(-1)[:, None]


@pytest.mark.parametrize("A, B, M, N", [(5, 7, 6, 4), (1, 1, 1, 1), (4, 3, 1, 5), (3, 4, 5, 1), (2, 3, 64, 66)])
def test_mean_max_sim_equals_a_float64_loop(A, B, M, N):
    Q, V, mask = unit(A, M, 16), unit(B, N, 16), torch.rand(A, M) < 0.6
    mask[:, 0] = True
    assert (mean_max_sim(Q, V, mask).double() - loop(Q, V, mask)).abs().max() < 1e-6
    assert (mean_max_sim(Q, V).double() - loop(Q, V, torch.ones(A, M))).abs().max() < 1e-6


def test_mean_max_sim_goes_one_way_only():
    """Query tokens choose frames: a frame that nobody picks changes nothing, a query token always counts."""
    Q, V = unit(2, 3, 8), unit(2, 4, 8)
    worse = torch.cat([V, -Q[:, :1]], dim=1)
    assert torch.equal(mean_max_sim(Q, V)[0, 0], mean_max_sim(Q, worse)[0, 0])
    assert not torch.equal(mean_max_sim(Q[:, :2], V), mean_max_sim(Q, V))


@pytest.mark.parametrize("B", [7, 1500])
def test_mean_max_sim_has_the_gradients_of_the_naive_form(B):
    Q, V, G = unit(9, 5, 16, dtype=torch.float64), unit(B, 6, 16, dtype=torch.float64), torch.randn(9, B, dtype=torch.float64)
    mask = torch.rand(9, 5) < 0.7
    mask[:, 0] = True
    grads = []
    for form in (mean_max_sim, naive):
        q, v = Q.clone().requires_grad_(), V.clone().requires_grad_()
        (form(q, v, mask) * G).sum().backward()
        grads.append((q.grad, v.grad))
    for got, want in zip(*grads):
        assert (got - want).abs().max() < 1e-10


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes, forward or backward."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_mean_max_sim_never_holds_the_big_tensor():
    """No tensor of either pass reaches a tenth of A x B x M x N."""
    Q, V = unit(256, 32, 8).requires_grad_(), unit(2048, 14, 8).requires_grad_()
    with Largest() as largest:
        mean_max_sim(Q, V).sum().backward()
    assert largest.numel < 256 * 2048 * 32 * 14 / 10


def test_mean_max_sim_stays_in_float32_under_autocast():
    Q, V = unit(4, 5, 16), unit(6, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        sim = mean_max_sim(Q, V)
    assert sim.dtype == torch.float32 and torch.equal(sim, mean_max_sim(Q, V))


# ---------------------------------------------------------------------------------------------------------------------
# Losses (equations 6 and 7) and the four traps of the paper

@pytest.mark.parametrize("B", [1, 2, 33])
def test_sigmoid_loss_equals_open_clips_siglip_loss(B):
    image, text = unit(B, 8, dtype=torch.float64), unit(B, 8, dtype=torch.float64)
    want = SigLipLoss()(image, text, math.exp(4.77), -12.93)
    assert (sigmoid_loss(image @ text.T) - want).abs() < 1e-6
    assert abs(sigmoid_loss((image @ text.T).float()) / want - 1) < 1e-6


def test_sigmoid_loss_equals_equation_6_in_float64():
    """With any positives: -1/B sum_i sum_j log sigmoid(z (t x + b)), t = exp(logit_scale)."""
    sim, positives = torch.rand(6, 6, dtype=torch.float64) * 2 - 1, torch.rand(6, 6) < 0.3
    want = 0.0
    for i, j in itertools.product(range(6), range(6)):
        z = 1 if positives[i, j] else -1
        want -= -math.log1p(math.exp(-z * (math.exp(2.5) * sim[i, j].item() - 3.0))) / 6
    assert abs(sigmoid_loss(sim, positives, 2.5, -3.0).item() + -want) < 1e-9


def test_trap_1_logit_scale_is_a_logarithm():
    """A pair of cosine 1 is classified as true, which a raw t = 4.77 could never do."""
    assert sigmoid_loss(torch.ones(1, 1)) < 1e-6
    assert -logsigmoid(torch.tensor(4.77 - 12.93)) > 8


def test_trap_2_the_bias_is_added_not_subtracted():
    """At the start, with all similarities 0, a negative costs next to nothing and a positive about 12.93."""
    assert abs(sigmoid_loss(torch.zeros(4, 4)).item() - 12.93) < 1e-3


def test_trap_3_scale_and_bias_are_fixed_unless_asked_for(tiny):
    assert (tiny.logit_scale.item(), tiny.logit_bias.item()) == (pytest.approx(4.77), pytest.approx(-12.93))
    assert not tiny.logit_scale.requires_grad and not tiny.logit_bias.requires_grad
    learned = VideoColBERT(Config(backbone="tiny", learn_scale=True))
    assert learned.logit_scale.requires_grad and learned.logit_bias.requires_grad


def test_trap_4_all_vectors_are_of_unit_length(tiny):
    frames = torch.randint(0, 256, (2, 6, 3, 64, 64), dtype=torch.uint8)
    Q = tiny.encode_query(*tiny.tokenize(["a", "two words"]))
    for x, shape in zip((Q, *tiny.encode_video(frames)), ((2, 32, 64), (2, 6, 64), (2, 8, 64))):
        assert x.shape == shape and x.dtype == torch.float32
        assert (x.norm(dim=-1) - 1).abs().max() < 1e-6


def test_a_second_caption_of_a_video_is_a_positive():
    """Marking the off-diagonal pair of one video as positive turns its high similarity from a cost into a gain."""
    sim = torch.eye(3)
    sim[0, 1] = sim[1, 0] = 1.0
    positives = sim.bool()
    assert sigmoid_loss(sim, positives) < 1e-4 < 50 < sigmoid_loss(sim)


def test_the_losses_take_k_captions_a_video():
    """A (kB, B) matrix with k positives a column is the mean over its rows of what each row costs."""
    sim, positives = torch.rand(6, 3), torch.eye(3, dtype=torch.bool).repeat_interleave(2, 0)
    rows = [sigmoid_loss(sim[i:i + 1], positives[i:i + 1]) for i in range(6)]
    assert abs(sigmoid_loss(sim, positives) - torch.stack(rows).mean()) < 1e-4


@pytest.mark.parametrize("B", [1, 2, 17])
def test_info_nce_equals_open_clips_clip_loss(B):
    image, text = unit(B, 8), unit(B, 8)
    assert (info_nce_loss(image @ text.T, logit_scale=math.log(50.0)) - ClipLoss()(image, text, 50.0)).abs() < 1e-5


def test_info_nce_is_symmetric_and_shares_a_target_among_positives():
    sim, positives = torch.rand(5, 5), torch.eye(5, dtype=torch.bool)
    positives[0, 3] = positives[3, 0] = True
    assert abs(info_nce_loss(sim, positives) - info_nce_loss(sim.T, positives.T)) < 1e-6
    logits = 100 * sim.double()
    rows = [-logits[i].log_softmax(0)[positives[i]].mean() for i in range(5)]
    columns = [-logits[:, j].log_softmax(0)[positives[:, j]].mean() for j in range(5)]
    want = (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2
    assert abs(info_nce_loss(sim, positives, math.log(100)).double() - want) < 1e-5


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
@pytest.mark.parametrize("form", ["dual", "combined"])
def test_the_model_trains_with_the_loss_that_its_config_names(loss, form):
    model = VideoColBERT(Config(backbone="tiny", num_frames=2, loss=loss, loss_form=form, lambda_frame=0.5, lambda_video=2.0))
    ids, mask = model.tokenize(["one", "two", "three"])
    total, sim_F, sim_V = model(ids, mask, torch.randint(0, 256, (3, 2, 3, 64, 64), dtype=torch.uint8))
    single = {"sigmoid": lambda x: sigmoid_loss(x), "infonce": lambda x: info_nce_loss(x, logit_scale=4.77)}[loss]
    want = 0.5 * single(sim_F) + 2.0 * single(sim_V) if form == "dual" else single(sim_F + sim_V)
    assert abs(total - want) < 1e-5
    total.backward()


# ---------------------------------------------------------------------------------------------------------------------
# Encoders, against open_clip's own

REAL = ["ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-B-16-SigLIP"]


@pytest.fixture(scope="module", params=REAL)
def real(request):
    """A randomly initialised model of each of the paper's backbones."""
    torch.manual_seed(0)
    return VideoColBERT(Config(backbone=request.param, pretrained=None, num_frames=2))


def test_one_token_of_q_is_open_clips_text_embedding(real):
    """End token for CLIP, last token for SigLIP; 32 tokens of CLIP give what its own 77 give."""
    if real.is_siglip:
        ids = torch.randint(2, 32000, (3, 64))
        Q = real.encode_query(ids, torch.ones_like(ids, dtype=torch.bool))
        got, theirs = Q[:, -1], ids
    else:
        texts = ["a man feeds a dog", "x", "word " * 50]
        ids, mask = real.tokenize(texts)
        assert ids.shape == (3, 32)
        got = real.encode_query(ids, mask)[range(3), real.real_tokens(ids).sum(1) - 1]
        theirs = open_clip.get_tokenizer(real.config.backbone)(texts[:2])
        got = got[:2]                                                       # the third is cut, so differs by design
    with torch.no_grad():
        assert (got - real.clip.encode_text(theirs, normalize=True)).abs().max() < 1e-5


def test_f_is_open_clips_image_embedding(real):
    frames = torch.randint(0, 256, (1, 2, 3, 224, 224), dtype=torch.uint8)
    mean, std = ((0.5,) * 3, (0.5,) * 3) if real.is_siglip else (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    images = (frames[0].float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        F, V = real.encode_video(frames)
        assert (F[0] - real.clip.encode_image(images, normalize=True)).abs().max() < 1e-5
    assert V.shape == (1, 4, F.shape[-1]) and F.shape[-1] == (768 if real.is_siglip else 512)


def test_the_right_parameters_are_frozen_and_in_the_right_groups_and_a_step_moves_just_the_others(real):
    """Section 5.2: positions, patch and token embeddings frozen; 1e-7 for what is pre-trained, 1e-4 for what is new."""
    frozen = {n for n, p in real.named_parameters() if not p.requires_grad}
    vision = {"visual.trunk.pos_embed", "visual.trunk.patch_embed.proj.weight", "visual.trunk.patch_embed.proj.bias"} \
        if real.is_siglip else {"visual.positional_embedding", "visual.conv1.weight"}
    assert frozen == {"clip." + n for n in vision | {"text.positional_embedding", "text.token_embedding.weight"}} \
        | {"logit_scale", "logit_bias"}

    s = train.Settings(lr=0.1, lr_pretrained=0.05)                          # large, so that a step is seen
    optimizer = train.make_optimizer(real, s)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in optimizer.param_groups}
    for name, p in real.named_parameters():
        want = None if name in frozen else "pretrained" if name.startswith("clip.") else "new"
        assert [g for g, ids in groups.items() if id(p) in ids] == ([want] if want else []), name
    default = {g["name"]: g for g in train.make_optimizer(real, train.Settings()).param_groups}
    assert (default["pretrained"]["lr"], default["new"]["lr"]) == (1e-7, 1e-4)
    assert all(g["betas"] == (0.9, 0.98) and g["eps"] == 1e-6 and g["weight_decay"] == 0.01 for g in default.values())

    before = {n: p.detach().clone() for n, p in real.named_parameters()}
    ids = torch.randint(2, 32000, (2, real.num_tokens))
    ids[:, -1] = 49407 if not real.is_siglip else 1
    frames = torch.randint(0, 256, (2, 2, 3, 224, 224), dtype=torch.uint8)
    loss, _, _ = real(ids, torch.ones_like(ids, dtype=torch.bool), frames)
    loss.backward()
    optimizer.step()
    same = {n for n, p in real.named_parameters() if torch.equal(p, before[n])}
    with torch.no_grad():
        for n, p in real.named_parameters():
            p.copy_(before[n])
    real.zero_grad()
    assert same == frozen


def test_the_temporal_transformer_starts_as_the_text_encoders_first_layers(real):
    for i, block in enumerate(real.temporal):
        theirs = real.clip.text.transformer.resblocks[i].state_dict()
        assert all(torch.equal(p, theirs[n]) for n, p in block.state_dict().items())
        assert block.mlp.c_fc.weight.data_ptr() != real.clip.text.transformer.resblocks[i].mlp.c_fc.weight.data_ptr()
    assert len(real.temporal) == 4


def test_weights_are_loaded_from_a_file(tmp_path):
    """What open_clip saved for a backbone is what the encoders hold, the temporal layers included."""
    theirs = open_clip.create_model("ViT-B-32-quickgelu")
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    model = VideoColBERT(Config(pretrained=str(tmp_path / "weights.pt")))
    assert torch.equal(model.clip.visual.conv1.weight, theirs.visual.conv1.weight)
    assert torch.equal(model.temporal[3].mlp.c_fc.weight, theirs.transformer.resblocks[3].mlp.c_fc.weight)
    with pytest.raises(ValueError, match="weights.pt does not hold the weights of ViT-B-16-quickgelu"):
        VideoColBERT(Config(backbone="ViT-B-16-quickgelu", pretrained=str(tmp_path / "weights.pt")))


@pytest.mark.parametrize("config, message", [
    (dict(backbone="ViT-B32", pretrained=None), "unknown backbone 'ViT-B32'; near names: .*ViT-B-32"),
    (dict(backbone="ViT-B-32"), "differ in QuickGELU; use the name with -quickgelu"),
    (dict(pretrained="laion"), "no weights 'laion' for ViT-B-32-quickgelu: give a file, none, or one of .*openai"),
    (dict(backbone="coca_ViT-B-32", pretrained=None), "is not a CLIP or SigLIP"),
    (dict(backbone="RN101-quickgelu", pretrained=None), "is not a CLIP or SigLIP"),
    (dict(backbone="convnext_tiny", pretrained=None), "512 wide, its output 1024"),
    (dict(backbone="tiny", num_tokens=100), "num_tokens must be 3 to 77"),
    (dict(backbone="tiny", num_frames=0), "num_frames and temporal_layers must be at least 1"),
])
def test_a_setting_that_cannot_be_is_named_in_one_line(config, message):
    with pytest.raises(ValueError, match=message) as error:
        VideoColBERT(Config(**config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backbone", ["tiny", "ViT-B-16-SigLIP"])
def test_mean_pooling_is_equation_1(backbone):
    """cos(q, mean_n f_n) with open_clip's own pooled query, on frames and on the temporal transformer's output for them."""
    torch.manual_seed(0)
    model = VideoColBERT(Config(backbone=backbone, pretrained=None, num_frames=3, interaction="mp")).eval()
    ids, mask = (torch.randint(2, 32000, (2, 64)), torch.arange(64)[None].expand(2, -1) == 63)
    if backbone == "tiny":
        ids, mask = model.tokenize(["a dog", "a small dog runs"])
        assert mask.int().argmax(1).tolist() == [3, 5] and mask.sum() == 2
    frames = torch.randint(0, 256, (3, 3, 3, model.image_size, model.image_size), dtype=torch.uint8)
    with torch.no_grad():
        F, V = model.encode_video(frames)
        got = model.similarities(model.encode_query(ids, mask), mask, F, V)
        if backbone == "tiny":                                              # open_clip wants its own length
            ids = open_clip.get_tokenizer("ViT-B-32")(["a dog", "a small dog runs"])
        q = model.clip.encode_text(ids, normalize=True)
    for sim, x in zip(got, (F, V[:, :3])):
        assert (sim - q @ normalize(x.mean(1), dim=-1).T).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Query side

def test_clip_queries_are_start_words_end_and_pads(tiny):
    ids, mask = tiny.tokenize(["a dog !", "a!!!b", ""])
    assert ids.dtype == torch.int64 and ids.shape == mask.shape == (3, 32) and mask.all()
    assert ids[0].tolist() == [49406, 320, 1929, 256, 49407] + [0] * 27
    assert ids[2].tolist() == [49406, 49407] + [0] * 30


def test_a_caption_that_is_too_long_keeps_its_end_token(tiny):
    ids, _ = tiny.tokenize(["dog " * 10_000])
    assert ids[0].tolist() == [49406] + [1929] * 30 + [49407]


@pytest.mark.parametrize("pad", [31, 49407, 3002, 13530, 49406, 0])
def test_every_pad_token_of_table_12_fills_the_query_and_nothing_else(pad):
    model = VideoColBERT(Config(backbone="tiny", pad_token=pad))
    ids, _ = model.tokenize(["a dog"])
    assert ids[0].tolist() == [49406, 320, 1929, 49407] + [pad] * 28
    assert model.real_tokens(ids)[0].tolist() == [True] * 4 + [False] * 28


def test_without_query_augmentation_pads_count_for_nothing():
    """The score is that of the words alone, whatever the pad token and the length."""
    torch.manual_seed(0)
    model = VideoColBERT(Config(backbone="tiny", num_frames=3, query_augmentation=False)).eval()
    F, _ = model.encode_video(torch.randint(0, 256, (4, 3, 3, 64, 64), dtype=torch.uint8))
    ids, mask = model.tokenize(["a dog", "a small dog runs"])
    assert mask.sum(1).tolist() == [4, 6]
    want = mean_max_sim(model.encode_query(ids, mask), F, mask)
    model.config.pad_token, model.num_tokens = 3002, 20
    ids, mask = model.tokenize(["a dog", "a small dog runs"])
    Q = model.encode_query(ids, mask)
    assert (mean_max_sim(Q, F, mask) - want).abs().max() < 1e-6
    assert (Q[~mask] == 0).all()
    model.config.query_augmentation = True
    ids, mask = model.tokenize(["a dog", "a small dog runs"])
    assert mask.all() and (mean_max_sim(model.encode_query(ids, mask), F, mask) - want).abs().max() > 1e-3


def test_siglip_queries_are_64_long_with_its_own_pad_and_end(tmp_path):
    """With a tokenizer of the same kind, pad and end alike `</s>`; the real one comes from the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "dog": 3}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="</s>", eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    model = VideoColBERT(Config(backbone="ViT-B-16-SigLIP", pretrained=None, query_augmentation=False, pad_token=31))
    model.tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64, clean="canonicalize")
    ids, mask = model.tokenize(["A dog!", "dog " * 100])
    assert ids[0].tolist() == [2, 3] + [1] * 62 and mask[0].sum() == 3
    assert ids[1].tolist() == [3] * 63 + [1] and mask[1].all()


# ---------------------------------------------------------------------------------------------------------------------
# Video side

def test_frames_alone_ignore_their_order_and_the_temporal_level_sees_it(tiny):
    frames = torch.randint(0, 256, (1, 6, 3, 64, 64), dtype=torch.uint8)
    Q = tiny.encode_query(*tiny.tokenize(["a dog"]))
    (F, V), (F_, V_) = tiny.encode_video(frames), tiny.encode_video(frames.flip(1))
    assert (mean_max_sim(Q, F) - mean_max_sim(Q, F_)).abs() < 1e-6 and (F - F_.flip(1)).abs().max() < 1e-5
    assert (mean_max_sim(Q, V) - mean_max_sim(Q, V_)).abs() > 1e-4


def test_every_frame_and_expansion_token_sees_every_frame(tiny):
    frames = torch.randint(0, 256, (1, 6, 3, 64, 64), dtype=torch.uint8)
    changed = frames.clone()
    changed[0, 5] = 0
    (F, V), (F_, V_) = tiny.encode_video(frames), tiny.encode_video(changed)
    assert torch.equal(F[0, :5], F_[0, :5])
    assert ((V - V_).abs().amax(-1) > 1e-5).all()


def test_one_frame_and_no_expansion_are_enough():
    model = VideoColBERT(Config(backbone="tiny", num_frames=4, visual_expansion=0, temporal_layers=5))
    F, V = model.encode_video(torch.zeros(2, 1, 3, 64, 64, dtype=torch.uint8))
    assert F.shape == V.shape == (2, 1, 64)


@pytest.mark.parametrize("frames", [torch.zeros(1, 6, 3, 64, 64), torch.zeros(1, 7, 3, 64, 64, dtype=torch.uint8),
                                    torch.zeros(1, 6, 3, 32, 32, dtype=torch.uint8), torch.zeros(6, 3, 64, 64, dtype=torch.uint8)])
def test_frames_of_a_wrong_kind_are_refused_in_one_line(tiny, frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 \(B, 1 to 6, 3, 64, 64\), not "):
        tiny.encode_video(frames)


def test_load_gives_back_what_was_saved_bit_for_bit_without_pickle(tmp_path, tiny):
    config = Config(backbone="tiny", num_frames=3, visual_expansion=1, query_augmentation=False, pad_token=31, learn_scale=True)
    model = VideoColBERT(config).eval()
    model.logit_scale.data.fill_(1.25)
    model.save(tmp_path / "new" / "folder")
    again = VideoColBERT.load(tmp_path / "new" / "folder")
    assert again.config == config and not again.training
    frames = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    for m in (model, again):
        m.out = (*m.tokenize(["a dog"]), m.encode_query(*m.tokenize(["a dog"])), *m.encode_video(frames), m.logit_scale)
    assert all(torch.equal(a, b) for a, b in zip(model.out, again.out))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    safetensors.torch.load_file(tmp_path / "new" / "folder" / "model.safetensors")


@pytest.mark.parametrize("spoil", [lambda f: (f / "config.json").unlink(), lambda f: (f / "config.json").write_text("{"),
                                   lambda f: (f / "config.json").write_text('{"nonsense": 1}'),
                                   lambda f: (f / "model.safetensors").write_bytes(b"x" * 100),
                                   lambda f: (f / "config.json").write_text('{"backbone": "tiny", "num_frames": 9}')])
def test_a_folder_that_holds_no_model_is_named_in_one_line(tmp_path, tiny, spoil):
    tiny.save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path.name} does not hold a model: ") as error:
        VideoColBERT.load(tmp_path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Frames of a file. Test clips show frame k as grey 6 k + 8, so that a frame is known by its brightness.

def write_clip(path, count=20, size=(48, 32), codec="libx264", times=None, picture=None, rate=10, **options):
    """A clip of `count` frames, frame k shown from times[k] / rate seconds on."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "7"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for k in range(count):
            pixels = np.full((size[1], size[0], 3), 6 * k + 8, np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = k if times is None else times[k]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shown(path, num_frames, size=16):
    frames = sample_frames(path, num_frames, size)
    assert frames.dtype == torch.uint8 and frames.shape == (num_frames, 3, size, size)
    return [round((x.float().mean().item() - 8) / 6) for x in frames]


@pytest.mark.parametrize("count, num_frames", [(20, 4), (20, 12), (20, 20), (7, 3), (3, 12), (1, 5), (20, 1)])
def test_sample_frames_takes_the_middle_of_equal_segments(tmp_path, count, num_frames):
    want = [int((i + 0.5) * count / num_frames) for i in range(num_frames)]
    assert shown(write_clip(tmp_path / "a.mp4", count), num_frames) == want


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.mpg", "mpeg1video"), ("a.ts", "libx264"),
                                         ("a.h264", "libx264"), ("a.webm", "libvpx-vp9"), ("a.mov", "mpeg4"), ("a.3gp", "mpeg4")])
def test_sample_frames_needs_no_frame_count_and_knows_the_containers_of_the_datasets(tmp_path, name, codec):
    path = write_clip(tmp_path / name, codec=codec, rate=25)
    assert shown(path, 5) == [2, 6, 10, 14, 18]


def test_sample_frames_samples_a_variable_frame_rate_in_time(tmp_path):
    """Frame 2 is on screen from 2 to 12 of 20 tenths of a second, so it is seen by the segments that fall there."""
    times = [0, 1, 2, 12, 13, 14, 15, 16, 17, 18, 19]
    assert shown(write_clip(tmp_path / "a.mkv", 11, times=times), 10) == [1, 2, 2, 2, 2, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("degrees, corner", [(0, (0, 0)), (90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_sample_frames_turns_the_frames_as_the_file_says(tmp_path, degrees, corner):
    """A white top left corner lands where a player, turning clockwise by the flag, shows it."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32] = 255
    data = write_clip(tmp_path / "a.mp4", 3, (64, 64), picture=picture).read_bytes()
    matrix = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    at = data.index(b"tkhd") + 4 + 40                                       # version 0: the matrix is 40 bytes in
    values = [matrix[0] << 16, matrix[1] << 16, 0, matrix[2] << 16, matrix[3] << 16, 0, 0, 0, 1 << 30]
    (tmp_path / "b.mp4").write_bytes(data[:at] + b"".join(v.to_bytes(4, "big", signed=True) for v in values) + data[at + 36:])
    quarters = sample_frames(tmp_path / "b.mp4", 1, 64)[0].float().mean(0).view(2, 32, 2, 32).mean((1, 3))
    assert divmod(quarters.argmax().item(), 2) == corner


@pytest.mark.parametrize("size", [(98, 34), (33, 65), (176, 144), (2, 2)])
def test_sample_frames_takes_odd_sizes_without_keeping_the_aspect_ratio(tmp_path, size):
    codec = "libx264" if size[0] % 2 == 0 else "ffv1"
    picture = np.zeros((size[1], size[0], 3), np.uint8)
    picture[:, size[0] // 2:, 0] = 255                                      # right half red
    path = write_clip(tmp_path / "a.mkv", 4, size, codec, picture=picture)
    left, right = sample_frames(path, 2, 32).float().mean(0).unflatten(-1, (2, 16)).mean((1, 3)).T
    if size != (2, 2):                                                      # chroma is halved, two pixels have one colour
        assert right[0] > 150 and left[0] < 60 and right[1:].max() < 60


@pytest.mark.parametrize("make, message", [
    (lambda p: p.write_bytes(b""), "Invalid data"),
    (lambda p: p.write_text("hello"), "Invalid data"),
    (lambda p: p.mkdir(), "Is a directory|directory"),
    (lambda p: None, "No such file"),
    (lambda p: p.symlink_to("nowhere"), "No such file"),
    (lambda p: write_sound(p), "no video stream"),
    (lambda p: p.write_bytes(write_clip(p.with_name("b.mp4")).read_bytes()[:300]), "Invalid data|no frames|moov"),
])
def test_a_file_without_frames_is_named_in_one_line(tmp_path, make, message):
    make(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=rf"a\.mp4: .*({message})") as error:
        sample_frames(tmp_path / "a.mp4", 4, 16)
    assert "\n" not in str(error.value)


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def mutate(data, rng):
    """One to three faults: a bit, a run of bytes, a gap, a repetition, the largest number, the end missing."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(len(data) or 1)), int(rng.integers(1, 64))
        fault = rng.integers(6)
        if fault == 0 and data:
            data[at] ^= 1 << int(rng.integers(8))
        elif fault == 5:
            del data[max(1, at):]
        else:
            data[at:at + n] = [b"", rng.bytes(n), b"", bytes(data[at:at + n]) * 2, b"\xff" * min(n, 8)][fault]
    return bytes(data)


def test_300_mutated_videos_give_frames_or_one_clear_error(tmp_path):
    """Never a hang, a crash, another exception or a wrong shape; both happen, so the faults are neither harmless nor fatal."""
    kinds = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.ts", "libx264"), ("a.mpg", "mpeg1video")]
    clips = [write_clip(tmp_path / name, 12, codec=codec, rate=25).read_bytes() for name, codec in kinds]
    outcomes = []
    faulthandler.dump_traceback_later(120, exit=True)
    for i in range(300):
        path = tmp_path / f"m{kinds[i % 6][0]}"
        path.write_bytes(mutate(clips[i % 6], np.random.default_rng(i)))
        try:
            frames = sample_frames(path, 4, 16)
            assert frames.shape == (4, 3, 16, 16) and frames.dtype == torch.uint8
            outcomes.append("frames")
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            outcomes.append("error")
    faulthandler.cancel_dump_traceback_later()
    assert min(outcomes.count("frames"), outcomes.count("error")) > 50


def test_a_claimed_size_of_100000_pixels_allocates_nothing(tmp_path):
    path = tmp_path / "a.mkv"
    data = write_clip(path, 3, codec="rawvideo").read_bytes()
    for w, h in ((100_000, 100_000), (20_000, 20_000)):
        claim = data.replace(b"\xb0\x81\x30\xba\x81\x20", b"\xb0\x83" + w.to_bytes(3, "big") + b"\xba\x83" + h.to_bytes(3, "big"))
        assert claim != data
        path.write_bytes(claim)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match="a.mkv: "):
            sample_frames(path, 4, 16)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000           # kB


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

def test_retrieval_metrics_equal_a_sort_of_every_row():
    """Several queries a video, no ties: the rank is the place in the sorted row."""
    sim, target = torch.randn(60, 25), torch.randint(0, 25, (60,))
    ranks = [sorted(range(25), key=lambda b: -sim[a, b]).index(target[a]) + 1 for a in range(60)]
    got = retrieval_metrics(sim, target)
    for k in (1, 5, 10):
        assert got[f"R@{k}"] == pytest.approx(100 * sum(r <= k for r in ranks) / 60)
    assert got["nDCG@10"] == pytest.approx(sum(1 / math.log2(1 + r) for r in ranks if r <= 10) / 60)
    assert got["MdR"] == pytest.approx(np.median(ranks)) and got["MnR"] == pytest.approx(np.mean(ranks))


def test_a_tie_counts_against_the_model():
    constant = retrieval_metrics(torch.ones(8, 8), torch.arange(8))
    assert constant == {"R@1": 0, "R@5": 0, "R@10": 100, "nDCG@10": pytest.approx(1 / math.log2(9)), "MdR": 8, "MnR": 8}
    assert retrieval_metrics([[0.5, 0.5, 0.1]], [0])["MnR"] == 2
    assert retrieval_metrics([[0.5, 0.4, 0.1]], [0])["R@1"] == 100


@pytest.mark.parametrize("levels", [0, 4])
def test_video_to_text_ranks_each_videos_best_caption_among_the_other_videos_best(levels):
    """Several captions a video, some videos with none, ties included: written out as a loop."""
    sim, target = torch.randn(60, 15), torch.randint(0, 13, (60,))
    if levels:
        sim = (sim * 2).round() / levels                                    # many ties
    videos = sorted(set(target.tolist()))
    ranks = []
    for v in videos:
        best = {w: max(sim[a, v].item() for a in range(60) if target[a] == w) for w in videos}
        ranks.append(sum(x >= best[v] for x in best.values()))
    got = retrieval_metrics(*video_to_text(sim, target))
    assert got["MnR"] == pytest.approx(np.mean(ranks)) and got["R@1"] == pytest.approx(100 * np.mean([r == 1 for r in ranks]))
    assert len(set(ranks)) > 3


@pytest.mark.parametrize("levels", [0, 4])
def test_reciprocal_rank_fusion_is_its_formula(levels):
    F, V = torch.randn(9, 12), torch.randn(9, 12)
    if levels:
        F, V = ((x * 2).round() / levels for x in (F, V))
    want = [[sum(1 / (60 + sum(y >= row[b] for y in row)) for row in (F[a].tolist(), V[a].tolist())) for b in range(12)] for a in range(9)]
    assert (reciprocal_rank_fusion(F, V) - torch.tensor(want, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("sim, target, message", [([[1.0, float("nan")]], [0], "NaN"), (torch.zeros(0, 3), [], "no queries")])
def test_metrics_of_nothing_and_of_nan_are_refused(sim, target, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(sim, target)


# ---------------------------------------------------------------------------------------------------------------------
# Figure 4

def test_interactions_are_each_words_similarity_to_each_frame(tiny):
    """A word of several tokens has their mean, start, end and pads have no place, expansion tokens are no frames."""
    frames = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    words, before, after = interactions(tiny, "a doggedly  small dog", frames)
    ids, mask = tiny.tokenize(["a doggedly small dog"])
    Q, (F, V) = tiny.encode_query(ids, mask)[0], tiny.encode_video(frames[None])
    assert words == ["a", "doggedly", "small", "dog"] and len(tiny.tokenizer.encode("doggedly")) == 2
    tokens = torch.stack([Q[1], (Q[2] + Q[3]) / 2, Q[4], Q[5]])
    assert (before - tokens @ F[0].T).abs().max() < 1e-6 and (after - tokens @ V[0, :6].T).abs().max() < 1e-6


def test_a_query_that_was_cut_keeps_its_first_words_in_the_figure(tiny):
    words, before, _ = interactions(tiny, "dog " * 50, torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    assert words == ["dog"] * 30 and before.shape == (30, 3)


def test_the_figure_puts_each_word_over_and_under_the_frame_it_picks():
    """Green ink above the frame picked before, red ink below the frame picked after."""
    frames = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    image = np.asarray(draw_interactions([("", ["dog"], frames, torch.eye(4)[1:2], torch.eye(4)[3:4])])).astype(int)
    strip = image[:, 70:]                                                   # right of the margin
    green = np.argwhere((strip[..., 1] > strip[..., 0] + 60) & (strip[..., 1] > strip[..., 2] + 60))
    red = np.argwhere((strip[..., 0] > strip[..., 1] + 100) & (strip[..., 0] > strip[..., 2] + 100))
    assert set(green[:, 1] // 96) == {1} and set(red[:, 1] // 96) == {3} and green[:, 0].max() < red[:, 0].min()


# ---------------------------------------------------------------------------------------------------------------------
# Search

@pytest.fixture
def clips(tmp_path):
    """A folder with 12 clips of one colour each, in two folders, and what is no clip."""
    root = tmp_path / "clips"
    (root / "below").mkdir(parents=True)
    for i in range(12):
        picture = np.full((32, 48, 3), np.random.default_rng(i).integers(0, 256, 3), np.uint8)
        write_clip(root / (f"below/{i}.mkv" if i % 3 else f"{i}.mp4"), 20, picture=picture)
    (root / "broken.mp4").write_bytes(b"x")
    (root / "link.mp4").symlink_to("nowhere")
    (root / "again").symlink_to(root)                                       # a circle
    (root / "notes.txt").write_text("x")
    return root


def encoded(monkeypatch, model):
    """A list that gets the number of videos of each call of encode_video."""
    counts, encode = [], model.encode_video
    monkeypatch.setattr(model, "encode_video", lambda frames: counts.append(len(frames)) or encode(frames))
    return counts


QUERIES = ["a dog", "a red square moves left", "something"]


def test_search_is_the_brute_force_ranking(tmp_path, clips, tiny):
    """Scores of float32 vectors but for fp16's rounding, and of the stored ones exactly; F + V = score; the best frame and its time."""
    index, broken = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=5)
    assert len(broken) == 2 and "link.mp4: No such file" in broken[0] and "broken.mp4: " in broken[1]
    paths = [str(clips / path) for path, *_ in index.videos]
    assert sorted(os.path.basename(p) for p in paths) == sorted(f"{i}.{'mkv' if i % 3 else 'mp4'}" for i in range(12))
    with torch.no_grad():
        F, V = tiny.encode_video(torch.stack([sample_frames(p, 6, 64) for p in paths]))
        ids, mask = tiny.tokenize(QUERIES)
        Q = tiny.encode_query(ids, mask)
    want = naive(Q, F, mask) + naive(Q, V, mask)
    stored = torch.from_numpy(np.fromfile(tmp_path / "index/vectors-0.f16", np.float16).reshape(12, 14, 64)).double()
    exact = naive(Q.double(), stored[:, :6], mask) + naive(Q.double(), stored[:, 6:], mask)
    hits = VideoIndex.load(tmp_path / "index").search(tiny, QUERIES, 12)
    for q, row in enumerate(hits):
        scores = torch.tensor([hit["score"] for hit in row])
        columns = [paths.index(hit["path"]) for hit in row]
        assert sorted(columns) == list(range(12)) and (scores[:-1] >= scores[1:]).all()
        assert (scores - want[q, columns]).abs().max() < 2e-3 and (scores - exact[q, columns]).abs().max() < 1e-5
        for hit, b in zip(row, columns):
            assert hit["F"] + hit["V"] == pytest.approx(hit["score"], abs=1e-6)
            n = ((Q[q] @ F[b].T).sum(0) + (Q[q] @ V[b, :6].T).sum(0)).argmax().item()
            assert (hit["frame"], hit["start"], hit["end"]) == (n, round(n / 3, 2), round((n + 1) / 3, 2))      # 2 seconds in 6 parts


def test_an_index_is_brought_up_to_date_by_what_changed_alone(tmp_path, monkeypatch, clips, tiny):
    counts = encoded(monkeypatch, tiny)
    VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(counts) == 12
    VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(counts) == 12
    write_clip(clips / "new.mp4", 5)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(counts) == 13 and len(index.videos) == 13
    (clips / "0.mp4").unlink()
    write_clip(clips / "3.mp4", 7)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert sum(counts) == 14 and "0.mp4" not in [path for path, *_ in index.videos] and len(index.videos) == 12
    fresh, _ = VideoIndex.build(clips, tiny, tmp_path / "fresh", batch_size=1)
    order = [[path for path, *_ in fresh.videos].index(path) for path, *_ in index.videos]
    assert torch.equal(index.vectors, fresh.vectors[order])                 # batches of one: larger ones round otherwise
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == ["index.json", "vectors-1.f16"]


def test_a_killed_build_of_an_index_goes_on(tmp_path, monkeypatch, clips, tiny):
    """What was saved is not encoded again, and the end is that of an undisturbed build."""
    whole, _ = VideoIndex.build(clips, tiny, tmp_path / "whole", batch_size=1)
    clock, encode, calls = itertools.count(0, 100), tiny.encode_video, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(video_colbert.time, "monotonic", lambda: next(clock))             # it is always time to save
        patch.setattr(tiny, "encode_video", lambda frames: encode(frames) if next(calls) < 3 else (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    saved = len(VideoIndex.load(tmp_path / "index").videos)
    with open(tmp_path / "index/vectors-0.f16", "ab") as file:
        file.write(b"what came after the last save")
    counts = encoded(monkeypatch, tiny)
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", batch_size=1)
    assert saved > 0 and sum(counts) == 12 - saved and index.videos == whole.videos
    assert torch.equal(index.vectors, whole.vectors)                        # batches of one: larger ones round otherwise


@pytest.mark.parametrize("spoil", [lambda f: os.truncate(f / "vectors-0.f16", 1000), lambda f: (f / "vectors-0.f16").unlink(),
                                   lambda f: os.truncate(f / "index.json", 100), lambda f: (f / "index.json").write_text("[]"),
                                   lambda f: (f / "index.json").unlink()])
def test_a_damaged_index_is_refused_with_its_name(tmp_path, clips, tiny, spoil):
    VideoIndex.build(clips, tiny, tmp_path / "index")
    spoil(tmp_path / "index")
    with pytest.raises(ValueError, match="index is not a whole index: ") as error:
        VideoIndex.load(tmp_path / "index")
    assert "\n" not in str(error.value)


def test_an_index_answers_to_its_own_model_and_root_alone(tmp_path, clips, tiny):
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index", name="mine")
    other = VideoColBERT(Config(backbone="tiny", num_frames=6)).eval()
    with pytest.raises(ValueError, match=r"index was made by another model \(mine\)"):
        index.search(other, ["a dog"], 1)
    with pytest.raises(ValueError, match="index is an index of .*clips by mine, not of .*clips by other: name a new folder"):
        VideoIndex.build(clips, other, tmp_path / "index", name="other")
    with pytest.raises(ValueError, match="not of .*below"):
        VideoIndex.build(clips / "below", tiny, tmp_path / "index")
    for k in (0, 13):
        with pytest.raises(ValueError, match=f"k must be 1 to 12, the videos of .*index, not {k}"):
            index.search(tiny, ["a dog"], k)
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        VideoIndex.build(tmp_path / "nowhere", tiny, tmp_path / "other")
    with pytest.raises(ValueError, match="interaction mp has none"):
        VideoIndex.build(clips, VideoColBERT(Config(backbone="tiny", interaction="mp")), tmp_path / "other")


def test_a_large_index_opens_without_being_read(tmp_path):
    """8 GB on paper, a sparse file: opening it adds next to nothing to memory, and one of its rows can be read."""
    videos = [[f"{i}.mp4", 1, 1, 1.0] for i in range(5000)]
    meta = dict(root="/", model="", fingerprint="", num_frames=400, visual_expansion=0, width=1024, vectors="vectors-0.f16", videos=videos)
    (tmp_path / "index.json").write_text(json.dumps(meta))
    with open(tmp_path / "vectors-0.f16", "wb") as file:
        file.truncate(2 * 5000 * 800 * 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = VideoIndex.load(tmp_path)
    assert index.vectors.shape == (5000, 800, 1024) and index.vectors[4999].float().sum() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000                # kB


@pytest.mark.parametrize("M, N, E", [(32, 12, 2), (5, 1, 0), (1, 4, 3)])
def test_as_multivector_makes_the_two_level_score_one_maxsim(M, N, E):
    """3 / M MaxSim_cosine - 4 = MMS_FV, also where the levels are opposite and every match of the wrong kind is perfect."""
    Q, F, V = unit(4, M, 16, dtype=torch.float64), unit(6, N, 16, dtype=torch.float64), unit(6, N + E, 16, dtype=torch.float64)
    F[0], V[0] = Q[0, 0], -Q[0, 0]
    q, v = as_multivector(Q, Q), as_multivector(F, V)
    assert q.shape == (4, 2 * M, 18) and v.shape == (6, 2 * N + E, 18) and (q.norm(dim=-1) - 1).abs().max() < 1e-12
    maxsim = torch.einsum("amd,bnd->abmn", q, v).amax(-1).sum(-1)
    assert (3 / M * maxsim - 4 - mean_max_sim(Q, F) - mean_max_sim(Q, V)).abs().max() < 1e-12


def test_lancedb_ranks_by_the_two_level_score_unchanged(tmp_path, clips, tiny):
    """The same top 10 and the same scores; LanceDB's distance is the sum over the query's vectors of 1 - best cosine."""
    pytest.importorskip("lancedb")
    index, _ = VideoIndex.build(clips, tiny, tmp_path / "index")
    table = index.to_lancedb(str(tmp_path / "lance"))
    for query, hits in zip(QUERIES, index.search(tiny, QUERIES, 10)):
        ids, mask = tiny.tokenize([query])
        with torch.no_grad():
            Q = tiny.encode_query(ids, mask)[mask]                          # (M, d)
        found = table.search(as_multivector(Q, Q).tolist()).distance_type("cosine").limit(10).to_list()
        assert [os.path.join(index.meta["root"], row["path"]) for row in found] == [hit["path"] for hit in hits]
        scores = [3 / len(Q) * (2 * len(Q) - row["_distance"]) - 4 for row in found]
        assert scores == pytest.approx([hit["score"] for hit in hits], abs=1e-4)


def test_index_search_and_explain_from_the_command_line(tmp_path, monkeypatch, capsys, clips, tiny):
    monkeypatch.chdir(tmp_path)
    tiny.save("model")
    video_colbert.main(["index", "clips", "--model", "model", "--out", "index"])
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "12 videos in index" and len(out) == 3 and all(line.startswith("skipped: ") for line in out[:2])
    video_colbert.main(["search", "index", "a dog", "-k", "3", "--json"])
    hits = json.loads(capsys.readouterr().out)
    assert hits == VideoIndex.load("index").search(tiny, ["a dog"], 3)[0]
    video_colbert.main(["search", "index", "a dog", "-k", "3", "--sheet", "sheet.png"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(hit["path"] in line and f"{hit['score']:.3f}" in line for hit, line in zip(hits, lines))
    video_colbert.main(["explain", "a small dog", hits[0]["path"], "--model", "model", "--out", "why.png"])
    words, before, after = interactions(tiny, "a small dog", sample_frames(hits[0]["path"], 6, 64))
    lines = capsys.readouterr().out.splitlines()
    for word, b, v, line in zip(words, before, after, lines):
        assert line.split()[0] == word and f"frame {b.argmax() + 1}, {b.max():.3f}" in line and line.endswith(f"frame {v.argmax() + 1}, {v.max():.3f}")
    assert Image.open("why.png").size[0] > 500 and Image.open("sheet.png").size[1] > 300
    for argv, message in ((["search", "nowhere", "x"], "nowhere is not a whole index"), (["search", "index", "x", "-k", "99"], "k must be 1 to 12"),
                          (["explain", "x", "nothing.mp4", "--model", "model"], "nothing.mp4: No such file"),
                          (["index", "clips", "--model", "ViT-B-23", "--out", "i"], "unknown backbone 'ViT-B-23'; near names"),
                          (["explain", " ", hits[0]["path"], "--model", "model"], "no words in ' '")):
        with pytest.raises(ValueError, match=message):
            video_colbert.main(argv)


# ---------------------------------------------------------------------------------------------------------------------
# train.py: settings, data, cache

@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_an_epoch_has_every_caption_once_in_a_new_order(k):
    videos = [("a", list("abc")), ("b", ["d"]), ("c", list("efghi"))]
    s = train.Settings(captions_per_video=k, seed=3)
    items = train.epoch_items(videos, s, 0)
    assert sorted((v, c) for v, chosen in items for c in chosen) == [(v, c) for v in range(3) for c in range(len(videos[v][1]))]
    assert max(len(chosen) for _, chosen in items) == min(k, 5)
    assert items == train.epoch_items(videos, s, 0) != train.epoch_items(videos, s, 1)


def test_every_setting_is_an_option_with_its_sentence(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in train.dataclasses.fields(train.Settings):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "frames a video (section 5.2, Table 7) [12]" in text


def test_what_is_typed_beats_the_presets_and_these_beat_the_paper():
    s = train.parse_settings([])
    assert (s.backbone, s.freeze, s.learn_scale) == ("tiny", False, True)
    s = train.parse_settings(["--data", "msrvtt"])
    assert (s.backbone, s.num_frames, s.num_tokens, s.freeze, s.lr, s.lr_pretrained) == ("ViT-B-32-quickgelu", 12, 32, True, 1e-4, 1e-7)
    s = train.parse_settings(["--data", "msrvtt", "--backbone", "tiny", "--freeze", "--num-frames", "3", "--pretrained", "none"])
    assert (s.freeze, s.num_frames, s.learn_scale, s.pretrained) == (True, 3, True, None)


def test_the_schedule_rises_for_a_tenth_and_falls_to_the_end():
    factors = [train.schedule(step, 100, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1 and factors[99] == pytest.approx(1 / 90)
    assert factors[:10] == sorted(factors[:10]) and factors[10:] == sorted(factors[10:], reverse=True)


def test_a_batch_marks_every_true_pair():
    """The same video twice, and a video with the very same caption; several captions a video make more rows than columns."""
    videos = [("0.mp4", ["a", "b"]), ("1.mp4", ["c", "d"]), ("2.mp4", ["c", "e"])]
    pairs = train.positive_pairs(videos, [(0, [0]), (1, [0]), (0, [1]), (2, [0])])
    assert pairs.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert train.positive_pairs(videos, [(0, [0, 1]), (2, [1])]).int().tolist() == [[1, 0], [1, 0], [0, 1]]


CAPTIONS = {f"video{i}": [f"caption {j} of {i}" for j in range(3)] for i in range(6)}


def write_msrvtt(root, shape, videos, train_csv=True, clips=6):
    """A small dataset in one of the layouts of the wild, test videos 1 and 4."""
    sentences = [(video, text, i) for i, (video, text) in enumerate((v, t) for v in CAPTIONS for t in CAPTIONS[v])]
    write = {"clip4clip": ["MSRVTT_data.json"], "official": ["train_val_videodatainfo.json", "test_videodatainfo.json"],
             "frozen": ["annotation/MSR_VTT.json"]}[shape]
    for k, name in enumerate(write):
        part = sentences[k::len(write)]
        data = {"annotations": [{"image_id": v, "caption": t, "id": i} for v, t, i in part]} if shape == "frozen" else {
            "info": {}, "videos": [{"video_id": v, "split": "train"} for v in CAPTIONS],
            "sentences": [{"caption": t, "video_id": v, "sen_id": i} for v, t, i in part]}
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(data))
    if train_csv:
        (root / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo2\nvideo3\n")
    (root / "MSRVTT_JSFUSION_test.csv").write_text(
        'key,vid_key,video_id,sentence\nret0,msr1,video1,"the query, of 1"\nret1,msr4,video4,the query of 4\n')
    (root / videos).mkdir(parents=True)
    for i in range(clips):
        write_clip(root / videos / f"video{i}.mp4", 4)
    return root


@pytest.mark.parametrize("shape", ["clip4clip", "official", "frozen"])
@pytest.mark.parametrize("videos", ["videos/all", "videos", "MSRVTT_Videos", "MSRVTT/videos/all"])
def test_msrvtt_is_read_in_every_layout(tmp_path, shape, videos):
    root = write_msrvtt(tmp_path, shape, videos)
    train_split, test_split = train.load_msrvtt(root)
    assert [(str(path.relative_to(root)), sorted(c)) for path, c in train_split] == [
        (f"{videos}/video{i}.mp4", CAPTIONS[f"video{i}"]) for i in (0, 2, 3)]
    assert test_split == [(root / videos / "video1.mp4", ["the query, of 1"]), (root / videos / "video4.mp4", ["the query of 4"])]


def test_without_the_9k_list_all_that_is_not_tested_is_trained_on(tmp_path):
    train_split, _ = train.load_msrvtt(write_msrvtt(tmp_path, "clip4clip", "videos", train_csv=False))
    assert [path.stem for path, _ in train_split] == ["video0", "video2", "video3", "video5"]


@pytest.mark.parametrize("spoil, message", [
    (lambda r: (r / "MSRVTT_data.json").unlink(), "no MSRVTT_data.json or .*: unpack https://.*msrvtt_data.zip"),
    (lambda r: (r / "MSRVTT_JSFUSION_test.csv").unlink(), "no MSRVTT_JSFUSION_test.csv .*: unpack https://.*msrvtt_data.zip"),
    (lambda r: [f.unlink() for f in (r / "videos").iterdir()], "no videos in .*: unpack https://.*MSRVTT.zip .*--download"),
    (lambda r: (r / "MSRVTT_data.json").write_text('{"sentences": ['), "MSRVTT_data.json: .*line 1"),
    (lambda r: (r / "MSRVTT_data.json").write_text('{}'), "MSRVTT_data.json: no 'annotations'"),
    (lambda r: (r / "MSRVTT_data.json").write_text('{"sentences": [{"video_id": {}, "caption": "a"}]}'), "MSRVTT_data.json: '{}' where a text"),
    (lambda r: (r / "MSRVTT_data.json").write_text('{"sentences": 5}'), "MSRVTT_data.json: 'int' object"),
    (lambda r: (r / "MSRVTT_data.json").write_text("[" * 100_000), "MSRVTT_data.json: "),
    (lambda r: (r / "MSRVTT_data.json").write_bytes(b"\xff\xfe{"), "MSRVTT_data.json: .*utf-8"),
    (lambda r: (r / "MSRVTT_data.json").write_text((r / "MSRVTT_data.json").read_text().replace("caption 1 of 2", " ")), "video2.mp4 has no captions, or"),
    (lambda r: (r / "MSRVTT_data.json").write_text((r / "MSRVTT_data.json").read_text().replace("caption 1 of 2", "\\ud800")), "video2.mp4.* is not valid"),
    (lambda r: (r / "MSRVTT_train.9k.csv").write_text("id\nvideo0\n"), "MSRVTT_train.9k.csv: no 'video_id'"),
    (lambda r: (r / "MSRVTT_train.9k.csv").write_text(""), "MSRVTT_train.9k.csv: no videos in it"),
    (lambda r: (r / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo0\n"), "MSRVTT_train.9k.csv: video0.mp4 is there twice"),
    (lambda r: (r / "MSRVTT_train.9k.csv").write_text("video_id\nvideo77\n"), "no captions for 1 videos of .*, video77 first"),
    (lambda r: (r / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nvideo1\n"), "MSRVTT_JSFUSION_test.csv: line 2 is too short"),
    (lambda r: (r / "MSRVTT_JSFUSION_test.csv").write_text("video_id,sentence\nvideo1,a\nvideo1,b\n"), "video1.mp4 is there twice"),
])
def test_what_is_missing_from_msrvtt_is_named_in_one_line(tmp_path, spoil, message):
    root = write_msrvtt(tmp_path, "clip4clip", "videos")
    spoil(root)
    with pytest.raises(ValueError, match=message) as error:
        train.load_dataset(train.Settings(data="msrvtt", root=str(root)))
    assert "\n" not in str(error.value)


def test_no_folder_at_all_says_where_to_get_one(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere.*: unpack https://.*MSRVTT.zip and https://.* into it, or let --download"):
        train.load_dataset(train.Settings(data="msrvtt", root=str(tmp_path / "nowhere")))


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(root, **files):
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        name = name.replace("__", ".")
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))


def by_hand(root, split):
    return [(str(path.relative_to(root)), captions) for path, captions in split]


def test_msvd_is_read_as_it_lies(tmp_path):
    """Word lists become captions, every caption is kept, validation videos are left out, a leading dash is no option."""
    captions = {"-4wsuPCjDBc_5_15": [["a", "man"], ["a", "dog", "runs"]], "b_1_2": [["b"]], "v_3_4": [["val"]], "t_5_6": [["t", "one"], ["t", "two"]]}
    write(tmp_path, train_list__txt="-4wsuPCjDBc_5_15\r\nb_1_2\r\n", val_list__txt="v_3_4\n", test_list__txt="t_5_6\n\n")
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=2))
    touch(tmp_path, "YouTubeClips/-4wsuPCjDBc_5_15.avi", "YouTubeClips/b_1_2.avi", "YouTubeClips/t_5_6.AVI")
    train_split, test_split = train.load_msvd(tmp_path)
    assert by_hand(tmp_path, train_split) == [("YouTubeClips/-4wsuPCjDBc_5_15.avi", ["a man", "a dog runs"]), ("YouTubeClips/b_1_2.avi", ["b"])]
    assert by_hand(tmp_path, test_split) == [("YouTubeClips/t_5_6.AVI", ["t one", "t two"])]


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content, message", [(pickle.dumps({"a": Evil()}), "raw-captions.pkl: it asks for .*system"), (b"garbage", "raw-captions.pkl: "),
                                              (pickle.dumps([1, 2]), "raw-captions.pkl: "), (pickle.dumps({"a": 5}), "raw-captions.pkl: ")])
def test_a_pickle_of_captions_executes_nothing(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, train_list__txt="a\n", test_list__txt="a\n")
    touch(tmp_path, "a.avi")
    (tmp_path / "raw-captions.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        train.load_msvd(tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("lists", [True, False])
def test_vatex_is_read_as_it_lies(tmp_path, lists):
    """English alone; the test is the half of the validation videos that test_list.txt names."""
    clip = lambda v: {"videoID": v, "enCap": [f"{v} {i}" for i in range(10)], "chCap": ["no"]}
    write(tmp_path, **{"vatex_training_v1__0__json": [clip("Ptf_2VRj-V0_000122_000132"), clip("b")], "vatex_validation_v1__0__json": [clip("c"), clip("d")]},
          test_list__txt="d\n", **({"train_list__txt": "b\n"} if lists else {}))
    touch(tmp_path, "videos/Ptf_2VRj-V0_000122_000132.mp4", "videos/b.mkv", "videos/d.mp4")
    train_split, test_split = train.load_vatex(tmp_path)
    first = [] if lists else [("videos/Ptf_2VRj-V0_000122_000132.mp4", [f"Ptf_2VRj-V0_000122_000132 {i}" for i in range(10)])]
    assert by_hand(tmp_path, train_split) == [*first, ("videos/b.mkv", [f"b {i}" for i in range(10)])]
    assert by_hand(tmp_path, test_split) == [("videos/d.mp4", [f"d {i}" for i in range(10)])]


def test_didemo_paragraphs_and_odd_endings(tmp_path):
    """Descriptions in the file's order, joined; a copy with another ending stands for its original, the original goes first."""
    moment = lambda v, text: {"video": v, "description": text, "times": [[0, 0]], "annotation_id": 1}
    a, b, c = "26292851@N04_4253489686_265c3c8051.m4v", "x@N_1_2.mov", "y@N_3_4.avi"
    write(tmp_path, train_data__json=[moment(a, "one "), moment(b, "other"), moment(a, "two")], test_data__json=[moment(c, "the"), moment(c, "query")])
    touch(tmp_path, f"videos/{Path(a).stem}.mp4", f"videos/{b}", f"videos/{Path(b).stem}.mp4", f"videos/{c}.mp4")
    train_split, test_split = train.load_didemo(tmp_path)
    assert by_hand(tmp_path, train_split) == [(f"videos/{Path(a).stem}.mp4", ["one two"]), (f"videos/{b}", ["other"])]
    assert by_hand(tmp_path, test_split) == [(f"videos/{c}.mp4", ["the query"])]


@pytest.mark.parametrize("lists", [True, False])
def test_activitynet_paragraphs_and_names(tmp_path, lists):
    clip = lambda *sentences: {"duration": 82.73, "timestamps": [[0, 1]] * len(sentences), "sentences": list(sentences)}
    write(tmp_path, train__json={"v_QOlSCBRmfWY": clip("A man.", " He runs. "), "v_b": clip("B.")}, val_1__json={"v_c": clip("C.", "D.")},
          **({"train_ids__json": ["v_b"], "val_ids__json": ["v_c"]} if lists else {}))
    touch(tmp_path, "videos/v_QOlSCBRmfWY.mp4", "videos/b.mkv", "videos/c.webm")
    train_split, test_split = train.load_activitynet(tmp_path)
    assert by_hand(tmp_path, train_split) == ([] if lists else [("videos/v_QOlSCBRmfWY.mp4", ["A man. He runs."])]) + [("videos/b.mkv", ["B."])]
    assert by_hand(tmp_path, test_split) == [("videos/c.webm", ["C. D."])]


def test_a_manifest_of_ones_own_videos(tmp_path):
    lines = [{"video": "clips/a.mp4", "captions": ["one", "\u05e9\u05dc\u05d5\u05dd \U0001f415"], "split": "train"}, {"video": "b.mkv", "captions": ["two"], "split": "test"},
             {"video": "c.mp4", "captions": ["three"], "split": "val"}]
    (tmp_path / "my.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    train_split, test_split = train.load_manifest(tmp_path / "my.jsonl")
    assert by_hand(tmp_path, train_split) == [("clips/a.mp4", lines[0]["captions"])] and by_hand(tmp_path, test_split) == [("b.mkv", ["two"])]


@pytest.mark.parametrize("line, message", [
    ('{"video": "../a.mp4", "captions": ["a"], "split": "train"}', "line 3: '../a.mp4' leaves"),
    ('{"video": "x/../../a.mp4", "captions": ["a"], "split": "train"}', "line 3: 'x/../../a.mp4' leaves"),
    ('{"video": "/etc/a.mp4", "captions": ["a"], "split": "train"}', "line 3: '/etc/a.mp4' leaves"),
    ('{"video": "a.mp4", "captions": ["a"], "split": "trian"}', "line 3: split is 'trian', not train, val or test"),
    ('{"video": "a.mp4", "split": "train"}', "line 3: no 'captions'"), ('{"video": "a.mp4", ', "line 3: "), ("[]", "line 3: "), ("5", "line 3: "),
    ('{"video": "c.mp4", "captions": [], "split": "train"}', "line 3: c.mp4 has no captions, or an empty one"),
    ('{"video": "c.mp4", "captions": ["a", " "], "split": "train"}', "line 3: c.mp4 has no captions, or an empty one"),
    ('{"video": "c.mp4", "captions": "a", "split": "train"}', "line 3: c.mp4 has no captions"),
    ('{"video": 3, "captions": ["a"], "split": "train"}', "line 3: 3 leaves"),
    ('{"video": "./a.mp4", "captions": ["a"], "split": "train"}', "a.mp4 is there twice"),
    ('{"video": "c\\u0000.mp4", "captions": ["a"], "split": "train"}', "line 3: .* is not a name"),
])
def test_a_bad_line_of_a_manifest_is_named(tmp_path, line, message):
    good = ['{"video": "a.mp4", "captions": ["a"], "split": "train"}', '{"video": "b.mp4", "captions": ["b"], "split": "test"}']
    (tmp_path / "my.jsonl").write_text("\n".join([*good, line]))
    with pytest.raises(ValueError, match="my.jsonl.*" + message.replace("../", r"\.\./")) as error:
        train.load_dataset(train.Settings(data=str(tmp_path / "my.jsonl")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data, want", [("msrvtt", (12, 32, 0)), ("msvd", (12, 32, 0)), ("vatex", (12, 32, 0)), ("didemo", (64, 64, 30)), ("activitynet", (64, 64, 0)),
                                        ("my.jsonl", (12, 32, 0))])
def test_each_dataset_brings_the_papers_frames_and_tokens(data, want):
    s = train.parse_settings(["--data", data])
    assert (s.num_frames, s.num_tokens, s.clip_seconds) == want


def test_the_first_seconds_alone_are_sampled_when_asked_for(tmp_path):
    """20 frames at 10 a second: the first second is frames 0 to 9; a limit beyond the end is none."""
    path = write_clip(tmp_path / "a.mp4")
    brightness = lambda seconds: [round((x.float().mean().item() - 8) / 6) for x in sample_frames(path, 5, 16, seconds)]
    assert brightness(1.0) == [1, 3, 5, 7, 9] and brightness(30.0) == brightness(0.0) == [2, 6, 10, 14, 18]


@pytest.mark.parametrize("kind", ["msrvtt", "msvd", "vatex", "didemo", "activitynet", "my.jsonl"])
def test_mutated_annotations_give_a_checked_split_or_one_clear_error(tmp_path, kind):
    """50 of each dataset, 300 in all."""
    captions = {f"v{i}": [f"caption {j} of {i}" for j in range(2)] for i in range(4)}
    touch(tmp_path, *(f"{v}.mp4" for v in captions))
    files = {"msrvtt": {"MSRVTT_data.json": {"sentences": [{"video_id": v, "caption": c} for v in captions for c in captions[v]]},
                        "MSRVTT_train.9k.csv": "video_id\nv0\nv1\n", "MSRVTT_JSFUSION_test.csv": "key,video_id,sentence\nr0,v2,a query\nr1,v3,\"b, query\"\n"},
             "msvd": {"train_list.txt": "v0\nv1\n", "test_list.txt": "v2\nv3\n"},
             "vatex": {f"vatex_{p}_v1.0.json": [{"videoID": v, "enCap": captions[v]} for v in vs]
                       for p, vs in (("training", ("v0", "v1")), ("validation", ("v2", "v3")))} | {"test_list.txt": "v3\n"},
             "didemo": {f"{p}_data.json": [{"video": f"{v}.mp4", "description": c} for v in vs for c in captions[v]] for p, vs in (("train", ("v0", "v1")), ("test", ("v2",)))},
             "activitynet": {f: {v: {"sentences": captions[v]} for v in vs} for f, vs in (("train.json", ("v0", "v1")), ("val_1.json", ("v2",)))} | {"val_ids.json": ["v2"]},
             "my.jsonl": {"my.jsonl": "\n".join(json.dumps({"video": f"{v}.mp4", "captions": captions[v], "split": s})
                                                for v, s in zip(captions, ("train", "train", "test", "val")))}}[kind]
    files = {name: (text if isinstance(text, str) else json.dumps(text)).encode() for name, text in files.items()}
    if kind == "msvd":
        files["raw-captions.pkl"] = pickle.dumps({v: [c.split() for c in captions[v]] for v in captions})
    outcomes = []
    for i in range(50):
        rng = np.random.default_rng(i)
        chosen = sorted(files)[i % len(files)]
        for name, data in files.items():
            (tmp_path / name).write_bytes(mutate(data, rng) if name == chosen else data)
        try:
            for split in train.load_dataset(train.Settings(data=str(tmp_path / kind) if kind == "my.jsonl" else kind, root=str(tmp_path))):
                assert split and all(isinstance(path, Path) and texts and all(isinstance(t, str) and t.strip() for t in texts) for path, texts in split)
                assert all(t.encode() for _, texts in split for t in texts)
            outcomes.append("split")
        except ValueError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error), error
            outcomes.append("error")
    assert outcomes.count("error") > 10


# ---------------------------------------------------------------------------------------------------------------------
# The download, from a server that fails in every way

class Server(http.server.BaseHTTPRequestHandler):
    """Serves self.server.files; self.server.faults, a list, says what goes wrong in the coming requests."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        fault = self.server.faults.pop(0) if self.server.faults else ""
        self.server.log.append((self.path, self.headers.get("Range"), fault))
        data = self.server.files.get(self.path)
        if data is None or fault in (404, 500):
            return self.send_error(fault or 404)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start >= len(data) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if fault == "garbage":
            data = b"<html>not today</html>"
        if fault in ("no ranges", "garbage") or not start:
            start = 0
            self.send_response(200)
        else:
            self.send_response(206)
            at = start + (7 if fault == "another part" else 0)
            self.send_header("Content-Range", f"bytes {at}-{len(data) - 1}/{len(data)}")
        if fault != "no length":
            self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.wfile.write(data[start:start + 3000 if fault == "break off" else None])


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.files, server.faults, server.log = {}, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(Server, "log_message", lambda *_: None)
    monkeypatch.setattr(train.time, "sleep", lambda _: None)
    yield server
    server.shutdown()


CONTENT = np.random.default_rng(0).bytes(20_000)


@pytest.mark.parametrize("faults, ranges", [
    ([], [None]), (["break off"] * 5, [None] + [f"bytes={3000 * k}-" for k in range(1, 6)]), ([500, 500], [None] * 3),
    (["break off", "no ranges"], [None, "bytes=3000-"]), (["break off", "another part"], [None, "bytes=3000-", None]),
    (["no length"], [None]), (["break off", 500, "break off"], [None, "bytes=3000-", "bytes=3000-", "bytes=6000-"])])
def test_a_download_survives_and_goes_on(tmp_path, server, faults, ranges):
    server.files["/a"], server.faults = CONTENT, list(faults)
    train.fetch(server.url + "/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT and [p.name for p in tmp_path.iterdir()] == ["a"]
    assert [r for _, r, _ in server.log] == ranges


def test_a_download_that_was_killed_goes_on(tmp_path, server):
    """Also when everything had arrived but the name, and when what lies there is longer than the file."""
    server.files["/a"] = CONTENT
    for part in (CONTENT[:12_345], CONTENT, CONTENT + b"more"):
        (tmp_path / "a.part").write_bytes(part)
        train.fetch(server.url + "/a", tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == CONTENT and not (tmp_path / "a.part").exists()
    assert [r for _, r, _ in server.log] == ["bytes=12345-", "bytes=20000-", "bytes=20004-", None]


@pytest.mark.parametrize("faults, message", [([404], "404"), ([500] * 9, "500")])
def test_a_download_that_cannot_be_is_one_line_and_loses_nothing(tmp_path, server, faults, message):
    server.files["/a"], server.faults = CONTENT, faults
    (tmp_path / "a.part").write_bytes(CONTENT[:100])
    with pytest.raises(ValueError, match=message) as error:
        train.fetch(server.url + "/a", tmp_path / "a")
    assert "\n" not in str(error.value) and (tmp_path / "a.part").read_bytes() == CONTENT[:100] and not (tmp_path / "a").exists()


def zipped(folder, names=None):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")) if folder else []:
            archive.write(path, path.relative_to(folder))
        for name in names or []:
            archive.writestr(name, "x" * 100)
    return data.getvalue()


def test_msrvtt_is_downloaded_unpacked_and_read(tmp_path, server, monkeypatch):
    """From archives like the real ones, through a broken connection and a page of garbage, then again with nothing to do."""
    source = write_msrvtt(tmp_path / "source", "clip4clip", "MSRVTT/videos/all")
    (tmp_path / "videos").mkdir()
    (source / "MSRVTT").rename(tmp_path / "videos/MSRVTT")
    server.files = {"/v.zip": zipped(tmp_path / "videos"), "/a.zip": zipped(source)}
    monkeypatch.setattr(train, "SOURCES", {"MSRVTT.zip": server.url + "/v.zip", "msrvtt_data.zip": server.url + "/a.zip"})
    root, argv = tmp_path / "root", ["--data", "msrvtt", "--download", "--root", str(tmp_path / "root")]
    server.faults = ["garbage"]
    with pytest.raises(ValueError, match="MSRVTT.zip: what arrived is no whole archive"):
        train.main(argv)
    assert list(root.iterdir()) == []
    server.faults = ["break off", "", "break off"]
    train.main(argv)
    assert [len(split) for split in train.load_msrvtt(root)] == [3, 2]
    assert not [p for p in root.rglob("*") if p.suffix in (".zip", ".part")]
    done = len(server.log)
    train.main(argv)
    assert len(server.log) == done


@pytest.mark.parametrize("name", ["../evil.mp4", "/tmp/evil.mp4", "videos/../../evil.mp4", "C:evil.mp4", "..\\evil.mp4", "link/evil.mp4"])
def test_no_path_of_an_archive_leaves_the_folder(tmp_path, name):
    root = tmp_path / "a" / "root"
    root.mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    (root / "z.zip").write_bytes(zipped(None, ["good.mp4", name]))
    with pytest.raises(ValueError, match="would leave the folder"):
        train.unpack(root / "z.zip", root)
    assert sorted(p.name for p in root.iterdir()) == ["link", "z.zip"] and not list(tmp_path.glob("**/evil.mp4"))


@pytest.mark.parametrize("spoil", [lambda z: z[:-30], lambda z: z[:60] + bytes([z[60] ^ 255]) + z[61:], lambda z: b""])
def test_a_damaged_archive_is_removed_and_nothing_of_it_half_written(tmp_path, spoil):
    (tmp_path / "z.zip").write_bytes(spoil(zipped(None, ["one.mp4"])))
    with pytest.raises(ValueError, match="z.zip: what arrived is no whole archive"):
        train.unpack(tmp_path / "z.zip", tmp_path)
    assert not (tmp_path / "z.zip").exists() and not (tmp_path / "one.mp4").exists()


def decodes(monkeypatch):
    """A list that grows by a path whenever a file is decoded."""
    calls = []
    monkeypatch.setattr(train, "sample_frames", lambda *args: calls.append(str(args[0])) or sample_frames(*args))
    return calls


def test_the_cache_decodes_once_and_gives_the_same_frames(tmp_path, monkeypatch):
    path, calls = write_clip(tmp_path / "a.mp4"), decodes(monkeypatch)
    first, second = (train.cached_frames(path, 4, 16, 0.0, tmp_path / "cache") for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first, sample_frames(path, 4, 16)) and len(calls) == 1
    train.cached_frames(path, 5, 16, 0.0, tmp_path / "cache"), train.cached_frames(path, 4, 24, 0.0, tmp_path / "cache")
    assert len(calls) == 3
    assert train.cached_frames(path, 4, 16, 0.0, tmp_path / "cache").shape == (4, 3, 16, 16) and len(calls) == 3


@pytest.mark.parametrize("at", ["header", "first", "last", "cut", "empty", "longer"])
def test_a_damaged_cache_is_noticed_and_rebuilt(tmp_path, monkeypatch, at):
    path, calls = write_clip(tmp_path / "a.mp4"), decodes(monkeypatch)
    frames = train.cached_frames(path, 4, 16, 0.0, tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob("*.frames")
    good = file.read_bytes()
    start = good.index(b"\n") + 1
    flip = {"header": 5, "first": start, "last": len(good) - 1}.get(at)
    file.write_bytes({"cut": good[:-7], "empty": b"", "longer": good + b"x"}.get(at) if flip is None else
                     good[:flip] + bytes([good[flip] ^ 1]) + good[flip + 1:])
    assert torch.equal(train.cached_frames(path, 4, 16, 0.0, tmp_path / "cache"), frames) and len(calls) == 2
    assert file.read_bytes() == good


def test_a_replaced_video_is_decoded_anew_even_with_its_old_size_and_time(tmp_path, monkeypatch):
    path, other = write_clip(tmp_path / "a.mp4", 20), write_clip(tmp_path / "b.mp4", 10)
    assert not torch.equal(before := train.cached_frames(path, 4, 16, 0.0, tmp_path / "cache"), sample_frames(other, 4, 16))
    size, stat = max(path.stat().st_size, other.stat().st_size), path.stat()
    content = other.read_bytes()
    path.write_bytes(content + bytes(max(0, stat.st_size - len(content))))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and path.stat().st_size == size
    after = train.cached_frames(path, 4, 16, 0.0, tmp_path / "cache")
    assert torch.equal(after, sample_frames(path, 4, 16)) and not torch.equal(after, before)


def test_a_killed_build_of_the_cache_goes_on_to_the_same_bytes(tmp_path, shapes):
    def build(cache):
        code = ("import sys, train; s = train.parse_settings(['--root', sys.argv[1], '--cache', sys.argv[2], '--workers', '2']); "
                "train.load_data(s, 64)")
        return subprocess.Popen([sys.executable, "-c", code, str(shapes), str(cache)], stderr=subprocess.DEVNULL,
                                cwd=Path(train.__file__).parent, start_new_session=True)
    frames = lambda cache: {f.relative_to(cache): f.read_bytes() for f in cache.rglob("*.frames")}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = build(killed)
    while not killed.exists() or len(frames(killed)) < 20:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = frames(killed)
    assert build(whole).wait() == 0 and 20 <= len(before) < len(frames(whole))
    assert build(killed).wait() == 0 and frames(killed) == frames(whole)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded data

@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "shapes"
    train.write_shapes(root, galleries=1)
    return root


def test_every_test_caption_of_the_embedded_data_tells_one_video(shapes):
    """240 test videos, one query each, half on appearance and half on motion, all distinct and true of one video alone."""
    train_split, test_split = train.load_msrvtt(shapes)
    sentences = {}
    for s in json.loads((shapes / "MSRVTT_data.json").read_text())["sentences"]:
        sentences.setdefault(s["video_id"], []).append(s["caption"])
    queries = [query for _, (query,) in test_split]
    assert len(test_split) == len(set(queries)) == 240 and all(path.exists() for path, _ in test_split)
    assert [train.shapes_kind(q) for q in queries].count("motion") == 120
    for path, (query,) in test_split:
        assert [v.stem for v, _ in test_split if query in sentences[v.stem]] == [path.stem]
    opposite = {m: next(o for o, v in train.MOTIONS.items() if v == (k, -sign)) for m, (k, sign) in train.MOTIONS.items()}
    said = {tuple(sentences[path.stem])[1] for path, _ in test_split}
    assert all(text.replace(m, opposite[m]) in said for text in said for m in opposite if text.endswith(m))
    tested = {tuple(sentences[path.stem]) for path, _ in test_split}
    assert not tested & {tuple(captions) for _, captions in train_split}


@pytest.mark.parametrize("motion, opposite", [("moves left", "moves right"), ("grows", "shrinks"), ("turns left", "turns right"),
                                              ("appears before a ball", "appears after a ball")])
def test_opposite_motions_show_the_same_frames_in_opposite_order(tmp_path, motion, opposite):
    """So that no set of frames tells them apart: any advantage is the temporal level's."""
    for name, m in (("a.mp4", motion), ("b.mp4", opposite)):
        train.draw_clip(tmp_path / name, "red", "bar", "blue", m, np.random.default_rng(3))
    a, b = (sample_frames(tmp_path / name, 8, 64).float() for name in ("a.mp4", "b.mp4"))
    assert (a - b.flip(0)).abs().mean() < 2 and (a - b).abs().mean() > 5


# ---------------------------------------------------------------------------------------------------------------------
# End to end

def run(*argv):
    return subprocess.run([sys.executable, train.__file__, *map(str, argv)], capture_output=True, text=True)


SMALL = ["--data", "msrvtt", "--backbone", "tiny", "--num-frames", 3, "--num-tokens", 12, "--batch-size", 4, "--epochs", 2, "--workers", 0]


def test_a_run_leaves_its_folder_and_a_table_and_repeats_exactly(tmp_path):
    root = write_msrvtt(tmp_path / "data", "clip4clip", "videos")
    results = [run(*SMALL, "--root", root, "--cache", tmp_path / "cache", "--out", tmp_path / name) for name in "ab"]
    assert [r.returncode for r in results] == [0, 0], results[0].stderr
    a, b = tmp_path / "a", tmp_path / "b"
    assert sorted(p.name for p in a.iterdir()) == ["config.json", "interactions.png", "log.jsonl", "model.safetensors", "queries.jsonl", "settings.json"]
    *steps, last = map(json.loads, (a / "log.jsonl").read_text().splitlines())
    assert [s["step"] for s in steps] == [0, 1, 2, 3] and {"loss", "MMS_F", "MMS_V", "lr"} <= steps[0].keys()
    assert [row["score"] for row in last["evaluation"]] == 2 * ["MMS_F", "MMS_V", "MMS_FV", "RRF"] and last["gallery"] == 2
    assert [row["queries"] for row in last["evaluation"]] == 4 * ["all"] + 4 * ["video to text"]
    assert all(f"{row['score']}" in results[0].stdout for row in last["evaluation"]) and "gallery of 2 videos" in results[0].stdout
    for name in ("model.safetensors", "log.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert VideoColBERT.load(a).config.num_frames == 3
    again = run(*SMALL, "--root", root, "--out", a)
    assert again.returncode == 2 and again.stderr.splitlines()[-1].startswith("train.py: --out") and "Traceback" not in again.stderr


def test_two_processes_end_with_the_parameters_of_one(tmp_path):
    """The same global batch, with two captions of some videos and one of others, in one process and shared by two."""
    root = write_msrvtt(tmp_path / "data", "clip4clip", "videos")
    flags = [*SMALL, "--captions-per-video", 2, "--root", root, "--cache", tmp_path / "cache", "--device", "cpu"]
    assert run(*flags, "--out", tmp_path / "one").returncode == 0
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", train.__file__,
                          *map(str, flags), "--out", str(tmp_path / "two")], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    one, two = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    start = VideoColBERT.load(tmp_path / "one")                             # and they did move
    torch.manual_seed(0)
    moved = VideoColBERT(start.config).state_dict()
    assert max((one[name] - moved[name]).abs().max().item() for name in one) > 1e-3
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [s["loss"] for s in logs[0][:-1]] == pytest.approx([s["loss"] for s in logs[1][:-1]], rel=1e-4)
    assert logs[0][-1]["gallery"] == logs[1][-1]["gallery"] == 2 and len(logs[0]) == len(logs[1])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_a_list_taken_apart_in_order(world, monkeypatch):
    monkeypatch.setattr(train, "WORLD", world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(train, "RANK", rank)
        parts.append(train.share(list(range(11))))
    assert sum(parts, []) == list(range(11)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_benchmark_measures_every_part_without_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    index, scores = train.bench_index, train.bench_scores
    monkeypatch.setattr(train, "bench_scores", lambda device: scores(device, 50, 50))
    monkeypatch.setattr(train, "bench_index", lambda device: index(device, videos=2000, d=64))
    monkeypatch.setattr(train, "seconds", functools.partial(train.seconds, repeat=1))
    train.main(["--bench", "--backbone", "tiny", "--root", "nowhere", "--batch-size", "2", "--num-frames", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    for part in ("mean_max_sim", "decode", "cache", "image encoder", "temporal layers", "text encoder", "loss", "optimiser",
                 "whole step", "pairs/s", "TFLOP/s", "MB", "MMS_F ", "MMS_V ", "MMS_FV", "JPEG", "an index of 2000 videos", "times one plain product"):
        assert part in out, part
    train.main(["--table", "11", "--backbone", "tiny", "--num-frames", "2", "--device", "cpu"])
    assert re.search(r"\| MMS_FV \| [\d.]+ \| [\d.]+ \| 9.64 / 11.2 \|", (tmp_path / "runs/table-11-msrvtt.md").read_text())


def test_a_missing_test_video_stops_the_evaluation_unless_allowed(tmp_path, capsys):
    root = write_msrvtt(tmp_path / "data", "clip4clip", "videos")
    (root / "videos/video4.mp4").write_bytes(b"")
    flags = [*map(str, SMALL), "--root", str(root), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"1 of 2 test videos cannot be read, .*video4\.mp4"):
        train.main(flags)
    assert not (tmp_path / "out").exists()
    train.main([*flags, "--allow-missing"])
    assert "gallery of 1 videos, 1 test videos missing: not comparable" in capsys.readouterr().out
    (root / "videos/video0.mp4").unlink()
    with pytest.raises(ValueError, match="1 of 3 training videos cannot be read"):
        train.main([*flags[:-1], str(tmp_path / "other"), "--allow-missing"])
    assert "left out of training: " in (out := capsys.readouterr().out) and "video0.mp4" in out


@pytest.mark.parametrize("flags, message", [
    (["--batch-size", "400"], "--batch-size 400 is more than the 9 examples"), (["--device", "tpu9"], "--device tpu9"),
    (["--data", "nonsense"], "--data must be"), (["--loss", "hinge"], "loss must be"), (["--backbone", "ViT-B-23"], "unknown backbone"),
    (["--num-frames", "0"], "num_frames and temporal_layers must be"), (["--batch-size", "0"], "--batch-size must be at least 1"),
    (["--epochs", "-1"], "--epochs must be at least 0"), (["--lr", "nan"], "--lr must be at least 0"), (["--table", "9"], "--table is 1 to 8"),
    (["--seeds", "2"], "--out .* names one run"), (["--resume", "nowhere"], "nowhere/settings.json: No such file"), (["--eval-only", "nowhere"], "nowhere/"),
    (["--interaction", "sum"], "interaction must be mms or mp"), (["--warmup", "2"], "--warmup at most 1"), (["--checkpoint-every", "0"], "--checkpoint-every"),
])
def test_a_wrong_flag_is_one_line_before_anything_slow(tmp_path, monkeypatch, flags, message):
    """Raised to the last lines of train.py, which print it and leave with code 2 (seen in the test of a run's folder)."""
    root, decoded = write_msrvtt(tmp_path / "data", "clip4clip", "videos"), decodes(monkeypatch)
    with pytest.raises(ValueError, match=message) as error:
        train.main([*map(str, SMALL), "--root", str(root), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), *flags])
    assert "\n" not in str(error.value) and not decoded and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: whatever kills a run, what goes on with it ends in the same bytes

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with data and one undisturbed run of 4 steps, runs/whole, and the flags of it."""
    folder = tmp_path_factory.mktemp("runs")
    root = write_msrvtt(folder / "data", "clip4clip", "videos")
    flags = [*map(str, SMALL), "--root", str(root), "--cache", str(folder / "cache"), "--captions-per-video", "1", "--device", "cpu"]
    train.main([*flags, "--out", str(folder / "whole")])
    return folder, flags


def contents(run):
    return {p.name: p.read_bytes() for p in run.iterdir() if p.name != "settings.json"}


class Killed(Exception):
    pass


def killed(monkeypatch, flags, where, step, resume=False):
    """Run until `where`, a function of train.py, is called for the step-th time; it then never returns."""
    calls, function = itertools.count(), getattr(train, where)

    def dies(*args, **kwargs):
        if next(calls) == step:
            raise Killed
        return function(*args, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(train, where, dies)
        with pytest.raises(Killed):
            train.main(flags)


@pytest.mark.parametrize("where, step, every", [("training_step", 0, "500"), ("training_step", 1, "1"), ("training_step", 2, "500"), ("training_step", 3, "1"),
                                                ("training_step", 3, "500"), ("save_checkpoint", 1, "500"), ("evaluate", 0, "1"), ("draw_examples", 0, "500")])
def test_a_killed_run_is_resumed_to_the_same_bytes(tmp_path, monkeypatch, whole, where, step, every):
    """Killed in any of its steps, in a checkpoint, in the evaluation, with a checkpoint a step or one an epoch; then once more."""
    folder, flags = whole
    out = str(tmp_path / "out")
    killed(monkeypatch, [*flags, "--out", out, "--checkpoint-every", every], where, step)
    killed(monkeypatch, ["--resume", out], "evaluate", 0)
    train.main(["--resume", out])
    assert contents(tmp_path / "out") == contents(folder / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_one_line(tmp_path, monkeypatch, whole, number):
    folder, flags = whole
    step = train.training_step
    monkeypatch.setattr(train, "training_step", lambda *args: os.kill(os.getpid(), number) or step(*args))
    with pytest.raises(KeyboardInterrupt, match="stopped after step 0; go on with --resume .*out"):
        train.main([*flags, "--out", str(tmp_path / "out")])
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000001.pt"]
    train.main(["--resume", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == contents(folder / "whole")


def test_a_signal_to_the_process_is_one_line(tmp_path, whole):
    folder, flags = whole
    process = subprocess.Popen([sys.executable, train.__file__, *flags, "--epochs", "100000", "--out", str(tmp_path / "out")],
                               stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/checkpoints/*.pt")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    last = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 130 and re.search(r"train.py: stopped after step \d+; go on with --resume", last)


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(f.read_bytes()[:-1]), lambda f: f.write_bytes(b""), lambda f: f.write_bytes(
    f.read_bytes()[:3000] + bytes([f.read_bytes()[3000] ^ 1]) + f.read_bytes()[3001:])])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, monkeypatch, capsys, whole, damage):
    folder, flags = whole
    killed(monkeypatch, [*flags, "--out", str(tmp_path / "out"), "--checkpoint-every", "1"], "training_step", 3)
    first, last = sorted((tmp_path / "out/checkpoints").iterdir())          # the last two are kept
    assert (first.name, last.name) == ("step-00000002.pt", "step-00000003.pt")
    damage(last)
    capsys.readouterr()
    train.main(["--resume", str(tmp_path / "out")])
    assert f"{last} is damaged, the one before it is taken" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(folder / "whole")


def test_resuming_with_other_settings_or_other_data_is_an_error_that_names_them(tmp_path, monkeypatch, whole):
    folder, flags = whole
    out = tmp_path / "out"
    killed(monkeypatch, [*flags, "--out", str(out), "--checkpoint-every", "1"], "training_step", 2)
    with pytest.raises(ValueError, match="out was begun with --lr 0.002, --seed 0: leave"):
        train.main(["--resume", str(out), "--seed", "3", "--lr", "1"])
    settings = json.loads((out / "settings.json").read_text())
    other = write_msrvtt(tmp_path / "other", "clip4clip", "videos")
    (other / "MSRVTT_train.9k.csv").write_text("video_id\nvideo0\nvideo3\nvideo5\n")
    (out / "settings.json").write_text(json.dumps({**settings, "root": str(other)}))
    with pytest.raises(ValueError, match="out was begun with other training videos or captions"):
        train.main(["--resume", str(out)])
    (out / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="out/settings.json is not of this version"):
        train.main(["--resume", str(out)])


def test_a_checkpoint_executes_nothing(tmp_path, monkeypatch):
    """Its checksum right, its pickle evil: refused before anything runs."""
    monkeypatch.chdir(tmp_path)
    data = io.BytesIO()
    torch.save({"step": 1, "model": Evil()}, data)
    Path("step-00000001.pt").write_bytes(train.hashlib.sha256(data.getvalue()).hexdigest().encode() + b"\n" + data.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        train.load_checkpoint(tmp_path)
    torch.save({"a": Evil()}, "weights.pt")
    with pytest.raises(ValueError, match="weights.pt does not hold"):
        VideoColBERT(Config(pretrained="weights.pt"))
    assert not Path("executed").exists()


def test_a_full_disk_at_a_checkpoint_is_one_line_and_leaves_the_one_before(tmp_path, monkeypatch, whole):
    folder, flags = whole
    writes, real = itertools.count(), train.os.fsync

    def full(fd):
        if next(writes) == 1:
            raise OSError(28, "No space left on device")
        real(fd)
    monkeypatch.setattr(train.os, "fsync", full)
    with pytest.raises(ValueError, match=r"step 2 cannot be written \(No space left on device\); the last good one is .*step-00000001.pt"):
        train.main([*flags, "--out", str(tmp_path / "out"), "--checkpoint-every", "1"])
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == ["step-00000001.pt"]
    train.main(["--resume", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == contents(folder / "whole")


@pytest.mark.parametrize("spoilt", [0, 3])
def test_a_loss_or_gradient_that_is_not_finite_stops_with_step_videos_and_checkpoint(tmp_path, monkeypatch, whole, spoilt):
    """And no checkpoint is written that it has spoilt."""
    folder, flags = whole
    calls, step = itertools.count(), train.training_step
    spoil = torch.ones(4).index_fill(0, torch.tensor(spoilt), math.nan)
    monkeypatch.setattr(train, "training_step", lambda *args: step(*args) * (spoil if next(calls) == 2 else 1))
    with pytest.raises(ValueError, match=r"the loss of step 2 is .*nan.*; last good checkpoint: .*step-00000002.pt; videos of that step: video\d.mp4") as error:
        train.main([*flags, "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value) and len(list((tmp_path / "out/checkpoints").iterdir())) == 1


def test_two_processes_do_not_share_a_run(tmp_path, monkeypatch, whole):
    folder, flags = whole
    killed(monkeypatch, [*flags, "--out", str(tmp_path / "out")], "training_step", 2)
    code = f"import fcntl, time; f = open({str(tmp_path / 'out/settings.json')!r}); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    train.claimed.close()
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ValueError, match="another process is at work on .*out"):
        train.main(["--resume", str(tmp_path / "out")])
    other.kill()
    other.wait()
    train.main(["--resume", str(tmp_path / "out")])


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures

def runs_below(folder):
    return sorted(p.parent.name for p in folder.glob("runs/*/settings.json"))


def test_table_3_trains_each_row_goes_on_and_reuses(tmp_path, monkeypatch, capsys, whole):
    """Five settings, two seeds; a killed row is gone on with, finished ones are not run again, the numbers are the runs' own."""
    _, flags = whole
    monkeypatch.chdir(tmp_path)
    killed(monkeypatch, [*flags, "--table", "3", "--seeds", "2", "--epochs", "1"], "training_step", 5)
    before = runs_below(tmp_path)
    train.main([*flags, "--table", "3", "--seeds", "2", "--epochs", "1"])
    assert len(before) == 3 and set(before) < set(runs_below(tmp_path)) and len(runs_below(tmp_path)) == 10
    out = capsys.readouterr().out
    assert (tmp_path / "runs/table-3-msrvtt.md").read_text() in out
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in out.splitlines() if line.startswith("| M") or line.startswith("| R")}
    assert list(rows) == ["MP on frames", "MP on video", "MMS_F", "MMS_V", "MMS_FV", "RRF"] and rows["MMS_F"][2] == "`--lambda-video 0`"
    found = [(json.loads((tmp_path / "runs" / r / "settings.json").read_text()), train.finished(tmp_path / "runs" / r)) for r in runs_below(tmp_path)]
    for name, changes, score in (("MP on video", dict(interaction="mp", lambda_frame=0), "MP_V"), ("MMS_V", dict(lambda_frame=0, interaction="mms"), "MMS_V"),
                                 ("RRF", dict(interaction="mms", lambda_frame=1, lambda_video=1), "RRF")):
        values = [row["R@5"] for s, record in found if changes.items() <= s.items() for row in record["evaluation"]
                  if row["queries"] == "all" and row["score"] == score]
        assert len(values) == 2 and rows[name][4] == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    monkeypatch.setattr(train, "train", None)                               # nothing is left to train
    train.main([*flags, "--table", "3", "--seeds", "2", "--epochs", "1"])
    train.main([*flags, "--seeds", "2", "--epochs", "1"])
    assert "MMS_FV |  | " in capsys.readouterr().out


@pytest.mark.parametrize("number", [3, 4, 5, 7, 8, 12])
def test_a_row_of_a_table_changes_its_own_setting_alone(number):
    """What its flags say, beside what belongs to InfoNCE and to another backbone; one row is the default, with the main numbers."""
    argv = ["--data", "msrvtt"]
    default = dataclasses.asdict(train.parse_settings(argv))
    subject = {3: {"interaction", "lambda_frame", "lambda_video"}, 4: {"loss", "loss_form", "learn_scale", "logit_scale", "interaction", "lambda_frame", "lambda_video"},
               5: {"query_augmentation", "backbone"}, 7: {"num_frames"}, 8: {"temporal_layers"}, 12: {"pad_token"}}[number]
    changes = []
    for name, flags, score, paper in train.TABLES[number][1]:
        s = dataclasses.asdict(train.parse_settings([*argv, *flags]))
        changes.append({k for k in s if s[k] != default[k]})
        assert changes[-1] <= subject and len(paper) == 4
        if not changes[-1] and score == "MMS_FV":
            assert paper[0] == 48.1
    assert set() in changes and set.union(*changes) == subject


def test_table_6_figure_3_and_4_and_table_1_come_from_the_runs(tmp_path, monkeypatch, capsys, whole):
    _, flags = whole
    monkeypatch.chdir(tmp_path)
    train.main([*flags, "--figure", "3"])
    train.main([*flags, "--table", "6"])
    train.main([*flags, "--figure", "4"])
    train.main([*flags, "--table", "1"])
    out = capsys.readouterr().out
    assert len(runs_below(tmp_path)) == 2
    before, after = ({q["query"]: q["rank"]["MMS_FV"] for q in map(json.loads, (tmp_path / "runs" / r / "queries.jsonl").read_text().splitlines())}
                     for r in ("msrvtt", "msrvtt-2"))
    assert all(f"| {q} | {before[q]} | {after[q]} | {after[q] - before[q]:+d} |" in out for q in before)
    assert all(Image.open(tmp_path / f"runs/figure-{n}-msrvtt.png").size[0] > 250 for n in (3, 4))
    assert "| msrvtt | tiny | runs/msrvtt |" in out and "--query-augmentation False" in out and "| msvd | ViT-B-16-SigLIP | no run |" in out
    assert "48.1 / 74.9 / 83.9 / 0.652" in out


def test_no_training_and_evaluation_alone(tmp_path, monkeypatch, capsys, whole):
    """--epochs 0 saves the untrained model; --eval-only gives a run's numbers again, on its own data and on other data."""
    folder, flags = whole
    monkeypatch.chdir(tmp_path)
    train.main([*flags, "--epochs", "0", "--out", "zero"])
    config = VideoColBERT.load("zero").config
    torch.manual_seed(0)
    model = VideoColBERT(config).state_dict()
    saved = safetensors.torch.load_file("zero/model.safetensors")
    assert all(torch.equal(saved[name], model[name]) for name in saved)
    train.main(["--eval-only", str(folder / "whole"), "--out", "again"])
    assert (tmp_path / "again/queries.jsonl").read_bytes() == (folder / "whole/queries.jsonl").read_bytes()
    write_clip(tmp_path / "a.mp4"), write_clip(tmp_path / "b.mp4", 3)
    lines = [{"video": f"{v}.mp4", "captions": [f"a {v}", f"two {v}"], "split": p} for v, p in (("a", "test"), ("b", "test"), ("c", "train"))]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train.main(["--eval-only", str(folder / "whole"), "--data", "my.jsonl"])
    assert train.finished("runs/my-eval")["gallery"] == 2 and train.finished("runs/my-eval")["evaluation"][0]["number"] == 4
    assert not (tmp_path / "runs/my-eval/model.safetensors").exists()


def test_a_few_videos_are_learned_by_heart(tmp_path, shapes):
    """The whole road, from H.264 to R@1: among 16 videos it trained on, nearly every query finds its own."""
    train_split, _ = train.load_msrvtt(shapes)
    videos = [(path, [captions[i % 2]]) for i, (path, captions) in enumerate(train_split[:16])]
    s = train.parse_settings(["--num-frames", "3", "--num-tokens", "12", "--epochs", "200", "--batch-size", "16", "--cache", str(tmp_path)])
    torch.manual_seed(0)
    model = VideoColBERT(Config(**{f.name: getattr(s, f.name) for f in train.dataclasses.fields(Config)}))
    train.train(model, videos, s, torch.device("cpu"), tmp_path)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    sims, target, _ = train.evaluate(model, videos, s, torch.device("cpu"))
    assert retrieval_metrics(sims["MMS_FV"], target)["R@1"] >= 90 and losses[-1] < losses[0] / 4
